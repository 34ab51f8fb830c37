"""Drain the peers of a rank that ran out of memory, by the hand-written decoder; see `out_of_memory`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halovae.loop import Loop, Request
from halovae.mesh import Mesh, Traffic
from halovae.models.wan import WanDecoder
from halovae.out_of_memory import Calls, DrainingLines
from halovae.planning.cost import hollow
from halovae.planning.plan import Plan


def drain_peers(
    model: WanDecoder, latents: Tensor, plan: Plan, meshes: Sequence[Mesh], request: Request, chunks: int, calls: int
) -> None:
    """Exchange what is left of the first `chunks` chunks of a decode after `calls` exchanges, without decoding."""
    device = meshes[0].platform.device
    shared = Calls(calls)
    dtype = next(model.parameters()).dtype
    replayed = [Mesh(mesh.grid, device, DrainingLines(mesh.lines, shared, device)) for mesh in meshes]
    empty = torch.empty(latents.shape, dtype=latents.dtype, device="meta")
    loop = Loop(hollow(model.config, dtype), empty, plan, replayed, request, Traffic(meshes[0].platform))
    for _, _ in zip(range(chunks), loop.chunks(), strict=False):
        pass

"""Many ranks in one process on one device: what each would take on a device of its own.

The decoder's code is that of real ranks; only what is between them differs. Parameters are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import SimulatedTransport, on_clocks
from halovae.distributed.transport import Link
from halovae.grid import Grid
from halovae.kernels.native import ready
from halovae.runtime.vae import VAE


@dataclass(frozen=True)
class SimulatedRank:
    """What one simulated rank took.

    Attributes:
        computing: seconds that it held the device, from its first chunk on.
        waiting: seconds from then on that it would wait for others, over the given link.
        peak_allocated: bytes of its tensors at the highest point, without weights.
        messages: how many it sent, and their `bytes_sent`.
    """

    rank: int
    computing: float
    waiting: float
    peak_allocated: int
    messages: int
    bytes_sent: int


@dataclass(frozen=True)
class Simulation:
    """A decode by simulated ranks.

    Attributes:
        frames: what it decoded to, as the decoder's `decode` returns it on rank 0.
        grid: how the ranks stood.
        ranks: what each took, in order.
        seconds: when the last of them would be done, had each a device of its own.
    """

    frames: Tensor
    grid: Grid
    ranks: tuple[SimulatedRank, ...]
    seconds: float


def simulate(
    decoder: VAE,
    latents: Tensor,
    grid: Grid,
    link: Link | None = None,
    module_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Simulation:
    """Decode by `grid.size` ranks in this process, on the decoder's device.

    Args:
        decoder: what every rank decodes with.
        latents: as the decoder's `stream` takes them.
        grid: how the ranks share the latents.
        link: what to predict the time over; None for the defaults of `Link`.
        module_kwargs: further arguments of the module's own `decode`.
        dtype: of the frames; see the decoder's `stream`.

    Raises:
        ValueError: as the decoder's `stream` raises it.
    """

    ready(decoder.device, wait=True)

    def work(mesh: Mesh, transport: SimulatedTransport) -> tuple[Tensor | None, SimulatedRank, float]:
        stream = _own(decoder).stream(latents, mesh=mesh, module_kwargs=module_kwargs, dtype=dtype)
        transport.all_values(None)  # until all ranks have recorded their graphs: only the first decode does that
        clock, computing, waiting = transport.clock, transport.computing, transport.waiting
        frames = stream.join()
        transport.pause()
        took = stream.report.ranks[0]
        simulated = SimulatedRank(
            mesh.rank, transport.computing - computing, transport.waiting - waiting, took.memory.peak_allocated,
            took.messages, took.bytes_sent,
        )  # fmt: skip
        return frames, simulated, transport.clock - clock

    done = on_clocks(grid, decoder.device, work, link or Link())
    frames = done[0][0]
    assert frames is not None
    return Simulation(frames, grid, tuple(rank for _, rank, _ in done), max(clock for _, _, clock in done))


def _own(decoder: VAE) -> VAE:
    """A decoder for one rank, with the same parameters: autoencoders may keep caches on themselves as they decode."""
    return VAE(copy.deepcopy(decoder.module, {id(one): one for one in decoder.module.parameters()}))

"""Drain the peers of a rank that ran out of memory, by its recorded graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.distributed.out_of_memory import Calls, DrainingTransport
from halovae.plane import context, operators
from halovae.plane.agreement import may_exchange, meta_tensor, run_without_data
from halovae.plane.layout import Layout, local_shape
from halovae.plane.live import is_operator
from halovae.plane.plane import Plane
from halovae.plane.program import Program


def drain_peers(
    program: Program, mesh: Mesh, send: Callable[[Tensor, Layout, Plane], object] | None, chunks: int, calls: int
) -> None:
    """Exchange the remaining messages of the first `chunks` chunks of a call, on meta tensors.

    Args:
        program: the program that this rank was running.
        mesh: its ranks.
        send: sends this rank's shard of a chunk to its receivers; None where it sends none.
        chunks: how many chunks of the result to exchange.
        calls: how many exchanges this rank already did.
    """
    transport = DrainingTransport(mesh.transport, Calls(calls), mesh.device.torch_device)
    meta_mesh = Mesh(mesh.grid, torch.device("cpu"), transport)
    plane = Plane(meta_mesh)

    def run(node: fx.Node) -> None:
        if is_operator(node) and may_exchange(node):
            run_without_data(node)

    with _disable_current_modes(), torch.inference_mode(), context.on(meta_mesh):
        for node in program.graph.nodes:
            if node.op == "call_module":
                for one in program.bodies[str(node.target)].nodes:
                    run(one)
            elif program.streams and node.target is operators.emit:
                own = meta_tensor(node.all_input_nodes[0])
                if send is not None:
                    send(own, program.layout_of(own), plane)
                chunks -= 1
                if not chunks:
                    return
            else:
                run(node)
        if not program.streams and send is not None:
            shard = torch.empty(local_shape(program.returns, plane.coordinates), dtype=program.dtype, device="meta")
            send(shard, program.returns, plane)

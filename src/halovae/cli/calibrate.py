"""`halovae calibrate`: measure this machine for plans of later decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from halovae.cli.common import Dtype, Interface, console, errors_shown, results_console
from halovae.cli.measuring import check_ranks
from halovae.device.kinds import Device
from halovae.distributed.launch import launch, under_torchrun
from halovae.distributed.mesh import mesh_for
from halovae.distributed.transport import join_world, world_size
from halovae.grid import Grid
from halovae.kernels import native
from halovae.planning.calibrate import calibrated, key_of
from halovae.planning.calibration import Calibration


def calibrate(
    num_gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, one rank each.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for a copy, for `halovae plan` elsewhere.")
    ] = None,
    interface: Interface = None,
) -> None:
    """Measure operators and messages on this machine. It takes about a minute, and replaces an earlier measurement.

    The first decode on several ranks measures by itself. Under torchrun, the command measures torchrun's world.
    """
    with errors_shown():
        ranks = world_size() if under_torchrun() else num_gpus
        check_ranks("--num-gpus", ranks, None)
        with console.status(f"measuring {ranks} rank(s)"):
            path, measured = launch(ranks, _measure, dtype.torch)[0]
        if output is not None:
            output.write_text(measured.as_json() + "\n")
        results_console().print(_table(measured))
        console.print(f"saved as {path}", soft_wrap=True, highlight=False)


def _measure(dtype: torch.dtype) -> tuple[str, Calibration]:
    device = Device.default()
    join_world(device.torch_device)
    mesh = mesh_for(Grid(rows=world_size()), device.torch_device)
    some_have_none = mesh.transport.anyone(not native.ready(device.torch_device, wait=True))
    kernels = native.EAGER if some_have_none else native.compiled()
    return str(key_of(mesh, dtype, some_have_none).path), calibrated(mesh, dtype, kernels, remeasure=True)


def _table(measured: Calibration) -> Table:
    table = Table(title=f"{measured.name}, {measured.origin}", title_justify="left")
    for column in ("work", "us per call", "GFLOP/s", "GB/s", "ns per weight"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for kind, one in sorted(measured.together.items()):
        table.add_row(
            kind, f"{one.calls * 1e6:.1f}", _rate(one.flops), _rate(one.bytes),
            f"{one.weights * 1e9:.2f}" if one.weights else "",
        )  # fmt: skip
    links = {f"exchange, {pair}": link for pair, link in measured.exchange.items()}
    links |= {f"gather, {pair}": link for pair, link in measured.gather.items()}
    for name, link in links.items():
        table.add_row(name, f"{link.latency * 1e6:.1f}", "", _rate(link.per_byte), "")
    return table


def _rate(seconds: float) -> str:
    return f"{1e-9 / seconds:,.1f}" if seconds else ""

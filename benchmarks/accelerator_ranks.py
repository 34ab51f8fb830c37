"""Time and memory of recorded graphs on one accelerator: the plain module, its replay, and one rank of larger grids.

    python benchmarks/accelerator_ranks.py --model flux --size 1024x1024 --grid 1x1,2x1,2x2,4x2

The module runs as it is, with channels last, and, with --compile, compiled with channels last. Replay runs operator by
operator, and as a CUDA graph. With --profile, the kernels of a replay are listed by time.

A rank of a larger grid runs its recorded graph, and receives meaningless halos at once. Its time is that of its
computation, without messages; its peak is what it allocates. With --check, ranks are simulated on small latents and
compared with the plain module.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from halovae import Grid, shard
from halovae.device.kinds import Device
from halovae.device.memory import MemoryMeter
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.models import zoo
from halovae.models.architectures import latent_shape, random_vae
from halovae.models.registry import families
from halovae.plane import Plane
from halovae.plane.program import Program
from halovae.plane.trace import trace
from halovae.planning.graphs import TracedTransport, busiest

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure one model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(families()), default="flux")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--grid", default="1x1,2x1,2x2,4x2", help="ROWSxCOLS; several comma-separated")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also run the module with torch.compile")
    parser.add_argument("--profile", action="store_true", help="list the kernels of the first grid's replay")
    parser.add_argument("--check", default="", help="HxW of small latents: compare simulated ranks with the module")
    args = parser.parse_args()
    device, dtype = Device.default().torch_device, DTYPES[args.dtype]
    if device.type == "cpu":
        parser.error("no accelerator found; benchmarks/scaling.py measures the CPU")
    torch.manual_seed(0)
    module: Any = random_vae(args.model).to(device, dtype).eval().requires_grad_(False)
    width, height = map(int, args.size.split("x"))
    shape = latent_shape(module, args.model, (width, height), args.frames)
    z = torch.randn(shape, device=device, dtype=dtype)
    grids = [Grid.parse(one) for one in args.grid.split(",")]
    with torch.no_grad():
        if args.check:
            _check(module, z[..., : int(args.check.split("x")[0]), : int(args.check.split("x")[1])], grids[1:])
        _measure(args, module, z, grids)


def name_of(dtype: torch.dtype) -> str:
    """The short name of a dtype."""
    return next(name for name, one in DTYPES.items() if one == dtype)


def _decode(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: zoo.decode(module, x)


def _check(module: nn.Module, z: Tensor, grids: list[Grid]) -> None:
    expected = _decode(module)(z)
    truth = expected.float().abs().max().item()
    for grid in grids:
        decode = shard(_decode(module), module)

        def rank(mesh: Mesh, decode: Any = decode) -> Tensor:
            frames: Tensor = decode(z, mesh=mesh)
            return frames

        error = max((one - expected).abs().max().item() for one in on_threads(grid, z.device, rank))
        print(f"latents {list(z.shape)} on {grid}: largest error {error / truth:.1e} of the largest value", flush=True)


def _measure(args: argparse.Namespace, module: nn.Module, z: Tensor, grids: list[Grid]) -> None:
    device = Device(z.device)
    weights = sum(one.numel() * one.element_size() for one in module.parameters())
    last: Any = copy.deepcopy(module)
    for parameter in last.parameters():
        parameter.data = parameter.data.contiguous(memory_format=device.layout(parameter.ndim))
    form = device.layout(z.ndim)
    cases: dict[str, Callable[[], Any]] = {
        "the plain module": lambda: _decode(module)(z),
        "channels last": lambda: _decode(last)(z.to(memory_format=form)),
    }
    if args.compile:
        compiled: Any = copy.deepcopy(last)
        (compiled.decoder if hasattr(compiled, "decoder") else compiled).compile()
        cases["compiled, channels last"] = lambda: _decode(compiled)(z.to(memory_format=form))
    notes = dict.fromkeys(cases, ("", ""))
    for grid in grids:
        begin = time.perf_counter()
        replay, program = rank_of(module, z, grid)
        traced = f"{time.perf_counter() - begin:.2f}"
        title = f"a rank of {grid}"
        cases[title] = replay
        notes[title] = traced, f"{program.peak / 2**20:,.0f}"
        if (graph := captured(device, replay)) is not None:
            cases[f"{title}, CUDA graph"] = graph
            notes[f"{title}, CUDA graph"] = "", ""
        if args.profile and grid is grids[0]:
            _profile(replay)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float] = {}
    for turn in range(args.repeat + 1):  # the first one warms up
        for name, run in cases.items():
            device.synchronize()
            if turn == 0:
                held = 0 if device.kind == "cpu" else device.module.memory_allocated(z.device)
                meter = MemoryMeter(device)
                with meter.counting():
                    run()
                peaks[name] = (meter.read().peak_allocated - held) / 2**20
                continue
            begin = time.perf_counter()
            run()
            device.synchronize()
            taken[name].append(time.perf_counter() - begin)
    plain = statistics.median(taken["the plain module"])
    table = Table(title=f"{args.model}, latents {list(z.shape)}, {args.dtype}, {_name(z)}", title_justify="left")
    columns = (
        "what runs",
        "median (ms)",
        "least (ms)",
        "of plain",
        "peak (MiB)",
        "of plain",
        "by graph (MiB)",
        "traced (s)",
    )
    for column in columns:
        table.add_column(column)
    for name, times in taken.items():
        middle = statistics.median(times)
        peak = peaks[name]
        table.add_row(
            name, f"{middle * 1e3:.1f}", f"{min(times) * 1e3:.1f}", f"{middle / plain:.3f}", f"{peak:,.0f}",
            f"{peak / peaks['the plain module']:.3f}", notes[name][1], notes[name][0],
        )  # fmt: skip
    table.caption = f"weights: {weights / 2**20:,.0f} MiB; peaks without weights; torch {torch.__version__}"
    Console(width=140).print(table)


def rank_of(module: nn.Module, z: Tensor, grid: Grid) -> tuple[Callable[[], Tensor], Program]:
    """Record what the rank of a grid with the most to do computes; return a function that replays it, and its graph."""
    mesh = Mesh(grid, z.device, TracedTransport(busiest(grid, *z.shape[-2:]), grid.size))
    program = trace(_decode(module), [module], mesh, z.shape, z.dtype, z.device)
    return partial(program, _local(z, mesh), mesh), program


def captured(device: Device, replay: Callable[[], Any]) -> Callable[[], Any] | None:
    """Return `replay` as a captured graph; None if it cannot be captured, or the device has none."""
    capture = device.new_capture()
    if capture is None:
        return None
    replay()
    device.synchronize()
    graph, recording = capture
    try:
        with recording:
            replay()
    except RuntimeError as error:
        print(f"no captured graph: {error}", flush=True)
        return None
    again: Callable[[], Any] = graph.replay
    return again


def _profile(replay: Callable[[], Any]) -> None:
    replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        replay()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=90))


def _local(z: Tensor, mesh: Mesh) -> Tensor:
    return Plane(mesh).scatter(z).local.clone()


def _name(z: Tensor) -> str:
    return str(Device(z.device).describe()["device"])


if __name__ == "__main__":
    main()

"""`halovae bench`: decode time and memory by mode, as a table, JSON, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halovae.cli.common import Dtype, check_installed, errors_shown, parse_size, parsed, results_console
from halovae.cli.measuring import check_ranks, free_names, parse_numbers, progress
from halovae.device.kinds import threads_per_rank


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="A VAE's folder, file, or hub id; demo; or a name such as flux, sdxl, hunyuan-video for the true-size "
            "architecture with random weights."
        ),
    ],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; several comma-separated.")] = "1280x720",
    frames: Annotated[int, typer.Option(min=1, help="Frames of each clip; 1 for images.")] = 81,
    batch: Annotated[str, typer.Option(help="Number of clips per decode; several comma-separated.")] = "1",
    modes: Annotated[
        str,
        typer.Option(
            help="Modes, comma-separated. single: one rank. parallel: each of --num-gpus above one. "
            "tiled: diffusers' tiling. auto: the planned grid on up to the most ranks."
        ),
    ] = "single,parallel,tiled,auto",
    num_gpus: Annotated[str, typer.Option(help="Number of GPUs, one rank each; several comma-separated.")] = "1,2",
    simulate_ranks: Annotated[
        str | None, typer.Option(help="Number of ranks to simulate on one device; several comma-separated.")
    ] = None,
    latency_us: Annotated[float, typer.Option(min=0, help="Latency between simulated ranks in microseconds.")] = 20.0,
    bandwidth_gbps: Annotated[
        float, typer.Option(min=1e-3, help="Bandwidth between simulated ranks in gigabits per second.")
    ] = 800.0,
    repeat: Annotated[int, typer.Option(min=1, help="Decodes per mode; modes take turns.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, npu, xpu, or mps.", show_default="what is here")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also write where the time goes, as a table and Chrome traces.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to; files there are kept.")] = (
        Path("halovae-bench")
    ),
) -> None:
    """Measure decode time and peak memory of each mode in one run. Modes take turns.

    Writes results.json, results.md, results-time.png, and results-memory.png. Times are medians, with the fastest and
    the slowest. Memory is that of the rank with the most. diffusers decodes the tiles; their seams are approximate.
    """
    with errors_shown():
        check_installed("halovae bench", "diffusers", "matplotlib", "skimage")
        from halovae.bench import report
        from halovae.bench.profile import markdown
        from halovae.bench.run import MODES, Benchmark, run
        from halovae.distributed.transport import Link

        chosen = tuple(modes.split(","))
        if not set(chosen) <= set(MODES):
            raise ValueError(f"--modes {modes}: expected some of {','.join(MODES)}")
        ranks = parsed("--num-gpus", num_gpus, parse_numbers)
        simulated = parsed("--simulate-ranks", simulate_ranks, parse_numbers) if simulate_ranks else ()
        if "parallel" in chosen and max(ranks) == 1:
            raise ValueError(f"--num-gpus {num_gpus}: mode parallel needs a number above 1")
        if simulated and chosen[0] == "tiled":
            raise ValueError("--simulate-ranks needs one of the modes single, parallel, auto")
        target = check_ranks("--num-gpus", max(ranks), device)
        benchmark = Benchmark(
            model=model,
            sizes=tuple(parsed("--size", one, parse_size) for one in size.split(",")),
            frames=frames,
            batches=parsed("--batch", batch, parse_numbers),
            modes=chosen,
            ranks=ranks,
            simulated=simulated,
            repeat=repeat,
            threads=threads_per_rank(max(ranks)),
            dtype=dtype.torch,
            device=target.kind,
            link=Link(latency_us * 1e-6, 8e-9 / bandwidth_gbps),
        )
        paths = free_names(output, "results.json", "results.md", "results-time.png", "results-memory.png")
        traces = free_names(output, "results-profile")[0] if profile else None
        with progress(benchmark.steps) as (describe, on_step):
            rows, profiles, about = run(benchmark, describe, on_step, traces)
        weights = "random weights, " if about["random_weights"] else ""
        title = f"{model} ({weights}{about['dtype']}) on {about['device']}"
        notes = [f"{name}: {value}" for name, value in about.items() if value is not None]
        paths[0].write_text(report.as_json(rows, about) + "\n")
        paths[1].write_text(report.markdown(rows, title, ["Measured on: " + ", ".join(notes) + "."]))
        report.draw(rows, paths[2], paths[3])
        console = results_console()
        console.print(report.table(rows, title))
        for conclusion in report.conclusions(rows):
            console.print(f"- {conclusion}", soft_wrap=True, highlight=False)
        if traces is not None:
            (traces / "profile.md").write_text(markdown(profiles))
            paths.append(traces)
            for conclusion in (conclusion for profile in profiles for conclusion in profile.conclusions()):
                console.print(f"- {conclusion}", soft_wrap=True, highlight=False)
        console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)

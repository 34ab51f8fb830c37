"""`halovae plan`: how a decode would be shared among devices, and why; no device is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halovae.cli.common import (
    Dtype,
    check_installed,
    console,
    errors_shown,
    parse_bytes,
    parse_size,
    parsed,
    results_console,
)  # fmt: skip
from halovae.cli.measuring import free_names, progress
from halovae.models.load import find_folder, read_config
from halovae.models.wan import WanConfig
from halovae.planning.calibration import Calibration, read, shipped
from halovae.planning.choose import Decision, Question, TooLittleMemory, choose

EXPLORED = (1, 2, 4, 8, 16, 32, 64)


def plan(
    model: Annotated[str, typer.Option(help="Folder in diffusers layout, hub id, or wan2.1, wan2.2-5b, qwen-image.")],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; several with commas for --explore.")] = "1280x720",
    frames: Annotated[int, typer.Option(min=1, help="Frames of each clip; 1 for images.")] = 81,
    batch: Annotated[int, typer.Option(min=1, help="How many at once.")] = 1,
    num_gpus: Annotated[int, typer.Option(min=1, help="How many devices there would be.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.bf16,
    calibration: Annotated[
        str, typer.Option(help=f"A file of `halovae calibrate`, or one of {', '.join(shipped())}.")
    ] = "cuda-h200",
    memory_budget: Annotated[str | None, typer.Option(help="What each may take to decode, such as 8GiB.")] = None,
    compile_kernels: Annotated[bool, typer.Option("--compile/--eager", help="Whether decodes are warmed up.")] = False,
    show: Annotated[int, typer.Option(min=1, help="How many plans to list.")] = 12,
    explore: Annotated[
        bool, typer.Option("--explore", help="Draw time and memory over 1 to 64 devices as plan.png.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for plan.png; nothing there is replaced.")] = (
        Path()
    ),
) -> None:
    """Rank the ways to share a decode among devices, and say why the others lose.

    Times come from a calibration: measured on a machine by `halovae calibrate`, or one that ships with halovae.
    """
    with errors_shown():
        config = _config(model)
        rates = read(calibration)
        kind = "cpu" if rates.device == "cpu" else "cuda"  # accelerators take the same way through the layers
        budget = parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None
        sizes = [parsed("--size", one, parse_size) for one in size.split(",")]
        question = Question(
            config, config.latents(sizes[0], frames, batch), dtype.torch, num_gpus, budget,
            compiled=compile_kernels, device=kind,
        )  # fmt: skip
        if explore:
            check_installed("halovae plan --explore", "matplotlib")
            cases = [replace(question, shape=config.latents(one, frames, batch)) for one in sizes]
            _explore(cases, rates, free_names(output, "plan.png")[0])
        else:
            decision = choose(question, rates)
            results_console().print(_table(question, decision, show))


def _config(model: str) -> WanConfig:
    from halovae.bench.models import FAMILIES, named_config

    if model in FAMILIES:
        check_installed(f"--model {model}", "diffusers")
        return named_config(model)
    return read_config(find_folder(model))


def _table(question: Question, decision: Decision, show: int) -> Table:
    latents = "x".join(map(str, question.shape))
    table = Table(
        title=f"{question.config.family}, latents {latents}, up to {question.world} ranks; {decision.calibration}",
        title_justify="left",
    )
    for column in ("plan", "ranks", "time (s)", "peak per rank (MiB)", "messages", "sent (MiB)", "why"):
        table.add_column(column, justify="left" if column in ("plan", "why") else "right")
    for one in decision.candidates[:show]:
        known = one.peak is not None
        figures = [""] * 3
        if known:
            sent = (one.bytes_sent or 0) / 2**20
            figures = [f"{(one.peak or 0) / 2**20:,.0f}", f"{one.messages or 0:,}", f"{sent:,.1f}"]
        table.add_row(
            str(one.plan),
            str(one.ranks),
            f"{'' if known else '>= '}{one.seconds:.3g}",
            *figures,
            one.verdict,
        )
    if len(decision.candidates) > show:
        table.caption = f"{len(decision.candidates) - show} slower ones are not listed (--show)"
    return table


def _explore(cases: list[Question], rates: Calibration, path: Path) -> None:
    from halovae.bench.report import draw_plans

    curves: dict[str, list[tuple[int, float, float]]] = {}
    with progress(len(cases) * len(EXPLORED)) as (say, step):
        for case in cases:
            factor = case.config.spatial_factor
            name = f"{case.shape[4] * factor}x{case.shape[3] * factor}"
            curves[name] = []
            for ranks in EXPLORED:
                say(f"{name} on up to {ranks} ranks")
                try:
                    chosen = choose(replace(case, world=ranks), rates).chosen
                    curves[name].append((ranks, chosen.seconds, (chosen.peak or 0) / 2**30))
                except TooLittleMemory as error:
                    console.print(f"{name} on {ranks}: {error}", soft_wrap=True, highlight=False)
                step()
    draw_plans(curves, f"{cases[0].config.family} on {rates.name} ({rates.origin})", path)
    console.print(f"Written: {path}", soft_wrap=True, highlight=False)

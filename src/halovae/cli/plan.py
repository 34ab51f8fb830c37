"""`halovae plan`: how a decode would be shared among devices, and why. No device is used."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

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
from halovae.cli.frontier import COUNTS, WAYS, frontier, frontier_table
from halovae.cli.measuring import free_names, progress
from halovae.errors import MemoryBudgetError
from halovae.grid import Grid
from halovae.models.load import find_model, read_class, read_diffusers_config
from halovae.planning.calibration import Calibration, read, shipped
from halovae.planning.decision import Decision
from halovae.planning.search import Search

EXPLORED = (1, 2, 4, 8, 16, 32, 64)
FRAMES = 81  # default for clips


@dataclass(frozen=True)
class Case:
    """One decode to plan.

    Attributes:
        model: the model that decodes.
        size: the size of the pictures.
        latents: the shape of the latents.
        search: prices its grids and strips.
    """

    model: str
    size: str
    latents: tuple[int, ...]
    search: Search

    def decide(self, world: int) -> Decision:
        """Return the decision for up to a number of ranks."""
        return self.search.decide(world)


@dataclass(frozen=True)
class Options:
    """The options that all cases of a command share."""

    dtype: torch.dtype
    frames: int | None
    batch: int
    budget: int | None
    rates: Calibration


def plan(
    model: Annotated[
        str,
        typer.Option(help="A VAE's folder, file, or hub id, or a name such as flux, sdxl, hunyuan-video."),
    ],
    size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT in pixels; several comma-separated with --explore.")
    ] = "1280x720",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each clip; 1 for images.", show_default=f"{FRAMES} for clips")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of clips per decode.")] = 1,
    num_gpus: Annotated[str, typer.Option(help="Number of GPUs, one rank each; several comma-separated.")] = "8",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.bf16,
    calibration: Annotated[
        str, typer.Option(help=f"A file from `halovae calibrate`, or one of {', '.join(shipped())}.")
    ] = "cuda-h200",
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory that a rank may use to decode, such as 8GiB.")
    ] = None,
    show: Annotated[
        int | None, typer.Option(min=1, help="Grids to list per number of GPUs.", show_default="12, or 4 for several")
    ] = None,
    explore: Annotated[
        bool, typer.Option("--explore", help="Draw time and memory over 1 to 64 GPUs as plan.png.")
    ] = False,
    frontier_: Annotated[
        bool,
        typer.Option("--frontier", help="Draw time over memory of one GPU, in strips, as frontier.png and .json."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for plan.png, frontier.png; files there are kept.")
    ] = Path(),
) -> None:
    """Rank the grids that can share a decode by predicted time, and explain the choice.

    Times come from a calibration that `halovae calibrate` measured on a machine, or that ships with halovae.
    """
    with errors_shown():
        worlds = parsed("--num-gpus", num_gpus, _numbers)
        budget = parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None
        sizes = [parsed("--size", one, parse_size) for one in size.split(",")]
        options = Options(dtype.torch, frames, batch, budget, read(calibration))
        if explore and frontier_:
            raise ValueError("--explore and --frontier draw different things: leave one out")
        if explore or frontier_:
            check_installed("halovae plan --explore and --frontier", "matplotlib")
        cases = _cases(model, sizes if explore else sizes[:1], options)
        if explore:
            _explore(cases, options.rates, free_names(output, "plan.png")[0])
        elif frontier_:
            _draw_frontier(cases[0], free_names(output, "frontier.png", "frontier.json"))
        else:
            results_console().print(_table(cases[0], worlds, show or (12 if len(worlds) == 1 else 4)))


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) for word in words):
        raise ValueError("expected numbers of devices >= 1, such as 8 or 1,2,4,8")
    return [int(word) for word in words]


def _cases(model: str, sizes: Sequence[tuple[int, int]], options: Options) -> list[Case]:
    """Return a case for each size.

    Raises:
        ValueError: there is no such model, or it cannot be planned, or it cannot make these pictures.
    """
    from halovae.models.architectures import meta_vae, meta_vae_of
    from halovae.models.registry import families

    if model in families():
        check_installed(f"--model {model}", "diffusers")
        _hurry()
        module, name = meta_vae(model, options.dtype), model
    else:
        path = find_model(model)
        name = read_class(path)
        check_installed(f"a plan for {name}", "diffusers")
        module = meta_vae_of(read_diffusers_config(path), str(path), options.dtype)
    return [_case(module, name, one, options) for one in sizes]


def _hurry() -> None:
    """Keep Python from collecting garbage, and diffusers and PyTorch from importing what plans do not need.

    Together these take more than a third of a plan's time. It is done only in the command's own process, which ends
    soon. Python does not import a module that is None in `sys.modules`; diffusers then treats it as not installed.
    """
    if Path(sys.argv[0]).stem == "halovae" and "diffusers" not in sys.modules:
        gc.disable()
        for name in ("accelerate", "scipy", "transformers"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        sys.modules.setdefault(_Compiler.NAME, _Compiler())
        importlib.metadata.packages_distributions = dict  # diffusers asks for the files of all that is installed


class _Compiler(ModuleType):
    """Stands in for PyTorch's compiler until something asks it for more than to leave functions as they are.

    diffusers marks functions that must not be compiled, and so do PyTorch's shape functions. A mark imports all of the
    compiler, which takes longer than a trace.
    """

    NAME = "torch._dynamo"

    def __init__(self) -> None:
        super().__init__(self.NAME)

    @staticmethod
    def disable(fn: Any = None, *_: Any, **__: Any) -> Any:
        """The function itself, or a decorator that returns it."""
        return fn if fn is not None else lambda one: one

    allow_in_graph = disable

    def __getattr__(self, name: str) -> Any:
        # Python asks all modules for dunder names. For `__path__` it asks when a module in the package is imported.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.NAME) is self:
            del sys.modules[self.NAME]
        return getattr(importlib.import_module(self.NAME), name)


def _case(module: nn.Module, name: str, size: tuple[int, int], options: Options) -> Case:
    from halovae.models.architectures import latent_shape, usual_frames
    from halovae.models.registry import families
    from halovae.models.zoo import decode

    frames = options.frames or usual_frames(module, FRAMES)
    shape = latent_shape(module, name, size, frames)
    search = Search(
        lambda latents: decode(module, latents), module, shape, options.dtype, options.rates, options.batch,
        options.budget,
    )  # fmt: skip
    made = search.traced(Grid()).pictures
    if made[-2:] != (size[1], size[0]) or (len(made) == 5 and frames not in made[1:3]):
        raise ValueError(
            f"{name}: by its config, latents {'x'.join(map(str, shape))} decode to pictures of {size[0]}x{size[1]} and "
            f"{frames} frames, but its decoder makes {'x'.join(map(str, made))}"
        )
    note = families()[name].note if name in families() else ""
    return Case(
        f"{name} ({note})" if note else name, "x".join(map(str, size)), (options.batch * shape[0], *shape[1:]),
        search,
    )  # fmt: skip


def _table(case: Case, worlds: Sequence[int], show: int) -> Table:
    """Return a table of the plans for each number of ranks.

    Raises:
        MemoryBudgetError: no plan fits for any of them.
    """
    several = len(worlds) > 1
    decisions: dict[int, Decision | MemoryBudgetError] = {}
    for world in sorted(set(worlds), reverse=True):  # plans of many ranks bound those of fewer from below
        try:
            decisions[world] = case.decide(world)
        except MemoryBudgetError as error:
            if not several:
                raise
            decisions[world] = error
    made = {world: one for world, one in decisions.items() if isinstance(one, Decision)}
    if not made:
        raise next(one for one in decisions.values() if isinstance(one, MemoryBudgetError))
    latents, upto = "x".join(map(str, case.latents)), "" if several else f", up to {worlds[0]} ranks"
    table = Table(
        title=f"{case.model}, latents {latents}{upto}; {next(iter(made.values())).calibration}", title_justify="left"
    )
    columns = ("grid", "ranks", "time (s)", "peak per rank (MiB)", "messages", "sent (MiB)", "why")
    for column in ("up to", *columns) if several else columns:
        table.add_column(column, justify="left" if column in ("grid", "why") else "right")
    left = 0
    for world in worlds:
        decision, first = decisions[world], [str(world)] if several else []
        if isinstance(decision, MemoryBudgetError):
            table.add_row(*first, *[""] * 6, f"nothing fits: {str(decision).partition(': ')[2]}", end_section=True)
            continue
        listed = decision.candidates[:show]
        left += len(decision.candidates) - len(listed)
        for index, one in enumerate(listed):
            known = one.peak is not None
            figures = [""] * 3
            if known:
                sent = (one.bytes_sent or 0) / 2**20
                figures = [f"{(one.peak or 0) / 2**20:,.0f}", f"{one.messages or 0:,}", f"{sent:,.1f}"]
            table.add_row(
                *(first if index == 0 else [""] * len(first)),
                one.name,
                str(one.grid.size),
                f"{'' if known else '>= '}{one.seconds:.3g}",
                *figures,
                one.verdict,
                end_section=one is listed[-1],
            )
    if left:
        table.caption = f"{left} slower grids are not listed (--show)"
    return table


def _explore(cases: Sequence[Case], rates: Calibration, path: Path) -> None:
    from halovae.bench.report import draw_plans

    curves: dict[str, list[tuple[int, float, float]]] = {}
    with progress(len(cases) * len(EXPLORED)) as (describe, on_step):
        for case in cases:
            curves[case.size] = []
            for ranks in EXPLORED:
                describe(f"{case.size} on up to {ranks} ranks")
                try:
                    chosen = case.decide(ranks).chosen
                    curves[case.size].append((ranks, chosen.seconds, (chosen.peak or 0) / 2**30))
                except MemoryBudgetError as error:
                    console.print(f"{case.size} on {ranks}: {error}", soft_wrap=True, highlight=False)
                on_step()
    draw_plans(curves, f"{cases[0].model} on {rates.name} ({rates.origin})", path)
    console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def _draw_frontier(case: Case, files: Sequence[Path]) -> None:
    """Show, draw, and write what one device takes in strips."""
    from halovae.bench.report import draw_frontier

    with progress(2 * len(WAYS) * len(COUNTS) + 1) as (describe, on_step):
        found = frontier(case.search, describe, on_step)
    title = f"{case.model}, latents {'x'.join(map(str, case.latents))}, one device; every way is exact"
    results_console().print(frontier_table(found, title))
    picture, data = files
    draw_frontier([(one.name, one.seconds, (one.peak or 0) / 2**30) for one in found], title, picture)
    data.write_text(json.dumps([one.as_dict() for one in found], indent=2) + "\n")
    for file in files:
        console.print(f"Written: {file}", soft_wrap=True, highlight=False)

"""Compare every autoencoder class of diffusers on a shared plane with the module on its own. Writes docs/models.md.

    python benchmarks/models.py
    python benchmarks/models.py --only Wan --output /tmp/models.md

Tiny models of the true architecture on seeded random weights; ranks are threads. Each is called eagerly, and recorded
and replayed. The exit status is 1 if a bound is broken. Errors are at most 1e-12 in fp64, or 1e-6 where the module
itself casts to fp32, and at most 1e-4 in fp32. Only operators that are known to fall back may do so.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import track

from halovae import Grid
from halovae.bench import on_grids
from halovae.distributed.simulated import on_threads
from halovae.errors import TraceError
from halovae.models import zoo
from halovae.models.registry import families
from halovae.models.zoo import Direction
from halovae.plane.program import Program
from halovae.plane.trace import trace

GRIDS = ["2x1", "1x2", "2x2", "3x1"]
FP32_BOUND = 1e-4
DIRECTIONS: tuple[Direction, ...] = ("decode", "encode")

FLUX = families()["flux"].config
HUNYUAN_IMAGE = {**families()["hunyuan-image"].config, "sample_size": 2048}


@dataclass(frozen=True)
class Large:
    """A model of the true size, of which only shapes are computed.

    Args:
        name: the class, and a name for the configuration.
        config: arguments that differ from the class's defaults.
        latents: shape of the latents.
        pictures: shape of the pictures; None to leave out `encode`.
        ratio: a picture has this many times the rows and cols of its latent.
    """

    name: str
    config: Mapping[str, Any]
    latents: tuple[int, ...]
    pictures: tuple[int, ...] | None = None
    ratio: int = 8


LARGE = (
    Large("AutoencoderKL (FLUX.1)", FLUX, (1, 16, 64, 64), (1, 3, 512, 512)),
    Large("AutoencoderKL (FLUX.1)", FLUX, (1, 16, 128, 128), (1, 3, 1024, 1024)),
    Large("AutoencoderKLWan (2.1)", {}, (1, 16, 3, 64, 64), (1, 3, 9, 512, 512)),
    # Its attention mask is as large as the square of all cells, so the plane is smaller.
    Large("AutoencoderKLHunyuanVideo", {}, (1, 16, 2, 32, 32), (1, 3, 5, 256, 256)),
    Large("AutoencoderKLHunyuanImage (2.1)", HUNYUAN_IMAGE, (1, 64, 64, 64)),
    Large("AutoencoderKLCogVideoX", {}, (1, 16, 3, 64, 64)),
    Large("AutoencoderKLLTXVideo (0.9.0)", {}, (1, 128, 3, 64, 64)),
    Large("AutoencoderKLMochi", {}, (1, 12, 2, 64, 64)),
    Large("AutoencoderKLCosmos (haar)", {}, (1, 16, 3, 64, 64)),
)


@dataclass
class Shares:
    """What ranks of a 2x2 grid take, compared with a single rank.

    Attributes:
        received: bytes that ranks received, as a share of the bytes of all results.
        flops: FLOPs of the rank that has the most, times ranks, over those of a single rank.
        peak: peak of the rank that has the most, over that of a single rank.
        single_flops: FLOPs of a single rank.
        single_peak: peak of a single rank in bytes.
        fallbacks: calls of operators that fall back.
        gathered: bytes that fallbacks received, as a share of the bytes of all results.
    """

    received: float = math.nan
    flops: float = math.nan
    peak: float = math.nan
    single_flops: float = math.nan
    single_peak: float = math.nan
    fallbacks: Counter[str] = field(default_factory=Counter)
    gathered: float = 0.0


@dataclass
class Row:
    """The results of one entry and direction: errors by grid, and shares on 2x2.

    Attributes:
        refused: why the call cannot be recorded; empty if it can.
    """

    name: str
    direction: Direction
    fp32: dict[str, float] = field(default_factory=dict)
    fp64: dict[str, float] = field(default_factory=dict)
    replayed: dict[str, float] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)
    fallbacks: Counter[str] = field(default_factory=Counter)
    refused: str = ""


def quiet() -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


def shares_of(single: Program, programs: list[Program]) -> Shares:
    """Return the shares by the programs of a single rank and of all ranks of a grid."""
    computed = sum(program.computed for program in programs)
    flops = max(program.flops for program in programs)
    return Shares(
        received=sum(program.received for program in programs) / computed,
        flops=flops * len(programs) / single.flops if single.flops else math.nan,
        peak=max(program.peak for program in programs) / single.peak,
        single_flops=single.flops,
        single_peak=single.peak,
        fallbacks=programs[0].fallbacks,
        gathered=sum(sum(program.gathered.values()) for program in programs) / computed,
    )


def measure(name: str, direction: Direction) -> Row:
    """Measure one entry and direction on all grids."""
    entry = next(one for one in zoo.ENTRIES if one.name == name)
    row = Row(name, direction)
    wide = on_grids.plain(entry, direction, torch.float64)
    narrow = on_grids.plain(entry, direction, torch.float32)
    single: Program | None = None
    for text in GRIDS:
        grid = Grid.parse(text)
        found = on_grids.eager(entry, direction, torch.float32, grid)
        row.fp32[text] = on_grids.error([result for result, _ in found], narrow)
        found = on_grids.eager(entry, direction, torch.float64, grid)
        row.fp64[text] = on_grids.error([result for result, _ in found], wide)
        planes = [plane for _, plane in found]
        row.fallbacks |= planes[0].fallbacks
        if text == "2x2":
            computed = sum(plane.computed for plane in planes)
            row.shares.received = sum(plane.received for plane in planes) / computed
            row.shares.gathered = sum(sum(plane.gathered.values()) for plane in planes) / computed
        if row.refused:
            continue
        try:
            single = single or on_grids.record(entry, direction, torch.float64, Grid())[0]
            programs = on_grids.record(entry, direction, torch.float64, grid)
        except TraceError as error:
            row.refused = str(error).split(", at ")[0]
            continue
        row.replayed[text] = on_grids.error(on_grids.replay(programs, entry, direction, torch.float64, grid), wide)
        row.fallbacks |= programs[0].fallbacks
        if text == "2x2":
            shares = shares_of(single, programs)
            row.shares.flops, row.shares.peak = shares.flops, shares.peak
            row.shares.gathered = max(row.shares.gathered, shares.gathered)
    return row


def measure_large(index: int, direction: Direction) -> Shares:
    """Return the shares of a model of the true size in fp32. Neither weights nor maps take memory."""
    large = LARGE[index]
    with torch.device("meta"):
        module = getattr(diffusers, large.name.split(" ")[0])(**large.config).eval().requires_grad_(False)
    shape, multiple = (large.latents, 1) if direction == "decode" else (large.pictures, large.ratio)
    assert shape is not None
    call, device = zoo.CALLS[direction], torch.device("cpu")
    single, *programs = [
        program
        for grid in (Grid(), Grid.parse("2x2"))
        for program in on_threads(
            grid,
            device,
            lambda mesh: trace(lambda x: call(module, x), [module], mesh, shape, torch.float32, device, multiple),
        )
    ]
    return shares_of(single, programs)


def broken(row: Row) -> list[str]:
    """Return the bounds that a row breaks."""
    entry = next(one for one in zoo.ENTRIES if one.name == row.name)
    found = []
    for kind, errors, bound in (
        ("eager fp32", row.fp32, FP32_BOUND),
        ("eager fp64", row.fp64, entry.bound),
        ("replayed fp64", row.replayed, entry.bound),
    ):
        for grid, error in errors.items():
            if not error <= bound:
                found.append(f"{row.name}, {row.direction}, {kind}, {grid}: error {error:.1e}, bound {bound:.0e}")
    for operator in row.fallbacks.keys() - zoo.FALLBACKS.get((row.name, row.direction), {}).keys():
        found.append(f"{row.name}, {row.direction}: {operator} falls back")
    return found


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, pattern: str = "{:.2f}") -> str:
    return "-" if math.isnan(value) else pattern.format(value)


def worst(errors: dict[str, float]) -> str:
    return f"{max(errors.values()):.0e}" if errors else "-"


def fallbacks(calls: Counter[str], gathered: float) -> str:
    found = ", ".join(f"`{name}`: {count}" for name, count in sorted(calls.items()))
    return (f"{found} ({gathered:.1%})" if gathered else found) or "none"


def summary(rows: list[Row]) -> str:
    """Return the sentences above the tables."""
    classes = {row.name.split(" ")[0] for row in rows}
    casts = {entry.name for entry in zoo.ENTRIES if entry.factor_fp32}
    exact = [row for row in rows if row.name not in casts]
    cast = [row for row in rows if row.name in casts]

    def highest(some: list[Row]) -> float:
        return max((error for row in some for error in (*row.fp64.values(), *row.replayed.values())), default=0.0)

    missed = [one for row in rows for one in broken(row)]
    variants = {row.name for row in rows}
    text = f"Classes: {len(classes)}; variants of them: {len(variants)}; calls tried: {len(rows)}. "
    text += f"The largest error is {max(max(row.fp32.values()) for row in rows):.0e} in fp32"
    if exact:
        text += f", {highest(exact):.0e} in fp64"
    if cast:
        text += f", and {highest(cast):.0e} in fp64 where the module itself casts to fp32 (marked †)"
    text += ". Every call keeps its bounds." if not missed else ".\n\n**Bounds broken:**\n\n"
    text += "\n".join(f"- {one}." for one in missed)
    replicated = [f"{row.name} ({row.direction})" for row in rows if row.shares.flops > 2.5]
    if replicated:
        text += f"\n\nMostly replicated on 2x2 (FLOP ratio above 2.5): {', '.join(replicated)}."
    refused = [f"- {row.name}, {row.direction}: {row.refused}." for row in rows if row.refused]
    if refused:
        text += "\n\nNot recorded, eager only:\n\n" + "\n".join(refused)
    known = [
        f"- {name}, {direction}: `{operator}`: {why}."
        for (name, direction), operators in zoo.FALLBACKS.items()
        for operator, why in operators.items()
    ]
    return text + "\n\nKnown fallbacks:\n\n" + "\n".join(known)


def page(rows: list[Row], large: list[tuple[Large, Direction, Shares]]) -> str:
    """Return the text of docs/models.md."""
    casts = {entry.name for entry in zoo.ENTRIES if entry.factor_fp32}
    named = {id(row): row.name + (" †" if row.name in casts else "") for row in rows}
    first = [
        [
            named[id(row)], row.direction, worst(row.fp32), worst(row.fp64), worst(row.replayed),
            fallbacks(row.fallbacks, row.shares.gathered), number(100 * row.shares.received, "{:.1f}"),
            number(row.shares.flops), number(row.shares.peak),
        ]
        for row in rows
    ]  # fmt: skip
    grids = [
        [named[id(row)], row.direction]
        + [
            " / ".join(
                f"{errors[grid]:.0e}" if grid in errors else "-" for errors in (row.fp32, row.fp64, row.replayed)
            )
            for grid in GRIDS
        ]
        for row in rows
    ]
    sizes = [
        [
            one.name, direction, "x".join(map(str, (one.latents if direction == "decode" else one.pictures or ())[1:])),
            fallbacks(shares.fallbacks, shares.gathered), number(100 * shares.received), number(shares.flops, "{:.3f}"),
            number(shares.peak, "{:.3f}"), f"{shares.single_flops / 1e12:.1f}", f"{shares.single_peak / 2**30:.2f}",
        ]
        for one, direction, shares in large
    ]  # fmt: skip
    left_out = [[f"`{name}`", why] for name, why in zoo.LEFT_OUT.items()]
    costs = ["fallbacks", "received %", "FLOP ratio", "peak ratio"]
    return f"""# Models

Written by `python benchmarks/models.py`, {datetime.date.today()}: torch {torch.__version__}, diffusers \
{diffusers.__version__}, Python {platform.python_version()}. Do not edit it.

diffusers' autoencoders run unmodified on a plane that several ranks share. This page compares each of them with the
same module on its own. Models are tiny but of the true architecture; all weights are random. Ranks are threads of one
process, on a CPU. A latent has 5 rows and 7 columns (5 and 5 for AutoencoderRAE), so every split is uneven.

{summary(rows)}

## Errors and costs

{table(["model", "call", "fp32", "fp64", "replayed", *costs], first)}

- **fp32, fp64**: the largest error of any rank on any of the grids {", ".join(GRIDS)}, operator by operator, against
  the module on its own in the same dtype. An error is the largest absolute difference over the largest absolute value
  of the module's own result, or over 1 where that is smaller. Bounds: 1e-4 in fp32, 1e-12 in fp64, 1e-6 in
  fp64 where the module itself casts to fp32 (†).
- **replayed**: the same in fp64 for the recorded program of each rank. Where noise is drawn, the global generator is
  seeded as the call seeds it.
- **fallbacks**: operators that no rule covers, with the most calls on any grid, eager or recorded. They run
  replicated. In parentheses: the bytes that they receive on 2x2, as a share of the bytes of all results.
- **received %**: bytes that ranks receive on 2x2, as a share of the bytes of all results. Tiny planes inflate it.
- **FLOP ratio**: FLOPs of the busiest rank on 2x2, times 4, over the FLOPs of one rank alone. 1 is ideal; 4 is
  replicated. A plane of 5 x 7 gives the busiest rank 3 x 4 cells: 1.37.
- **peak ratio**: bytes of live tensors at the highest point of the rank that has the most on 2x2, over those of one
  rank alone, weights apart. 0.25 is ideal; 1 is replicated. The uneven split alone gives 0.34, halos add to it.

## Errors by grid

Each cell: fp32 / fp64 / replayed in fp64.

{table(["model", "call", *GRIDS], grids)}

## True sizes

Models of the true size on a 2x2 grid in fp32, recorded on shapes alone: neither weights nor maps take memory, nothing
is computed. The last two columns are one rank's alone. Other columns are as above.

{table(["model", "call", "input", *costs, "TFLOP alone", "peak alone, GiB"], sizes)}

## Left out

{table(["class", "why"], left_out)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only entries whose name contains this, and no true sizes")
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    args = parser.parse_args()
    quiet()
    console, begun = Console(stderr=True), time.perf_counter()
    entries = [entry for entry in zoo.ENTRIES if (args.only or "").lower() in entry.name.lower()]
    plan = [(entry.name, one) for entry in entries for one in DIRECTIONS if entry.shape(one) is not None]
    sizes: list[tuple[int, Direction]] = []
    if args.only is None:
        sizes = [(i, one) for i, large in enumerate(LARGE) for one in DIRECTIONS if one == "decode" or large.pictures]
    rows: dict[tuple[str, Direction], Row] = {}
    failures: list[str] = []
    found: dict[tuple[int, Direction], Shares] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, initializer=quiet) as pool:
        jobs: dict[Any, Any] = {pool.submit(measure, *one): one for one in plan}
        jobs |= {pool.submit(measure_large, *one): one for one in sizes}
        for job in track(as_completed(jobs), total=len(jobs), description="measuring", console=console):
            one = jobs[job]
            try:
                result = job.result()
            except Exception as error:
                failures.append(f"{one}: {type(error).__name__}: {error}")
                console.print(f"[red]{failures[-1]}")
                continue
            if isinstance(result, Row):
                rows[one] = result
                failures += broken(result)
                text = f"{worst(result.fp32)} {worst(result.fp64)} {worst(result.replayed)}"
                console.print(f"{result.name}, {result.direction}: {text}", highlight=False)
            else:
                found[one] = result
    if rows:
        ordered = [rows[one] for one in plan if one in rows]
        args.output.write_text(page(ordered, [(LARGE[one[0]], one[1], found[one]) for one in sizes if one in found]))
    console.print(f"{args.output}, {time.perf_counter() - begun:.0f} seconds")
    if failures:
        console.print("Bounds broken:", *failures, sep="\n  ", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Compare what mode "auto" chooses with every grid that it could have chosen, and its predictions with measurements.

    python benchmarks/auto.py [--output docs/benchmarks/auto.md]

True-size models on seeded random weights, one thread per rank. In each case auto and every grid take turns; times are
medians. "4,096" is what a threshold of that many latent elements per rank would have chosen: the rows shared by all
ranks, or one rank. Predictions are of single items: a grid that the caller names decodes a batch at once, and auto
decodes its items one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from halovae import Grid, load
from halovae.distributed.ranks import Ranks
from halovae.models.architectures import random_vae
from halovae.report import DecodeReport

CONSTANT = 4096
# Family, latent rows and cols, latent frames, batch.
CASES = (
    ("qwen-image", 8, 1, 1), ("qwen-image", 16, 1, 1), ("qwen-image", 32, 1, 1), ("qwen-image", 48, 1, 1),
    ("qwen-image", 8, 1, 2), ("qwen-image", 16, 1, 2), ("qwen-image", 8, 1, 3), ("qwen-image", 16, 1, 3),
    ("qwen-image", 8, 1, 4), ("qwen-image", 16, 1, 4), ("qwen-image", 24, 1, 4), ("qwen-image", 32, 1, 4),
    ("wan2.1", 8, 1, 1), ("wan2.1", 8, 3, 1), ("wan2.1", 16, 3, 1), ("wan2.1", 8, 3, 2), ("wan2.1", 8, 3, 3),
    ("wan2.1", 8, 9, 1), ("wan2.1", 8, 3, 4),
    ("wan2.2-5b", 4, 1, 1), ("wan2.2-5b", 8, 1, 1), ("wan2.2-5b", 4, 1, 2), ("wan2.2-5b", 4, 1, 4),
    ("wan2.2-5b", 4, 3, 1), ("wan2.2-5b", 4, 9, 1),
)  # fmt: skip
HEAD = """| case | auto (s) | its grid | best (s) | by | auto / best | 1 rank (s) | auto / 1 rank | 4,096 / best |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
_held: dict[str, Any] = {}


@dataclass
class Way:
    """One way to decode, and what its decodes took."""

    name: str
    options: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    report: DecodeReport | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Result:
    """A case: its ways, auto first, and the grid that the constant would choose."""

    title: str
    ways: list[Way]
    constant: str

    @property
    def best(self) -> Way:
        return min(self.ways[1:], key=lambda way: way.median)

    @property
    def auto(self) -> Way:
        return self.ways[0]


def hold(folder: Path) -> None:
    """Load the model on each rank."""
    _held["decoder"] = load(folder)


def decode(latents: torch.Tensor, options: dict[str, Any]) -> tuple[float, DecodeReport]:
    """Decode once on each rank. Return the seconds until this rank is done, and the report of all ranks."""
    decoder = _held["decoder"]
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    stream = decoder.stream(latents, **options)
    stream.join()
    seconds = time.perf_counter() - begin
    return seconds, stream.shared_report()


def measure(ranks: Ranks, count: int, case: tuple[str, int, int, int], seconds: float, most: int) -> Result:
    """Let all ways take turns, at least three times, until auto has decoded for `seconds` or `most` times."""
    family, extent, frames, batch = case
    channels = 48 if family == "wan2.2-5b" else 16
    shape = (batch, channels, frames, extent, extent)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1234))
    auto = Way("auto", {"mode": "auto"})
    grids = [Grid(), Grid(rows=count), Grid(cols=count), *([Grid(batch=count)] if batch % count == 0 else [])]
    ways = [auto, *(Way(str(grid), {"grid": grid}) for grid in grids)]
    for way in ways:
        ranks.run(decode, latents, way.options)
    while len(auto.seconds) < 3 or (sum(auto.seconds) < seconds and len(auto.seconds) < most):
        for way in ways:
            results = ranks.run(decode, latents, way.options)
            way.seconds.append(max(result[0] for result in results))
            way.report = results[0][1]
    constant = str(Grid(rows=count)) if latents.numel() / count >= CONSTANT else str(Grid())
    return Result(f"{family}, {'x'.join(map(str, shape))}, {count} rank(s)", ways, constant)


def predictions(result: Result) -> list[tuple[Way, dict[str, Any]]]:
    """Return the ways that auto made a prediction for, each with the prediction."""
    auto = result.auto.report
    assert auto is not None
    assert auto.decision is not None
    chosen = auto.decision["chosen"]
    if auto.latents[0] > 1:
        return [(result.auto, chosen)]
    seen = {one["grid"]: one for one in (chosen, *auto.decision["others"]) if one["peak"] is not None}
    return [(way, seen[str(way.options.get("grid"))]) for way in result.ways[1:] if way.name in seen]


def single(result: Result) -> Way:
    """Return the way with one rank."""
    return next(way for way in result.ways if way.name == "1x1")


def over_constant(result: Result) -> float:
    """Return the time of what the constant would have chosen, over the best."""
    times = {way.name: way.median for way in result.ways}
    return times[result.constant] / result.best.median


def row(result: Result) -> str:
    """Return a row of the table."""
    auto, best, one_rank, fixed = result.auto, result.best, single(result), over_constant(result)
    report = auto.report
    assert report is not None
    figures = (
        result.title, f"{auto.median:.3f}", report.grid, f"{best.median:.3f}", best.name,
        f"{auto.median / best.median:.2f}", f"{one_rank.median:.3f}",
        f"{auto.median / one_rank.median:.2f}",
        f"{fixed:.2f} ({result.constant})",
    )  # fmt: skip
    return f"| {' | '.join(figures)} |"


def lines(results: list[Result]) -> Iterator[str]:
    """Yield the lines of the report."""
    yield HEAD
    yield from map(row, results)
    yield ""
    yield f"- {len(results)} cases"
    for name, ratios in (
        ("auto over the best", [one.auto.median / one.best.median for one in results]),
        ("auto over one rank", [one.auto.median / single(one).median for one in results]),
        ("4,096", [over_constant(one) for one in results]),
    ):
        yield f"- {name}: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}"
    times, peaks, exact = [], [], []
    for one in results:
        for way, predicted in predictions(one):
            report = way.report
            assert report is not None
            times.append(predicted["seconds"] / way.median)
            rank = max(report.ranks, key=lambda rank: rank.memory.peak_allocated)
            peaks.append(predicted["peak"] / rank.memory.peak_allocated)
            sent = {(rank.messages, rank.bytes_sent) for rank in report.ranks}
            exact.append((predicted["messages"], predicted["bytes_sent"]) in sent)
    off = [abs(ratio - 1) for ratio in times]
    yield (
        f"- predicted over measured time, {len(times)} plans: median {statistics.median(times):.3f}, "
        f"off by {statistics.median(off):.1%} in the median, {max(off):.1%} at most"
    )
    yield f"- predicted over measured peak: from {min(peaks):.3f} to {max(peaks):.3f}"
    yield f"- messages and bytes exact in {sum(exact)} of {len(exact)}"
    for batch in (3, 4):
        for one in results:
            if f", {batch}x" in one.title and "x1x" in one.title:
                yield f"- {one.title}: {single(one).median / one.auto.median:.2f}x one rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="approximate seconds of auto in each case")
    parser.add_argument("--most", type=int, default=15, help="the most rounds of a case")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    results = []
    console = Console(stderr=True)
    with console.status("") as status:
        for family in dict.fromkeys(case[0] for case in CASES):
            with TemporaryDirectory() as folder, Ranks(2) as ranks:
                random_vae(family).save_pretrained(folder)
                ranks.run(hold, Path(folder))
                for case in (case for case in CASES if case[0] == family):
                    status.update(str(case))
                    results.append(measure(ranks, 2, case, args.seconds, args.most))
                    console.print(row(results[-1]), soft_wrap=True, highlight=False)
    text = "\n".join(lines(results))
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""The results of a benchmark: rows, tables, conclusions computed from the figures, JSON, and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from halovae.runtime.simulate import SimulatedRank

COLUMNS = (
    "mode", "decoding time (s)", "peak memory (GB)", "peak allocated (GB)", "pool overhead (GB)",
    "remaining at peak (GB)",
)  # fmt: skip
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One mode at one size and batch. Memory is in bytes, of the rank that has the most of it, or the least left.

    Attributes:
        mode: "single", "parallel", "tiled", "auto" or "simulated".
        ranks: how many ranks decoded.
        grid: the grid of ranks; empty for diffusers.
        size: `WIDTHxHEIGHT` of the picture.
        frames: frames of the clip.
        batch: how many clips are decoded at once.
        seconds: median over the decodes; None if a decode ran out of memory.
        fastest, slowest: seconds of the fastest and of the slowest decode.
        decodes: how many were measured.
        peak_reserved, peak_allocated, pool_overhead, remaining: medians over the decodes; None if not measured.
        out_of_memory: bytes reserved when memory ran out (0 if the system killed the process); None if it did not.
        by_rank: what each simulated rank took; empty for other modes.
    """

    mode: str
    ranks: int
    grid: str
    size: str
    frames: int
    batch: int
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    decodes: int = 0
    peak_reserved: float | None = None
    peak_allocated: float | None = None
    pool_overhead: float | None = None
    remaining: float | None = None
    out_of_memory: int | None = None
    by_rank: tuple[SimulatedRank, ...] = ()

    @property
    def label(self) -> str:
        """The mode, and the number of ranks if there are several."""
        return f"{self.mode}, {self.ranks} ranks ({self.grid})" if self.ranks > 1 else self.mode

    @property
    def case(self) -> str:
        """What is decoded. Rows of one case are compared."""
        return f"{self.size}, {self.frames} frame{'s' * (self.frames > 1)}, batch {self.batch}"

    def cells(self) -> list[str]:
        """The table's cells, as in `COLUMNS`."""
        if self.seconds is None:
            reached = f"{self.out_of_memory / GB:.2f}" if self.out_of_memory else "?"
            return [self.label, "OOM", reached, "-", "-", "-"]
        time = f"{self.seconds:.2f}"
        if self.decodes > 1:
            time += f" ({self.fastest:.2f}-{self.slowest:.2f})"
        memory = (self.peak_reserved, self.peak_allocated, self.pool_overhead, self.remaining)
        return [self.label, time, *("-" if size is None else f"{size / GB:.2f}" for size in memory)]


def cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by case, in their order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return grouped


def conclusions(rows: Sequence[Row]) -> list[str]:
    """Sentences about each mode against "single" in the same case, in percent."""
    sentences = []
    for case, group in cases(rows).items():
        single = next((row for row in group if row.mode == "single"), None)
        for row in group:
            if row is single or row.mode == "simulated":
                continue
            if row.seconds is None:
                sentences.append(f"{case}: {row.label} ran out of memory")
            elif single is None or single.seconds is None:
                sentences.append(f"{case}: {row.label} decodes in {row.seconds:.2f} s; there is no figure for single")
            else:
                changes = [
                    f"{name} {100 * (now / before - 1):+.0f} %"
                    for name, now, before in (
                        ("decoding latency", row.seconds, single.seconds),
                        ("peak memory", row.peak_reserved, single.peak_reserved),
                        ("peak allocated", row.peak_allocated, single.peak_allocated),
                        ("memory left at the peak", row.remaining, single.remaining),
                    )
                    if now is not None and before
                ]
                sentences.append(f"{case}: {row.label} against single: {', '.join(changes)}")
    return sentences


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "mode" else "right")
    for case, group in cases(rows).items():
        if len(cases(rows)) > 1:
            shown.add_row(f"[bold]{case}[/]")
        for row in group:
            shown.add_row(*row.cells())
        shown.add_section()
    return shown


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str]) -> str:
    """The rows and the conclusions in Markdown."""
    lines = [f"# {title}", ""]
    for case, group in cases(rows).items():
        lines += [f"## {case}", "", *markdown_table(COLUMNS, [row.cells() for row in group]), ""]
    lines += [*(f"- {conclusion}" for conclusion in conclusions(rows)), "", *notes, ""]
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Rows and conclusions, for programs."""
    return json.dumps({**about, "rows": [asdict(row) for row in rows], "conclusions": conclusions(rows)}, indent=2)


def draw(rows: Sequence[Row], time: Path, memory: Path) -> None:
    """Draw bars of decode time and of peak memory, by mode and case, into one file each."""
    from matplotlib.figure import Figure

    grouped = cases(rows)
    labels = list(dict.fromkeys(row.label for row in rows))
    for path, unit, value in (
        (time, "decoding time (s)", lambda row: row.seconds or 0),
        (memory, "peak memory of a rank (GB)", lambda row: (row.peak_reserved or row.peak_allocated or 0) / GB),
    ):
        figure = Figure(figsize=(max(5.0, 1.2 * len(labels) * len(grouped)), 4), layout="constrained")
        axes, width = figure.subplots(), 0.8 / len(labels)
        for index, label in enumerate(labels):
            heights = [sum(value(row) for row in group if row.label == label) for group in grouped.values()]
            places = [case + (index - (len(labels) - 1) / 2) * width for case in range(len(grouped))]
            axes.bar_label(axes.bar(places, heights, width, label=label), fmt="%.2f", fontsize=7)
        axes.set_xticks(range(len(grouped)), list(grouped))
        axes.set_ylabel(unit)
        axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def draw_plans(curves: Mapping[str, Sequence[tuple[int, float, float]]], title: str, path: Path) -> None:
    """Draw predicted seconds, and peak GiB per rank, over numbers of ranks: `(ranks, seconds, GiB)` by case."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, column, unit in zip(figure.subplots(1, 2), (1, 2), ("time (s)", "peak per rank (GiB)"), strict=True):
        for name, points in curves.items():
            axes.plot([point[0] for point in points], [point[column] for point in points], "o-", label=name)
        ranks = sorted({point[0] for points in curves.values() for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{count}" for count in ranks])
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:.3g}")
        axes.set_xlabel("ranks")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_frontier(points: Sequence[tuple[str, float, float]], title: str, path: Path) -> None:
    """Draw predicted seconds over peak GiB of one device: `(way, seconds, GiB)`.

    Ways that no other way beats in both are labeled by how many strips they have.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes, labeled = figure.subplots(), set[tuple[float, float]]()
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, seconds, gib in points:
        count, _, kind = name.removeprefix("1x1 in ").partition(" ")
        kinds.setdefault(kind or "at once", []).append((gib, seconds))
        place = seconds, gib
        if not kind or place in labeled or any((s, g) != place and s <= seconds and g <= gib for _, s, g in points):
            continue
        labeled.add(place)
        axes.annotate(count, (gib, seconds), xytext=(0, 6), ha="center", textcoords="offset points", fontsize=7)
    for kind, places in kinds.items():
        color = "C0" if kind == "at once" else "C2" if "recomputing" in kind else "C1"
        axes.plot(
            *zip(*places, strict=True), "s" if "cols" in kind else "o", color=color, label=kind,
            fillstyle="none" if "host" in kind else "full",
        )  # fmt: skip
    axes.legend(fontsize=7)
    axes.set_xlabel("peak memory besides weights and the result (GiB)")
    axes.set_ylabel("time (s)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

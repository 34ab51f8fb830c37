"""The report of `accelerator.py`: Markdown, and plots where matplotlib is installed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Record = dict[str, Any]
HALOVAE, EAGER, COMPILED = "halovae", "diffusers", "diffusers, compiled, channels last"


def failures(results: Results) -> list[str]:
    """The cases that raised an error, but for want of memory, or whose result was not exact; stages that broke off."""
    found = []
    for stage, part in results["stages"].items():
        if part["ending"] and "limit" not in part["ending"]:
            found.append(f"{stage}: {part['ending']}")
        for record in part["records"]:
            if record.get("error", "") != "out of memory" and "error" in record and isinstance(record["error"], str):
                found.append(f"{stage}, {record['case']}: {record['error']}")
            elif record.get("exact") is False:
                errors = f"{record['error']:.1e}, the plain module {record['plain']:.1e}"
                found.append(f"{stage}, {record['case']}: {errors}")
    return found


def write(results: Results, folder: Path) -> None:
    """Write `report.md` and the plots.

    Args:
        results: the content of `results.json`.
        folder: where to.
    """
    device = results["device"]
    lines = [f"# {device['device']}", ""]
    if results["rehearsal"]:
        lines += ["**A rehearsal on the CPU with toys: its figures say nothing.**", ""]
    versions = ", ".join(f"{name} {value}" for name, value in device.items() if name != "device")
    lines += [f"{results['date']}, {versions}. Random weights; seconds are medians, memory in MiB.", ""]
    bad = failures(results)
    lines += [f"{len(bad)} failures:" if bad else "No failures.", "", *[f"- {one}" for one in bad], ""]
    plots = _plots(results, folder)
    for stage, part in results["stages"].items():
        lines += [f"## {stage}", "", f"{part['seconds']} s of at most {part['limit']:.0f}.", ""]
        lines += _SECTIONS[stage](part["records"])
        lines += [f"![{one.stem}]({one.name})\n" for one in plots if one.stem == stage]
        if part["left"]:
            lines += ["", f"Left out for want of time, {len(part['left'])} cases:", ""]
            lines += [f"- {case}" for case in part["left"]]
        lines.append("")
    (folder / "report.md").write_text("\n".join(lines))


def table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    rule = ["---"] * len(columns)
    return [f"| {' | '.join(row)} |" for row in (list(columns), rule, *rows)] + [""]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _failed(record: Record) -> bool:
    return isinstance(record.get("error"), str)


def _exactness(records: list[Record]) -> list[str]:
    """The largest error of each kind of call, and every case that was not exact."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if not _failed(record):
            groups[record["case"].split(", ", 1)[1]].append(record)
    rows = []
    for group, found in groups.items():
        worst = max(found, key=lambda one: one["error"])
        good = sum(one["exact"] for one in found)
        rows.append(
            [
                group,
                f"{good} of {len(found)}",
                f"{worst['error']:.1e}",
                f"{worst['plain']:.1e}",
                worst["case"].split(",")[0],
            ]
        )
    head = "Errors relative to fp64 on the CPU and to its largest value."
    return [head, "", *table(("calls", "exact", "worst", "plain module there", "of"), rows)]


def _anchors(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        if _failed(record):
            rows.append([*record["case"].split(": ", 1), record["error"], "", "", "", ""])
            continue
        eager = _seconds(records, record["anchor"], EAGER)
        times = "" if eager is None else f"{eager / record['seconds']:.2f}x"
        rows.append(
            [
                record["anchor"], record["how"], f"{record['seconds']:.4g} s", times, _mib(record["peak_reserved"]),
                _mib(record["peak_allocated"]), f"{record['first']:.1f} s",
            ]
        )  # fmt: skip
    published = {one["anchor"]: one["published"] for one in records if not _failed(one) and one["published"]}
    columns = ("decode, bf16", "by", "time", "of diffusers", "reserved", "allocated", "first call")
    return [*table(columns, rows), *[f"- {name}: published by others: {text}" for name, text in published.items()], ""]


def _seconds(records: list[Record], anchor: str, how: str) -> float | None:
    return next((one["seconds"] for one in records if one.get("anchor") == anchor and one.get("how") == how), None)


def _profile(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        lines += [f"### {record['case']}", ""]
        if _failed(record):
            lines += [record["error"], ""]
            continue
        rows = [
            [f"`{one['name'][:80]}`", str(one["calls"]), f"{one['ms']:.2f}", f"{one['share']:.1%}"]
            for one in record["operators"]
        ]
        lines += [
            f"{record['seconds']:.4g} s in all operators.",
            "",
            *table(("operator", "calls", "ms", "share"), rows),
        ]
    return lines


def _plain(records: list[Record]) -> list[str]:
    """Every case with its values."""
    rows = []
    for record in records:
        values = {key: value for key, value in record.items() if key not in ("case", "took")}
        rows.append([record["case"], ", ".join(f"{_value(value)} {key}" for key, value in values.items())])
    return table(("case", "found"), rows)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _memory(records: list[Record]) -> list[str]:
    rows = [
        [one["case"], one["error"], "", "", ""] if _failed(one)
        else [one["case"], _mib(one["predicted"]), _mib(one["measured"]), f"{one['off']:+.1%}", _mib(one["reserved"])]
        for one in records
    ]  # fmt: skip
    return table(("decode, bf16", "predicted", "allocated", "off by", "reserved"), rows)


_SECTIONS = {
    "exactness": _exactness, "anchors": _anchors, "profile": _profile, "rates": _plain, "memory": _memory,
    "grids": _plain, "kernels": _plain,
}  # fmt: skip


def _plots(results: Results, folder: Path) -> list[Path]:
    """Bars of the anchors' times, and of predicted and measured peaks; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for stage, label in (("anchors", "seconds"), ("memory", "MiB")):
        records = [one for one in results["stages"].get(stage, {}).get("records", []) if not _failed(one)]
        if not records:
            continue
        bars: dict[str, dict[str, float]] = defaultdict(dict)
        for one in records:
            if stage == "anchors":
                bars[one["how"]][one["anchor"]] = one["seconds"]
            else:
                for name in ("predicted", "measured"):
                    bars[name][one["case"]] = one[name] / 2**20
        places = list(dict.fromkeys(name for values in bars.values() for name in values))
        figure, axes = plt.subplots(figsize=(9, 1 + 0.6 * len(places)), layout="constrained")
        for index, (name, values) in enumerate(bars.items()):
            heights = [places.index(place) + 0.8 * index / len(bars) for place in values]
            axes.barh(heights, list(values.values()), height=0.8 / len(bars), label=name)
        axes.set_yticks(range(len(places)), places)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.legend()
        made.append(folder / f"{stage}.png")
        figure.savefig(made[-1], dpi=120)
        plt.close(figure)
    return made

"""What `bench` and `validate` share: parsed options, checked devices, and files that are never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from halovae.cli.common import console
from halovae.device.kinds import Device


def check_ranks(option: str, ranks: int, kind: str | None) -> Device:
    """Return the device of a kind, after checking that there are enough for `ranks` ranks. Too few cores only warn.

    Raises:
        ValueError: there is no such device here, or there are too few.
    """
    device = Device.default(kind)
    if ranks > device.count:
        if device.kind != "cpu":
            raise ValueError(f"{option} {ranks}: there are {device.count} {device.kind} devices here")
        console.print(f"[yellow]Warning:[/] {ranks} ranks share {device.count} cores: their times are not meaningful")
    return device


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse comma-separated numbers >= 1.

    Raises:
        ValueError: the text is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) >= 1 for word in words):
        raise ValueError("expected numbers >= 1, comma-separated, such as 1,2,4")
    return tuple(int(word) for word in words)


def free_names(folder: Path, *names: str) -> list[Path]:
    """Return unused paths in `folder`: with one suffix -2, -3, ... for all names if any of them is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [folder / name for name in names], 1
    while any(path.exists() for path in paths):
        number += 1
        paths = [folder / f"{Path(name).stem}-{number}{Path(name).suffix}" for name in names]
    return paths


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Show a bar on standard error. Yield `describe(text)`, for what is being done, and `on_step()`, for each step."""
    bar = Progress(
        SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)

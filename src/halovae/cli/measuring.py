"""What `bench` and `validate` share: options read, devices checked, files that are never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from halovae.cli.common import console
from halovae.device.kinds import Device


def check_ranks(option: str, ranks: int, kind: str | None) -> Device:
    """The device of a kind, once it is clear that there are enough of them for so many ranks.

    Raises:
        ValueError: the device is not here, or there are too few of it. Cores may be too few: that only warns.
    """
    device = Device.default(kind)
    if ranks > device.count:
        if device.kind != "cpu":
            raise ValueError(f"{option} {ranks}: there are {device.count} {device.kind} devices here")
        console.print(f"[yellow]Warning:[/] {ranks} ranks share {device.count} cores: their times say little")
    return device


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers >= 1 with commas between them.

    Raises:
        ValueError: anything else.
    """
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) >= 1 for part in parts):
        raise ValueError("expected numbers >= 1 with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)


def free_names(folder: Path, *names: str) -> list[Path]:
    """Paths in `folder` that no file has: all with the same suffix -2, -3, ... if any of the names is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [folder / name for name in names], 1
    while any(path.exists() for path in paths):
        number += 1
        paths = [folder / f"{Path(name).stem}-{number}{Path(name).suffix}" for name in names]
    return paths


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar on standard error: what to call with what is being done, and what after each step."""
    bar = Progress(
        SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)

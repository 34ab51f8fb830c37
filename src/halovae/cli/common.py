"""What subcommands share: option types, and errors shown as one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, NoReturn, TypeVar

import torch
import typer
from rich.console import Console

from halovae.distributed.launch import under_torchrun, use_interface
from halovae.distributed.transport import world_size
from halovae.errors import RankError
from halovae.grid import Grid

Parsed = TypeVar("Parsed")
MODEL_HELP = "A VAE: a folder in diffusers layout (the VAE's or a pipeline's), a single file, or a hub id."
# Progress and remarks go to standard error, so that standard output has only results.
console = Console(stderr=True)


class Mode(str, Enum):
    """How ranks share a decode."""

    auto = "auto"
    single = "single"
    parallel = "parallel"


class Dtype(str, Enum):
    """The dtype of computation."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def check_installed(purpose: str, *modules: str, extra: str = "diffusers,bench") -> None:
    """Check that the modules that `purpose` needs are installed.

    Raises:
        ValueError: some are not; the message names them, and what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{purpose} needs pip install 'halovae[{extra}]' (no module {', '.join(missing)})")


def degrees(ranks: int, sequence: int | None, ulysses: int | None, ring: int) -> tuple[int, int]:
    """Return over how many ranks attention is split by heads (Ulysses), and in a ring. None leaves a degree open.

    Raises:
        ValueError: their product is not the number of ranks that share the sequence, which is all ranks or one.
    """
    sequence = sequence or ranks
    if sequence not in (1, ranks):
        raise ValueError(f"--sp-degree {sequence}: expected {ranks} (the ranks) or 1")
    ulysses = ulysses or max(1, sequence // ring)
    if ulysses * ring != sequence:
        raise ValueError(f"--ulysses-degree {ulysses} x --ring-degree {ring}: expected a product of {sequence}")
    return ulysses, ring


def results_console() -> Console:
    """Return a console for standard output. If that is not a terminal, it is wide enough for tables of figures."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=max(shown.width, 180))


def fail(message: object, status: int) -> NoReturn:
    """Exit with a message on standard error. Under torchrun only the first rank of each host prints it."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) == "0":
        prefix = "" if rank == "0" else f"rank {rank}: "
        console.print(f"[bold red]Error:[/] {prefix}{_escaped(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Exit with 2 on bad input, 1 on a failed rank, 130 on Ctrl-C. Other errors are bugs and keep their trace."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(error, 2)
    except RankError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)


def parsed(option: str, text: str, parse: Callable[[str], Parsed]) -> Parsed:
    """Return `parse(text)`. The error for text that cannot be parsed names the option."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from error


def parse_size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` in pixels.

    Raises:
        ValueError: the text is something else.
    """
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError("expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(width), int(height)


def parse_bytes(text: str) -> int:
    """Parse a size of memory: `8GiB`, `512MiB`, `64KiB`, or a number of bytes.

    Raises:
        ValueError: the text is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]iB|B)?", text.strip())
    size = int(float(match[1]) * 1024 ** ("B", "KiB", "MiB", "GiB").index(match[2] or "B")) if match else 0
    if size < 1:
        raise ValueError("expected a size such as 8GiB, 512MiB or a number of bytes")
    return size


def _use_interface(name: str | None) -> str | None:
    if name is not None:
        with errors_shown():
            parsed("--interface", name, use_interface)
    return name


# The option takes effect when it is parsed: no command does anything about it.
Interface = Annotated[
    str | None,
    typer.Option(
        help="Network interface that ranks of several hosts share under torchrun, such as eth1.",
        show_default="what GLOO_SOCKET_IFNAME and the like name",
        callback=_use_interface,
    ),
]


NumGpus = Annotated[
    int | None, typer.Option(min=1, help="Number of GPUs, one rank each.", show_default="as many as --grid has")
]
SharedBy = Annotated[
    Mode,
    typer.Option(help="auto: the grid predicted to be fastest. single: one rank. parallel: all share the rows."),
]
GridText = Annotated[str | None, typer.Option(help="Ranks as ROWSxCOLS or BATCHxROWSxCOLS, instead of --mode.")]


def ranks_of(num_gpus: int | None, mode: Mode, grid: str | None) -> tuple[int, Grid | None]:
    """Return how many ranks there are, and the grid that the user chose.

    Raises:
        ValueError: the grid is none, or has another number of ranks.
    """
    chosen = Grid.parse(grid) if grid is not None else None
    ranks = num_gpus or (world_size() if under_torchrun() else chosen.size if chosen else 1)
    if mode is Mode.parallel:
        chosen = chosen or Grid(rows=ranks)
    if chosen is not None and chosen.size != ranks:
        raise ValueError(f"--grid {chosen} needs {chosen.size} ranks, but --num-gpus is {ranks}")
    return ranks, chosen


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")

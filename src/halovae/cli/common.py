"""What subcommands share: option types, and errors shown as one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from typing import NoReturn, TypeVar

import torch
import typer
from rich.console import Console

from halovae.errors import RankError

Parsed = TypeVar("Parsed")
MODEL_HELP = "A VAE: a folder in diffusers layout (its own or a pipeline's), a single file, or a hub id."
# Progress and remarks go to standard error, so that standard output holds results alone.
console = Console(stderr=True)


class Mode(str, Enum):
    """How ranks share a decode."""

    auto = "auto"
    single = "single"
    parallel = "parallel"


class Dtype(str, Enum):
    """What the decoder computes in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def check_installed(purpose: str, *modules: str, extra: str = "diffusers,bench") -> None:
    """Check that what `purpose` needs is there.

    Raises:
        ValueError: names what is missing, and what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{purpose} needs pip install 'halovae[{extra}]' (no module {', '.join(missing)})")


def degrees(ranks: int, sequence: int | None, ulysses: int | None, ring: int) -> tuple[int, int]:
    """Over how many ranks attention is shared by heads and in turns, where options may leave that open.

    Raises:
        ValueError: they do not multiply to what shares the sequence, which is all ranks or one.
    """
    sequence = sequence or ranks
    if sequence not in (1, ranks):
        raise ValueError(f"--sp-degree {sequence}: expected {ranks} (the ranks) or 1")
    ulysses = ulysses or max(1, sequence // ring)
    if ulysses * ring != sequence:
        raise ValueError(f"--ulysses-degree {ulysses} x --ring-degree {ring}: expected a product of {sequence}")
    return ulysses, ring


def results_console() -> Console:
    """Standard output, wide enough for tables of figures where it is no terminal."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=max(shown.width, 180))


def fail(message: object, status: int) -> NoReturn:
    """End with a message on standard error; under torchrun each host's first rank speaks for the others there."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) == "0":
        speaker = "" if rank == "0" else f"rank {rank}: "
        console.print(f"[bold red]Error:[/] {speaker}{_escaped(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Bad input ends with status 2, a failed rank with 1, Ctrl-C with 130; the rest are bugs and keep their trace."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(error, 2)
    except RankError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)


def parsed(option: str, text: str, parse: Callable[[str], Parsed]) -> Parsed:
    """`parse(text)`, with the option named if it cannot be parsed."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from error


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` in pixels.

    Raises:
        ValueError: anything else.
    """
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError("expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(width), int(height)


def parse_bytes(text: str) -> int:
    """A size of memory: `8GiB`, `512MiB`, `64KiB`, or a number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]iB|B)?", text.strip())
    size = int(float(found[1]) * 1024 ** ("B", "KiB", "MiB", "GiB").index(found[2] or "B")) if found else 0
    if size < 1:
        raise ValueError("expected a size such as 8GiB, 512MiB or a number of bytes")
    return size


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")

"""Reports of decodes: seconds, memory, and messages of each rank, and what was decoded and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from halovae.device.memory import Memory

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RankReport:
    """What one rank took.

    Attributes:
        rank: the rank's number.
        seconds: from the start of its first chunk to the end of its last, without the caller's time in between.
        waiting: how many of these it waited for halos, and for keys and values of other ranks.
        messages: how many messages it sent, including frames to be gathered.
        bytes_sent: the bytes of these messages.
        memory: the rank's peaks.
    """

    rank: int
    seconds: float
    waiting: float
    messages: int
    bytes_sent: int
    memory: Memory


@dataclass(frozen=True)
class DecodeReport:
    """What a decode took.

    Attributes:
        family: the model's family, or the class of its VAE.
        latents: the shape of the latents, `[B, C, T, H, W]` or `[B, C, H, W]`.
        frames: the shape of the decoded frames, `[B, 3, T', H', W']`.
        dtype: the dtype of computation.
        device: the kind of device.
        grid: ranks along rows x cols, or along batch x rows x cols.
        first_use: whether this shape had not been decoded this way before, so that its graph was recorded first.
        compiled: whether passes over memory were compiled, on the CPU.
        decision: why the grid was chosen, from `Decision.as_dict`; None if the caller chose it.
        fell_back: which grid was given up when memory ran out; empty if none was.
        ranks: a report per rank, in order; only this rank's if it has not asked the others.
    """

    family: str
    latents: tuple[int, ...]
    frames: tuple[int, ...]
    dtype: str
    device: str
    grid: str
    first_use: bool
    compiled: bool
    decision: dict[str, Any] | None
    fell_back: str
    ranks: tuple[RankReport, ...]

    @property
    def seconds(self) -> float:
        """The slowest rank's seconds."""
        return max(rank.seconds for rank in self.ranks)

    @property
    def memory(self) -> Memory:
        """The highest peaks of any rank, and the least memory that any had left."""
        return Memory.over([rank.memory for rank in self.ranks])

    def as_dict(self) -> dict[str, Any]:
        """All fields, and seconds and memory over all ranks, as JSON can hold them."""
        return {**asdict(self), "seconds": self.seconds, "memory": asdict(self.memory)}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def table(self) -> Table:
        """A table with a row per rank, for a terminal."""
        from rich.table import Table

        title = f"{self.family} {'x'.join(map(str, self.latents))} on {self.grid} ({self.device}, {self.dtype})"
        table = Table(title=title, title_justify="left")
        table.add_column("rank", justify="right")
        for column in (
            "decoding (s)", "waiting (s)", "messages", "sent (MiB)", "peak memory (MiB)", "peak allocated (MiB)",
            "pool overhead (MiB)", "remaining (MiB)",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for one in self.ranks:
            memory = one.memory
            sizes = (memory.peak_reserved, memory.peak_allocated, memory.pool_overhead, memory.remaining)
            table.add_row(
                str(one.rank), f"{one.seconds:.2f}", f"{one.waiting:.2f}", str(one.messages),
                f"{one.bytes_sent / 2**20:,.1f}", *(f"{size / 2**20:,.0f}" for size in sizes),
            )  # fmt: skip
        return table

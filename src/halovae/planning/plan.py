"""Plans: which ranks share which latents, how many latent frames go at once, how deep halos are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from halovae.geometry import Grid, Span

Chunk = int | Literal["all"]


@dataclass(frozen=True)
class Stage:
    """Some of a batch's latents, and how ranks share them: the first `grid.size` of the world do, others are idle."""

    items: Span
    grid: Grid


@dataclass(frozen=True)
class Plan:
    """How a batch of latents is decoded.

    Attributes:
        stages: one after the other for each chunk; together they hold each latent once, in order.
        chunk: how many latent frames go through the decoder at once, after the first one; "all" for the rest in one.
        depths: halo depth of each block by its name, the default under "".
        bands: how many bands each rank cuts its rows into, to decode them one after the other; 1 for no bands. With
            them nobody yields frames before the last band is done.
        apart: whether every rank decodes all by itself, so that nobody has to send it frames.
    """

    stages: tuple[Stage, ...]
    chunk: Chunk = 1
    depths: Mapping[str, int] = field(default_factory=lambda: {"": 1})
    bands: int = 1
    apart: bool = False

    @classmethod
    def of(
        cls,
        batch: int,
        grid: Grid,
        chunk: Chunk = 1,
        depths: Mapping[str, int] | None = None,
        bands: int = 1,
        apart: bool = False,
    ) -> Plan:
        """All of a batch at once on one grid."""
        return cls((Stage(Span(0, batch), grid),), chunk, depths or {"": 1}, bands, apart)

    @property
    def grid(self) -> str:
        """The grids of the stages, for people."""
        if len(self.stages) == 1:
            return str(self.stages[0].grid)
        return " then ".join(f"{stage.items.size} on {stage.grid}" for stage in self.stages)

    def __str__(self) -> str:
        named = [f"{block} {depth}" for block, depth in self.depths.items() if block and depth != self.depths[""]]
        if self.bands > 1:
            return f"{self.grid}, chunk {self.chunk}, {self.bands} bands"
        return f"{self.grid}, chunk {self.chunk}, halo depth {', '.join([str(self.depths['']), *named])}"

    def chunks(self, length: int) -> list[Span]:
        """The latent frames of each pass: the first one alone, the last pass with what is left."""
        step = max(1, length - 1) if self.chunk == "all" else self.chunk
        return [Span(0, 1), *(Span(start, min(start + step, length)) for start in range(1, length, step))]

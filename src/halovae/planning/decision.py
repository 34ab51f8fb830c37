"""Decisions: which grid is the fastest that fits into memory, and why the others were not chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halovae.grid import Grid
from halovae.plane.strip_program import InStrips

# What a decode may take beyond its tensors (scratch of libraries, an allocator's unused memory), as a share of them.
MARGIN = 0.15
# A more complex grid must be predicted to be faster by this share: predictions are not more precise.
WORTH = 0.02


@dataclass(frozen=True)
class Candidate:
    """A grid, and what it is predicted to take.

    Attributes:
        grid: how ranks share the batch and the plane.
        seconds: seconds until the last rank is done; a lower bound if the grid was ruled out without tracing.
        peak: bytes of live tensors of the rank with the most to do, without weights; None if it was not traced.
        messages: how many messages that rank sends; None if it was not traced.
        bytes_sent: the bytes of these messages; None if it was not traced.
        verdict: why it was chosen, or not.
        strips: how a rank that has all rows and cols computes them; None for at once.
    """

    grid: Grid
    seconds: float
    peak: int | None = None
    messages: int | None = None
    bytes_sent: int | None = None
    verdict: str = ""
    strips: InStrips | None = None

    @property
    def name(self) -> str:
        """The grid, and the strips, if there are any."""
        return str(self.grid) if self.strips is None else f"{self.grid} in {self.strips}"

    def fits(self, budget: int | None) -> bool:
        """Whether the peak and a margin are within `budget` bytes."""
        return budget is None or (self.peak is not None and self.peak * (1 + MARGIN) <= budget)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        strips = None if self.strips is None else str(self.strips)
        return {**asdict(self), "grid": str(self.grid), "ranks": self.grid.size, "strips": strips}


@dataclass(frozen=True)
class Decision:
    """The chosen grid, and the others.

    Attributes:
        candidates: the chosen one first, the others by their time.
        budget: bytes that a rank may take; None for no limit.
        calibration: the calibration that the times come from.
    """

    candidates: tuple[Candidate, ...]
    budget: int | None
    calibration: str

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    def stands(self, budget: int) -> bool:
        """Whether the decision would be the same within another budget."""
        faster = (one for one in self.candidates if one.seconds < self.chosen.seconds and not one.fits(self.budget))
        return self.chosen.fits(budget) and not any(one.fits(budget) for one in faster)

    def leaner(self) -> Candidate | None:
        """Return the grid to fall back on when memory runs out; None if no grid takes less.

        It is the fastest one that takes at most half of the chosen grid's peak, else the one that takes the least.
        """
        peak = self.chosen.peak or 0
        others = [one for one in self.candidates[1:] if one.peak is not None and one.peak < peak]
        lean = [one for one in others if (one.peak or 0) <= 0.5 * peak]
        if lean:
            return min(lean, key=lambda one: one.seconds)
        return min(others, key=lambda one: one.peak or 0) if others else None

    def as_dict(self) -> dict[str, Any]:
        """The chosen candidate, the others, the budget, and the calibration as JSON can hold them."""
        return {
            "chosen": self.chosen.as_dict(),
            "others": [one.as_dict() for one in self.candidates[1:]],
            "budget": self.budget,
            "calibration": self.calibration,
        }

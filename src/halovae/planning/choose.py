"""The decision: which plan is the fastest that fits into memory, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from halovae.geometry import Grid, Span
from halovae.loop import Gather
from halovae.models.wan import WanConfig
from halovae.planning.calibration import Calibration
from halovae.planning.cost import EXCHANGE, Work, walk
from halovae.planning.plan import Chunk, Plan, Stage

# What a decode may take beyond its tensors (scratch of libraries, an allocator's unused parts), as a share of them.
MARGIN = 0.15
CHUNKS = (1, 2, 4, 8, 16)
DEPTHS = (2, 3, 6)
# A more involved plan must be predicted to be faster by this much: predictions are not better.
WORTH = 0.02


class TooLittleMemory(ValueError):
    """No plan fits into the memory budget."""


@dataclass(frozen=True)
class Question:
    """What is to be decoded, and with what.

    Attributes:
        config: the model's sizes.
        shape: of the latents, `[B, C, T, H, W]`.
        dtype: what is computed in.
        world: how many ranks there are.
        budget: bytes that a rank may take above the resting process; None for any number.
        gather: as for `Decoder.stream`; likewise `out_dtype`, its `dtype`.
        compiled: whether kernels are compiled.
        device: the kind whose way through the layers is taken.
        hosts: whether the ranks are on several hosts.
        chunk: the only one to consider; None for any. Likewise `depths`.
    """

    config: WanConfig
    shape: tuple[int, ...]
    dtype: torch.dtype
    world: int
    budget: int | None = None
    gather: Gather = "rank0"
    out_dtype: torch.dtype | None = None
    compiled: bool = False
    device: str = "cpu"
    hosts: bool = False
    chunk: Chunk | None = None
    depths: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Candidate:
    """A plan, and what it is predicted to take.

    Attributes:
        plan: how to decode.
        ranks: how many of them compute.
        seconds: until the last rank is done. Of one that was `ruled_out` unseen, what it takes at least.
        peak: bytes of live tensors of the rank with the most to do, weights aside; likewise its `messages` and
            `bytes_sent`. None of one that was ruled out unseen.
        verdict: why it was chosen, or not.
    """

    plan: Plan
    ranks: int
    seconds: float
    peak: int | None = None
    messages: int | None = None
    bytes_sent: int | None = None
    verdict: str = ""

    def fits(self, budget: int | None) -> bool:
        """Whether it stays within so many bytes."""
        return budget is None or (self.peak is not None and self.peak * (1 + MARGIN) <= budget)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {**asdict(self), "plan": str(self.plan)}


@dataclass(frozen=True)
class Decision:
    """The plan that was chosen, and those that were not.

    Attributes:
        candidates: the chosen one first, the others by their time.
        budget: bytes that a rank may take; None for any number.
        calibration: whose rates the times are from.
    """

    candidates: tuple[Candidate, ...]
    budget: int | None
    calibration: str

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    def stands(self, budget: int) -> bool:
        """Whether it would be the same within another budget."""
        faster = (one for one in self.candidates if one.seconds < self.chosen.seconds and not one.fits(self.budget))
        return self.chosen.fits(budget) and not any(one.fits(budget) for one in faster)

    def leaner(self) -> list[Plan]:
        """What to fall back on when memory runs out: the fastest plan that takes at most half of the chosen one's, else
        the one that takes the least; none if no plan takes less.
        """
        peak = self.chosen.peak or 0
        others = [one for one in self.candidates[1:] if one.peak is not None and one.peak < peak]
        lean = [one for one in others if (one.peak or 0) <= 0.5 * peak]
        if lean:
            return [min(lean, key=lambda one: one.seconds).plan]
        return [min(others, key=lambda one: one.peak or 0).plan] if others else []

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "chosen": self.chosen.as_dict(),
            "others": [one.as_dict() for one in self.candidates[1:]],
            "budget": self.budget,
            "calibration": self.calibration,
        }


def layouts(batch: int, world: int, height: int, width: int) -> list[tuple[Stage, ...]]:
    """All ways to lay a batch of latents of `height` x `width` cells out over up to `world` ranks.

    All at once on one grid; items one after the other where a rank has several; and whole items first, as many as
    there are ranks, then what is left of the batch on a grid of its own.
    """
    found: dict[tuple[Stage, ...], None] = {}
    for grid in _grids(batch, world, height, width):
        found[(Stage(Span(0, batch), grid),)] = None
        if batch > grid.batch and batch % grid.batch == 0:
            found[_in_turn(0, batch, grid)] = None
    left = batch % world
    if world > 1 and batch > world and left:
        for grid in _grids(left, world, height, width):
            if left % grid.batch == 0:
                whole = batch - left
                for first in {(Stage(Span(0, whole), Grid(batch=world)),), _in_turn(0, whole, Grid(batch=world))}:
                    found[(*first, *_in_turn(whole, batch, grid))] = None
    return list(found)


def _grids(batch: int, world: int, height: int, width: int) -> Iterator[Grid]:
    for items in range(1, min(batch, world) + 1):
        for rows in range(1, min(height, world // items) + 1):
            for cols in range(1, min(width, world // (items * rows)) + 1):
                yield Grid(items, rows, cols)


def _in_turn(start: int, stop: int, grid: Grid) -> tuple[Stage, ...]:
    return tuple(Stage(Span(first, first + grid.batch), grid) for first in range(start, stop, grid.batch))


class _Chooser:
    def __init__(self, question: Question, calibration: Calibration) -> None:
        self._ask, self._calibration = question, calibration
        self.seen: dict[str, Candidate] = {}
        self.by_block: dict[str, dict[str, float]] = {}
        self.exchanging: dict[str, float] = {}

    def price(self, plan: Plan) -> Candidate:
        """What a plan takes, walked once."""
        name = str(plan)
        if name not in self.seen:
            ask = self._ask
            ranks = max(stage.grid.size for stage in plan.stages)
            plan = replace(plan, apart=ask.world == 1 or (ranks == 1 and ask.gather == "all"))
            cost = walk(
                ask.config, ask.shape, ask.dtype, plan, gather=ask.gather, out_dtype=ask.out_dtype,
                compiled=ask.compiled, device=torch.device(ask.device),
            )  # fmt: skip
            layers = self._calibration.seconds(cost, ranks, ask.hosts)
            self.by_block[name] = _blocks(layers)
            line = self._calibration.lines(ask.hosts)[EXCHANGE]
            self.exchanging[name] = line.seconds(cost.kinds().get(EXCHANGE, Work()))
            self.seen[name] = Candidate(plan, ranks, sum(layers.values()), cost.peak, cost.messages, cost.bytes_sent)
        return self.seen[name]

    def best(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The fastest that fits; among those about as fast, the one with the fewest ranks, messages and frames held."""
        fitting = [one for one in candidates if one.fits(self._ask.budget)]
        if not fitting:
            return None
        limit = min(one.seconds for one in fitting) * (1 + WORTH)
        return min((one for one in fitting if one.seconds <= limit), key=_plainness)

    def decide(self) -> Decision:
        ask = self._ask
        batch, _, length, height, width = ask.shape
        chunk, depths = ask.chunk or 1, ask.depths or {"": 1}
        alone = self.price(Plan.of(batch, Grid(), chunk, depths))
        possible = layouts(batch, ask.world, height, width)
        if ask.gather == "none":  # a rank's own frames are of one shard
            possible = [stages for stages in possible if len(stages) == 1]
        floors = sorted(((self._floor(stages, alone.seconds), stages) for stages in possible), key=lambda one: one[0])
        unseen = []
        best: Candidate | None = alone if alone.fits(ask.budget) else None
        for floor, stages in floors:
            plan = Plan(stages, chunk, depths)
            if str(plan) in self.seen:
                continue
            if best is not None and floor > best.seconds * (1 + WORTH):
                unseen.append(Candidate(plan, max(stage.grid.size for stage in stages), floor))
                continue
            best = self.best([*self.seen.values(), self.price(plan)])
        if best is None:
            best = self._in_bands()
            return self._decision(best, unseen)
        for near in sorted(self.seen.values(), key=lambda one: one.seconds)[:2]:
            for chunk in (chunk for chunk in CHUNKS if 1 < chunk < length and ask.chunk is None):
                # One that is slower may be followed by one that is faster: convolutions change their ways with size.
                if not self.price(replace(near.plan, chunk=chunk)).fits(ask.budget):
                    break  # still larger ones take more
        best = self.best(list(self.seen.values()))
        assert best is not None
        # Deeper halos can save no more than what exchanges take.
        if ask.depths is None and self.exchanging[str(best.plan)] > WORTH * best.seconds:
            self._deepen(best)
            best = self.best(list(self.seen.values()))
            assert best is not None
        return self._decision(best, unseen)

    def _in_bands(self) -> Candidate:
        """The leanest layout with as few bands as fit.

        Raises:
            TooLittleMemory: however many there are, they take more than there is.
        """
        leanest = min(self.seen.values(), key=lambda one: one.peak or 0)
        rows = min(self._ask.shape[3] // stage.grid.rows for stage in leanest.plan.stages)  # of the smallest shard
        bands, peak = 2, math.inf
        while bands <= rows:
            banded = self.price(replace(leanest.plan, depths={"": 1}, bands=bands))
            if banded.fits(self._ask.budget):
                return banded
            if banded.peak is None or banded.peak >= peak:
                break  # what all bands hold, and the rows that they share, are most of it by now
            bands, peak = 2 * bands, banded.peak
        raise self._too_little()

    def _decision(self, best: Candidate, unseen: Sequence[Candidate]) -> Decision:
        ask = self._ask
        others = sorted([*self.seen.values(), *unseen], key=lambda one: one.seconds)
        ranked = [best, *(one for one in others if one is not best)]
        calibration = f"{self._calibration.name} ({self._calibration.origin})"
        return Decision(tuple(self._judged(one, best) for one in ranked), ask.budget, calibration)

    def _floor(self, stages: Sequence[Stage], alone: float) -> float:
        """What a layout takes at least: the largest shards' share of what one rank takes for all."""
        batch, _, _, height, width = self._ask.shape
        shares = []
        for stage in stages:
            shards = stage.grid.shards(stage.items.size, height, width)
            shares.append(max(shard.batch.size * shard.rows.size * shard.cols.size for shard in shards))
        return alone * sum(shares) / (batch * height * width)

    def _deepen(self, best: Candidate) -> None:
        """Price halos that are deeper in the blocks where that is predicted to pay."""
        blocks = self._ask.config.blocks
        times = {1: self.by_block[str(best.plan)]}
        for depth in DEPTHS:
            plan = replace(best.plan, depths={"": depth})
            self.price(plan)
            times[depth] = self.by_block[str(plan)]
        depths = {block: min(times, key=lambda depth: times[depth].get(block, 0.0)) for block in blocks}
        if set(depths.values()) != {1}:
            self.price(replace(best.plan, depths={"": 1, **{b: d for b, d in depths.items() if d > 1}}))

    def _judged(self, one: Candidate, best: Candidate) -> Candidate:
        budget = self._ask.budget
        if one is best:
            verdict = "chosen: the fastest that fits" if budget is not None else "chosen: the fastest"
            if any(other.seconds < best.seconds and other.fits(budget) for other in self.seen.values()):
                verdict = f"chosen: plainer than those that are up to {WORTH:.0%} faster"
        elif one.peak is None:
            verdict = f"not looked at: its largest shard alone takes {one.seconds / best.seconds:.2f}x the time"
        elif not one.fits(budget):
            verdict = "does not fit into the memory budget"
        elif one.seconds > best.seconds:
            verdict = f"{one.seconds / best.seconds:.2f}x the time"
        else:
            verdict = f"{one.seconds / best.seconds:.2f}x the time, but less plain"
        return replace(one, verdict=verdict)

    def _too_little(self) -> TooLittleMemory:
        ask = self._ask
        least = min(self.seen.values(), key=lambda one: one.peak or 0)
        need = (least.peak or 0) * (1 + MARGIN)
        assert ask.budget is not None
        batch, channels, length, height, width = ask.shape
        said = f"the leanest plan ({least.plan}) takes {_mib(need)} on a rank"
        advice = []
        for world in (2, 4, 8, 16, 32, 64):
            if not ask.world < world <= height:
                continue
            if self._peak(ask.shape, Grid(rows=world)) * (1 + MARGIN) <= ask.budget:
                advice.append(f"{world} ranks")
                break
        for shrink in (0.75, 0.5, 0.25, 0.125):
            rows, cols = max(1, int(height * shrink)), max(1, int(width * shrink))
            grid = Grid(rows=min(ask.world, rows))
            small = (batch, channels, length, rows, cols)
            if self._peak(small, grid) * (1 + MARGIN) <= ask.budget:
                factor = ask.config.spatial_factor
                advice.append(f"pictures of {cols * factor}x{rows * factor}")
                break
        would = f"; what would fit: {' or '.join(advice)}" if advice else ""
        return TooLittleMemory(
            f"latents {list(ask.shape)} do not fit into a memory budget of {_mib(ask.budget)}: {said}{would}"
        )

    def _peak(self, shape: Sequence[int], grid: Grid) -> int:
        ask = self._ask
        plan, device = Plan.of(shape[0], grid), torch.device(ask.device)
        return walk(ask.config, shape, ask.dtype, plan, compiled=ask.compiled, device=device).peak


def _plainness(one: Candidate) -> tuple[float, ...]:
    plan = one.plan
    held = plan.chunk if isinstance(plan.chunk, int) else math.inf
    cols = max(stage.grid.cols for stage in plan.stages)  # their borders are not in one piece of memory
    return (one.ranks, len(plan.stages), max(plan.depths.values()), held, cols, one.seconds)


def _blocks(layers: dict[str, float]) -> dict[str, float]:
    """Seconds by block, as `WanConfig.blocks` names them."""
    found: dict[str, float] = {}
    for layer, seconds in layers.items():
        parts = layer.split(".")
        name = {"mid_block": "mid", "up_blocks": f"up{parts[2]}" if len(parts) > 2 else ""}.get(
            parts[1] if len(parts) > 1 else "", parts[-1]
        )
        found[name] = found.get(name, 0) + seconds
    return found


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def choose(question: Question, calibration: Calibration) -> Decision:
    """Choose the fastest plan that fits.

    Raises:
        TooLittleMemory: none fits; says what the leanest takes, and what would fit.
    """
    return _Chooser(question, calibration).decide()

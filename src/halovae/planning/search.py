"""The search for the fastest grid of ranks, by prices of recorded graphs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from halovae.errors import MemoryBudgetError, UnplannableError
from halovae.grid import Grid
from halovae.plane.layout import MeshDim
from halovae.plane.strip_program import InStrips
from halovae.plane.strips import NarrowStripError
from halovae.planning.calibration import Calibration
from halovae.planning.cost import EXCHANGE, GATHER, Cost
from halovae.planning.decision import MARGIN, WORTH, Candidate, Decision
from halovae.planning.graphs import Traced, cells, traced

_LITTLE = f"more complex, and at most {WORTH:.0%} faster"
_ADVISED = (2, 4, 8, 16, 32, 64)
_MOST_STRIPS = 64  # each of the first ones and the last ones is recorded, and more save little
_SHRUNK = (0.75, 0.5, 0.25, 0.125)


class Search:
    """Prices the grids of one decode or encode, and decides between them.

    Items of a batch are decoded one after the other, or shared by whole items. Pictures stay on the ranks that
    decode them.

    Args:
        function: decodes latents to pictures, or encodes pictures.
        module: the module whose parameters `function` uses; meta tensors will do.
        shape: the shape of one item of the input, plane last.
        dtype: the dtype of the input.
        calibration: the rates that price the work.
        batch: how many items there are.
        budget: bytes that a rank may take besides weights; None for no limit. It is an attribute that may change.
        hosts: whether the ranks are on several hosts.
        allowed: whether a grid is a candidate; None allows all.
        multiple: bounds between ranks are multiples of it, as in `trace`.
        computing: how many ranks compute at once on a grid of one rank: all of them if each needs the result.
        compiled: whether a CPU's passes over memory are compiled.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], module: nn.Module, shape: Sequence[int], dtype: torch.dtype,
        calibration: Calibration, batch: int = 1, budget: int | None = None, hosts: bool = False,
        allowed: Callable[[Grid], bool] | None = None, multiple: int = 1, computing: int = 1,
        compiled: bool = True,
    ) -> None:  # fmt: skip
        self._function, self._module, self._shape, self._dtype = function, module, tuple(shape), dtype
        self._plane, self._multiple = cells(shape, multiple), multiple
        self._concurrent_ranks, self._compiled = computing, compiled
        self._calibration, self._batch, self.budget, self._hosts = calibration, batch, budget, hosts
        self._allowed = allowed
        self._traced: dict[Grid, Traced] = {}
        self._computing: dict[Grid, float] = {}  # seconds for one item, without messages
        self._in_strips: dict[InStrips, Traced] = {}
        self.strips_wait = False  # whether strips that were priced wait for each other, so that they could recompute

    def traced(self, grid: Grid) -> Traced:
        """Return what the rank with the most to do takes for one item. Each grid is traced once.

        Raises:
            UnplannableError: the decode cannot be traced.
        """
        plane = replace(grid, batch=1)
        if plane not in self._traced:
            found = traced(
                self._function, self._module, self._shape, self._dtype, plane, multiple=self._multiple,
                compiled=self._compiled, kind="cpu" if self._calibration.device == "cpu" else "meta",
            )  # fmt: skip
            computed = {key: work for key, work in found.cost.work.items() if key[1] not in (EXCHANGE, GATHER)}
            seconds = self._seconds(replace(found.cost, work=computed), plane)
            self._traced[plane], self._computing[plane] = found, seconds
        return self._traced[plane]

    def price(self, grid: Grid) -> Candidate:
        """Return a grid as a candidate, with what it is predicted to take."""
        found, items = self.traced(grid), -(-self._batch // grid.batch)
        cost = found.cost
        return Candidate(
            grid, items * self._seconds(cost, grid), cost.peak, items * cost.messages, items * cost.bytes_sent
        )

    def price_strips(self, strips: InStrips) -> Candidate:
        """Return strips on one rank as a candidate, with what they are predicted to take.

        Raises:
            NarrowStripError: there are too few rows or cols for them.
            UnplannableError: the decode cannot be traced.
        """
        asked = replace(strips, host=False)
        if asked not in self._in_strips:
            self._in_strips[asked] = traced(
                self._function, self._module, self._shape, self._dtype, Grid(), multiple=self._multiple,
                compiled=self._compiled, kind="cpu" if self._calibration.device == "cpu" else "meta", strips=asked,
            )  # fmt: skip
        found = self._in_strips[asked]
        assert found.strips is not None
        self.strips_wait = self.strips_wait or found.waits
        seconds, peak = self._seconds(found.cost, Grid()), found.cost.peak
        if strips.host:
            seconds, peak = seconds + self._calibration.host.seconds(*found.moved), peak - found.left
        way = replace(found.strips, host=strips.host)
        return Candidate(Grid(), self._batch * seconds, peak, 0, 0, strips=way)

    def strips(self) -> list[Candidate]:
        """Return strips of the longer side on one rank, up to as many as fit, or as make sense.

        If none fits, strips that compute maps again are added, and on an accelerator strips whose lines wait on the
        host.
        """
        found = self._strips()
        if not found or found[-1].fits(self.budget):
            return found
        if self.strips_wait:
            again = self._strips(recompute=True)
            if again and _least(again) < _least(found):
                found += again
        if self.has_host and not found[-1].fits(self.budget):
            found += self._strips(recompute=found[-1].strips.recompute, host=True)  # type: ignore[union-attr]
        return found

    @property
    def has_host(self) -> bool:
        """Whether the device has memory of its own, so that lines can wait in the host's."""
        return self._calibration.device not in ("cpu", "mps")

    def _strips(self, recompute: bool = False, host: bool = False) -> list[Candidate]:
        height, width = self._shape[-2:]
        mesh_dim: MeshDim = "rows" if height >= width else "cols"
        found: list[Candidate] = []
        count, limit = 2, min(max(height, width), _MOST_STRIPS) + 1
        while True:
            try:
                one = self.price_strips(InStrips(count, mesh_dim, recompute, host))
            except UnplannableError:
                return found
            except NarrowStripError:
                limit = count
            else:
                if found and one.strips == found[-1].strips:  # equal strips need more than these, if there are more
                    if count >= 2 * one.strips.count:  # type: ignore[union-attr]
                        return found
                    count = 2 * one.strips.count  # type: ignore[union-attr]
                    continue
                found.append(one)
                if found[-1].fits(self.budget) or (len(found) > 1 and found[-1].peak >= 0.98 * found[-2].peak):  # type: ignore[operator]
                    return found
            last = found[-1].strips.count if found else 1  # type: ignore[union-attr]
            count = self._next_count(found) if limit > 2 * last else (last + limit) // 2
            count = min(count, (last + limit) // 2 if limit <= 2 * last else limit - 1)
            if count <= last:
                return found

    def _next_count(self, found: Sequence[Candidate]) -> int:
        """Return how many strips to try next: as many as fit if the peak is a constant and a share of each strip."""
        (*_, last) = found
        assert last.strips is not None
        count = last.strips.count
        if len(found) < 2 or self.budget is None:
            return 2 * count
        before = found[-2]
        assert before.strips is not None
        shared = ((before.peak or 0) - (last.peak or 0)) / (1 / before.strips.count - 1 / count)
        left = self.budget / (1 + MARGIN) - ((last.peak or 0) - shared / count)
        return min(max(count + 1, math.ceil(shared / left)), 3 * count) if left > 0 else 2 * count

    def _seconds(self, cost: Cost, grid: Grid) -> float:
        ranks = grid.size if grid.size > 1 else self._concurrent_ranks
        return sum(self._calibration.seconds(cost, ranks, self._hosts).values())

    def decide(self, world: int) -> Decision:
        """Decide for the fastest grid of up to `world` ranks that fits.

        Raises:
            MemoryBudgetError: no grid fits; the message says what the leanest takes, and how many ranks would do.
            UnplannableError: the decode cannot be traced.
        """
        single = self.price(Grid())
        seen: dict[Grid, Candidate] = {Grid(): single}
        unseen: list[Candidate] = []
        best = single if single.fits(self.budget) else None
        for grid in sorted(self._grids(world), key=lambda one: (self._share(one), *_complexity(one))):
            if grid in seen:
                continue
            floor = self._floor(grid)
            if best is not None and self._cannot_win(floor, grid, best):
                unseen.append(Candidate(grid, floor))
                continue
            seen[grid] = self.price(grid)
            best = self._best(list(seen.values()))
        tried = list(seen.values())
        if best is None and world == 1:
            tried += self.strips()
            best = self._best(tried)
        if best is None:
            raise self._too_little(tried, world)
        others = sorted([*tried, *unseen], key=lambda one: one.seconds)
        ranked = [best, *(one for one in others if one is not best)]
        calibration = f"{self._calibration.name} ({self._calibration.origin})"
        return Decision(tuple(self._judged(one, best, tried) for one in ranked), self.budget, calibration)

    def _grids(self, world: int) -> Iterator[Grid]:
        height, width = self._plane
        for items in range(1, min(self._batch, world) + 1):
            for rows in range(1, min(height, world // items) + 1):
                for cols in range(1, min(width, world // (items * rows)) + 1):
                    grid = Grid(items, rows, cols)
                    if self._allowed is None or self._allowed(grid):
                        yield grid

    def _share(self, grid: Grid) -> float:
        """Return the share of an item's cells in the largest shard, times the items of a rank."""
        height, width = self._plane
        return -(-self._batch // grid.batch) * _cells(grid, height, width) / (height * width)

    def _floor(self, grid: Grid) -> float:
        """Return the least seconds that a grid can take.

        Work that all ranks repeat does not shrink with the shard. Traced grids of smaller shards show how much it is.
        """
        items, share = -(-self._batch // grid.batch), self._share(replace(grid, batch=1)) / self._batch
        single = self._computing[Grid()]
        floors = [share * single]
        for other, seconds in self._computing.items():
            finer = self._share(other) / self._batch
            if other.rows >= grid.rows and other.cols >= grid.cols and finer < share:
                floors.append(seconds + (single - seconds) * (share - finer) / (1 - finer))
        return items * max(floors)

    def _cannot_win(self, floor: float, grid: Grid, best: Candidate) -> bool:
        if floor > best.seconds * (1 + WORTH):
            return True
        return floor * (1 + WORTH) >= best.seconds and _complexity(best.grid) < _complexity(grid)

    def _best(self, candidates: Sequence[Candidate]) -> Candidate | None:
        fitting = [one for one in candidates if one.fits(self.budget)]
        if not fitting:
            return None
        limit = min(one.seconds for one in fitting) * (1 + WORTH)
        return min(
            (one for one in fitting if one.seconds <= limit), key=lambda one: (*_complexity(one.grid), one.seconds)
        )

    def _judged(self, one: Candidate, best: Candidate, seen: Iterable[Candidate]) -> Candidate:
        ratio = one.seconds / best.seconds
        if one is best:
            verdict = "chosen: the fastest that fits" if self.budget is not None else "chosen: the fastest"
            if any(other.seconds < best.seconds and other.fits(self.budget) for other in seen):
                verdict = f"chosen: simpler than grids that are up to {WORTH:.0%} faster"
        elif one.peak is None:
            slower = ratio > 1 + WORTH
            verdict = f"not traced: {f'at least {ratio:.2f}x the time' if slower else _LITTLE}"
        elif not one.fits(self.budget):
            verdict = "does not fit into the memory budget"
        else:
            verdict = f"{ratio:.2f}x the time" + (", but more complex" if ratio <= 1 else "")
        if one.peak is not None and one.grid.size > 1 and (names := self.traced(one.grid).fallbacks):
            verdict += f"; {', '.join(names)} {'runs' if len(names) == 1 else 'run'} replicated"
        return replace(one, verdict=verdict)

    def _too_little(self, seen: Sequence[Candidate], world: int) -> MemoryBudgetError:
        assert self.budget is not None
        least = min(seen, key=lambda one: one.peak or 0)
        message = f"the leanest way ({least.name}) takes {_mib((least.peak or 0) * (1 + MARGIN))} on a rank"
        for ranks in _ADVISED:
            if world < ranks <= self._plane[0] and self.price(Grid(rows=ranks)).fits(self.budget):
                message += f"; what would fit: {ranks} ranks"
                break
        size = self._smaller(world)
        if size is not None:
            message += f"{' or' if 'what would fit' in message else '; what would fit:'} pictures of {size}"
        return MemoryBudgetError(
            f"tensors of shape {list(self._shape)} do not fit into a memory budget of {_mib(self.budget)}: {message}"
        )

    def _smaller(self, world: int) -> str | None:
        """Return a size of pictures that would fit, WIDTHxHEIGHT in pixels; None if none of a few sizes does."""
        for share in _SHRUNK:
            other = copy.copy(self)
            other._plane = rows, cols = max(1, int(share * self._plane[0])), max(1, int(share * self._plane[1]))
            unit = self._shape[-1] // self._plane[1]
            other._shape = (*self._shape[:-2], unit * rows, unit * cols)
            other._traced, other._computing, other._in_strips = {}, {}, {}
            try:
                if other.price(Grid(rows=min(world, rows))).fits(self.budget):
                    height, width = max(other._shape[-2:], other.traced(Grid()).pictures[-2:])  # the input, of encodes
                    return f"{width}x{height}"
            except (UnplannableError, RuntimeError):  # the model does not take every size
                return None
        return None


def _least(candidates: Sequence[Candidate]) -> int:
    return min(one.peak or 0 for one in candidates)


def _cells(grid: Grid, height: int, width: int) -> int:
    return -(-height // grid.rows) * -(-width // grid.cols)


def _complexity(grid: Grid) -> tuple[int, int]:
    return grid.size, grid.cols  # borders between cols are not contiguous in memory


def _mib(amount: float) -> str:
    return f"{amount / 2**20:,.0f} MiB"

"""Programs of strips: one device runs them one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from halovae.distributed.mesh import Mesh
from halovae.distributed.sequence import in_sequence
from halovae.distributed.transport import Transport
from halovae.errors import TraceError
from halovae.grid import Grid
from halovae.kernels.native import EAGER, Kernels
from halovae.plane import group_norms, operators, whole_maps
from halovae.plane.agreement import agree, digests, messages
from halovae.plane.collected import where_collected
from halovae.plane.layout import Factor, MeshDim, replicated, shape, sole
from halovae.plane.live import peak, size_of
from halovae.plane.passes.graphs import writes
from halovae.plane.program import Program
from halovae.plane.strips import NarrowStripError, Strips, waits, where_whole


@dataclass(frozen=True)
class InStrips:
    """How many strips there are, and what is cut.

    Attributes:
        count: the number of strips, 2 or more.
        mesh_dim: rows or cols.
        recompute: whether strips compute maps again that they would otherwise keep while they wait for each other;
            see `recompute`.
        host: whether what strips leave for later ones waits in the host's memory. It is for accelerators.
    """

    count: int
    mesh_dim: MeshDim
    recompute: bool = False
    host: bool = False

    def __str__(self) -> str:
        more = (", recomputing maps" if self.recompute else "") + (", lines on the host" if self.host else "")
        return f"{self.count} strips of {self.mesh_dim}{more}"

    @property
    def grid(self) -> Grid:
        """The grid whose ranks the strips are."""
        return Grid(rows=self.count) if self.mesh_dim == "rows" else Grid(cols=self.count)

    @property
    def dim(self) -> int:
        """The dim of a map that is cut."""
        return -2 if self.mesh_dim == "rows" else -1


# Maps of strips leave more gaps in memory than those of a decode at once: 4 % of Wan2.1 1x16x3x60x104 in 8 strips.
_GAPS = 1.06
# What comes before an operator that needs all rows is computed at once: always, or while maps are at most this share of
# the largest one. The way with the lower peak is taken.
_SMALL = (1.0, 1 / 8)
_PARTS = (operators.fetch, group_norms.gather, whole_maps.hand)  # by which strips share work
Record = Callable[[Mesh, Strips, "Sequence[str] | None"], Program]  # with some passes, or None for all


class StripProgram(Program):
    """The programs of all strips. It has the interface of one rank's program that returns its result at once.

    Attributes:
        lines: the most bytes that strips leave for later ones.

    Args:
        strips: how many there are.
        programs: of the first strips, of those between, and of the last ones.
        shared: which of them is that of the strips between.
    """

    def __init__(self, strips: InStrips, programs: list[Program], shared: int) -> None:
        first, *_ = programs
        self.strips, self.programs, self.shared = strips, programs, shared
        self.lines = 0
        self.chunked, self.streams = None, False
        self.takes, self.returns = replicated(shape(first.takes)), replicated(shape(first.returns))
        self.dtype, self.random = first.dtype, first.random
        self.writes = any(one.writes for one in programs)
        self.changes, self.coordinates = first.changes, {}
        self.fallbacks, self.gathered = first.fallbacks, first.gathered
        self.received, self.computed = first.received, first.computed

    def of(self, strip: int) -> Program:
        """The program of a strip."""
        return self.programs[max(min(strip, self.shared), strip - self.strips.count + len(self.programs))]

    @property
    def graphs(self) -> Iterator[tuple[Program, int]]:
        """The different programs, each with the number of strips that run it."""
        more = self.strips.count - len(self.programs)
        for index, program in enumerate(self.programs):
            yield program, 1 + (more if index == self.shared else 0)

    def __call__(
        self, local: Tensor, mesh: Mesh, *extras: Tensor, kernels: Kernels = EAGER,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run all strips; see `Program`. `convert` is applied to what each makes, before it is joined to the rest."""
        whole: list[Tensor] = []

        def run(own: Mesh) -> None:
            program, place = self.of(own.rank), own.rank
            takes, returns = (sole(layout[self.strips.dim]) for layout in (program.takes, program.returns))
            part = local if takes is None else _part(local, self.strips.dim, takes, place)
            part = part if takes is None and not program.writes else part.clone()
            for start, chunk in program.chunks(part, own, *extras, kernels=kernels):
                if returns is None and place < self.strips.count - 1:
                    continue  # the last strip has the result
                chunk = chunk if convert is None else convert(chunk)
                if not whole:
                    whole.append(chunk.new_empty(shape(self.returns)))
                target = whole[0] if returns is None else _part(whole[0], self.strips.dim, returns, place)
                if program.streams and program.chunked is not None:
                    target = target.narrow(program.chunked, start, chunk.shape[program.chunked])
                target.copy_(chunk)
                del chunk

        in_sequence(self.strips.grid, local.device, run, self.strips.host)
        return whole[0]

    def chunks(
        self, local: Tensor, mesh: Mesh, *extras: Tensor, kernels: Kernels = EAGER,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        """Yield the result, which is one chunk: its frames are whole after the last strip."""
        yield 0, self(local, mesh, *extras, kernels=kernels, convert=convert)

    @property
    def starts(self) -> tuple[int, ...]:
        """None: the result comes at once."""
        return ()

    def nodes(self) -> Iterator[fx.Node]:
        """The operators of all strips."""
        for program, times in self.graphs:
            for _ in range(times):
                yield from program.nodes()

    @cached_property
    def peak(self) -> int:
        """Peak bytes of live tensors: of the strip that takes most, and what strips leave for others."""
        return self.together([peak(one.graph, one.bodies) for one in self.programs])

    def together(self, peaks: list[int]) -> int:
        """Return the peak bytes of all strips, given those of each program."""
        waiting = [peak(one.graph, one.bodies, before=waits) for one in self.programs]
        # While one strip runs, the others wait.
        running = max(int(_GAPS * own) - least for own, least in zip(peaks, waiting, strict=True))
        everyone = sum(times * least for (_, times), least in zip(self.graphs, waiting, strict=True))
        # Strips that wait hold their parts of the input until they end. A part may be copied: it is not contiguous.
        inputs = [(times, size_of(next(iter(one.graph.nodes)))) for one, times in self.graphs]
        held = sum(times * own for times, own in inputs) if self.waits else max(own for _, own in inputs)
        return running + everyone + held + (0 if self.strips.host else self.left)

    @property
    def left(self) -> int:
        """Bytes that wait for later strips: lines, and maps that the first strip computed for all."""
        return self.lines + self._kept

    @property
    def _kept(self) -> int:
        return sum(node.meta["bytes"] for node in self.programs[0].nodes() if node.target is whole_maps.hand)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that go to the host and come from there if what waits is on the host, and the number of copies."""
        lines = sum(times * one.bytes_sent for one, times in self.graphs)
        copies = 2 * sum(times * one.messages for one, times in self.graphs)
        return 2 * lines + self.strips.count * self._kept, copies

    @property
    def waits(self) -> bool:
        """Whether a strip waits for later ones."""
        return any(waits(node) for one in self.programs for node in one.nodes())


def _part(x: Tensor, dim: int, factor: Factor, place: int) -> Tensor:
    start, stop = factor.bounds[place : place + 2]
    return x.narrow(dim, start, stop - start)


def record_strips(record: Record, device: torch.device, size: int, strips: InStrips) -> StripProgram:
    """Record the programs of strips.

    Args:
        record: records the program of the strip that a mesh is for.
        device: where they will run.
        size: the input's extent along the dim that is cut.
        strips: how many there are at most. There are fewer if equal strips of whole cells of the input are.

    Raises:
        NarrowStripError: there are too few rows (or cols) for them, or the function cannot be cut into strips.
        TraceError: the function cannot be recorded.
    """

    def of(place: int, layout: Strips, passes: tuple[str, ...] | None = None) -> Program:
        count = len(layout.bounds) - 1
        grid = InStrips(count, layout.mesh_dim).grid
        try:
            return record(Mesh(grid, device, _alone(place, count)), layout, passes)
        except (TraceError, NarrowStripError):
            raise
        except (RuntimeError, ValueError, IndexError, ArithmeticError, AssertionError) as error:  # of few rows, or none
            raise NarrowStripError(f"strip {place} of {count} cannot be recorded: {error}") from error

    probe = of(0, Strips(strips.mesh_dim, (0, size - 1, size)), ())
    if probe.random:
        raise NarrowStripError("the function draws random numbers, and each strip would draw others")
    if collected := where_collected(probe):
        layout = Strips(strips.mesh_dim, (0, size - 1, size), collected=collected)
        with suppress(NarrowStripError):
            layout = replace(_skewed(of(0, layout, ()), strips, size), collected=collected)
            return _recorded(of, probe, strips, layout, device)
    found: list[StripProgram] = []
    refusal: NarrowStripError | None = None
    starts = {last: whole for whole, last in (where_whole(probe, share) for share in reversed(_SMALL))}
    for last, whole in starts.items():
        for laid_out in (_skewed, _layout):
            try:
                found.append(_recorded(of, probe, strips, laid_out(probe, strips, size, whole, last), device))
                break
            except NarrowStripError as error:
                refusal = refusal or error
    if not found:
        assert refusal is not None
        raise refusal
    return min(found, key=lambda one: one.peak)


def _recorded(
    of: Callable[..., Program], probe: Program, strips: InStrips, layout: Strips, device: torch.device
) -> StripProgram:
    if any(map(writes, (probe.graph, *probe.bodies.values()))) and layout.whole:
        raise NarrowStripError("the function writes in place, and strips read copies of whole maps")
    strips = replace(strips, count=len(layout.bounds) - 1)
    if layout.collected and any(map(writes, (probe.graph, *probe.bodies.values()))):
        raise NarrowStripError("the function writes in place, and not all strips compute its end")
    programs, shared = _of_all(of, layout, strips.count)
    if any(not _same_lines(one, programs[shared]) for one in programs):  # borders are padded by their own operators
        programs, shared = _of_all(of, replace(layout, early=False), strips.count)
    if layout.whole and not any(node.target in _PARTS for node in programs[0].nodes()):
        raise NarrowStripError("every strip would compute all of this function")
    if layout.collected and sole(programs[0].returns[strips.dim]) is not None:
        raise NarrowStripError("strips return parts of a result that depends on what the last strip collects")
    found = StripProgram(strips, programs, shared)
    if layout.empty and found.waits:
        raise NarrowStripError("strips of this function wait for each other, so each needs rows")
    found.lines = _agreed(found, device)
    return found


def _of_all(of: Callable[[int, Strips], Program], layout: Strips, count: int) -> tuple[list[Program], int]:
    """Record the programs of all strips.

    Returns:
        The programs, and which of them is that of all strips between the first ones and the last ones.
    """
    first, last = [of(0, layout)], list[Program]()
    for place in range(1, count):
        one = of(place, layout)
        if place > 1 and _alike(first[-1], one):
            break
        first.append(one)
    for place in range(count - 1, len(first), -1):
        one = of(place, layout)
        if _alike(first[-1], one):
            break
        last.insert(0, one)
    shared = len(first) - 1
    if count > len(first) + len(last) and not _is_even(first[-1], range(shared, count - len(last))):
        return [of(place, layout) for place in range(count)], count - 1
    return [*first, *last], shared


def _is_even(program: Program, places: range) -> bool:
    """Whether these strips own equal numbers of rows of all maps, and none of constants that differ between rows."""
    about = next(reversed(program.graph.nodes)).meta
    return not about["placed"] and all(
        len({bounds[place + 1] - bounds[place] for place in places}) == 1 for bounds in about["cuts"]
    )


def _same_lines(one: Program, other: Program) -> bool:
    """Whether the lines of two strips are rows of the same maps."""
    lines = [[node.meta for node in each.nodes() if node.target is operators.fetch] for each in (one, other)]
    return len(lines[0]) == len(lines[1]) and all(
        a.get("module") == b.get("module") and (a.get("of") == b.get("of") or "" in (a.get("of"), b.get("of")))
        for a, b in zip(*lines, strict=True)
    )


def _agreed(program: StripProgram, device: torch.device) -> int:
    """Check that strips leave what later ones read. Return the most bytes that wait for later strips at a time.

    Raises:
        NarrowStripError: they do not.
    """
    count = program.strips.count
    meshes = [Mesh(program.strips.grid, device, _alone(place, count)) for place in range(count)]
    everyone = [messages(program.of(place), mesh) for place, mesh in enumerate(meshes)]
    if not agree([digests(one) for one in everyone]):
        raise NarrowStripError("strips of this function do not agree on their borders")
    kept = Counter(node.args[1] for node in program.of(0).nodes() if node.target is whole_maps.hand)
    for one in program.programs[1:]:
        read = Counter(node.args[3] for node in one.nodes() if node.target is whole_maps.handed)
        if any(read[site] > kept[site] for site in read):
            raise NarrowStripError("strips of this function read whole maps that the first one does not keep")
    later = [(place, peer, sent) for place, own in enumerate(everyone) for peer, sent, _ in own if peer > place]
    waiting = (sum(sent for place, peer, sent in later if place <= at < peer) for at in range(count))
    return max(sum(sent for _, sent, _ in everyone[0]) if program.waits else 0, *waiting)


def _alone(place: int, count: int) -> Transport:
    found = Transport()
    found.rank, found.world = place, count
    return found


def _lag(probe: Program, strips: InStrips, size: int) -> tuple[int, int]:
    """Return how far the result's bounds lag behind the input's, in cells of the input, and its cells for one."""
    returns = sole(probe.returns[strips.dim])
    for node in probe.nodes():  # what the last strip collects
        if node.meta.get("collects"):
            _, _, mesh_dim, bounds, _ = node.args
            returns = Factor(bounds[-1], mesh_dim, bounds)  # type: ignore[index, arg-type]
    if returns is None:
        raise NarrowStripError("the function's result cannot be cut into strips")
    lag = max(0, -(-((size - 1) * returns.size - returns.bounds[1] * size) // returns.size))
    return lag, max(1, size // returns.size)


def _skewed(
    probe: Program, strips: InStrips, size: int, whole: frozenset[str] = frozenset(), last: frozenset[str] = frozenset()
) -> Strips:
    """Choose bounds of equal strips: the first ones have no rows of the last maps, the last ones none of the first."""
    lag, unit = _lag(probe, strips, size)
    step = unit * -(-(size + lag) // (unit * strips.count))
    count = -(-(size + lag) // step)
    if count < 2:
        raise NarrowStripError(f"{strips} of an input of {size}: expected one or more {strips.mesh_dim} in each")
    bounds = (0, *(min(step * strip, size) for strip in range(1, count)), size)
    return Strips(
        strips.mesh_dim, bounds, tuple(sorted(whole)), tuple(sorted(last)), recompute=strips.recompute, empty=True
    )


def _layout(probe: Program, strips: InStrips, size: int, whole: frozenset[str], last: frozenset[str]) -> Strips:
    """Choose bounds with which each strip has rows of every map, so that it can wait for others."""
    lag, _ = _lag(probe, strips, size)
    step = min(-(-size // strips.count), (size - 1 - lag) // (strips.count - 1))
    if step < 1:
        raise NarrowStripError(
            f"{strips}: strips lag up to {lag} {strips.mesh_dim} behind the input, which has {size}: expected fewer"
        )
    # What is left over is shared by the first strip and the last. (The first has most of the small maps anyway.)
    more = max(0, min((size - strips.count * step - lag // 2) // 2, size - 1 - lag - (strips.count - 1) * step))
    starts = (0, *(lag + more + step * strip for strip in range(1, strips.count)), size)
    return Strips(strips.mesh_dim, starts, tuple(sorted(whole)), tuple(sorted(last)), recompute=strips.recompute)


def _alike(one: Program, other: Program) -> bool:
    """Whether two programs are equal but for the place of their strip, which operators know when they run."""
    graphs = [(program.graph, *program.bodies.values()) for program in (one, other)]
    if [len(graph.nodes) for graph in graphs[0]] != [len(graph.nodes) for graph in graphs[1]]:
        return False
    return all(
        (a.op, a.target, a.meta.get("shape")) == (b.op, b.target, b.meta.get("shape"))
        and _plain(a) == _plain(b)
        and (a.op != "get_attr" or _is_equal(one._attributes[str(a.target)], other._attributes[str(a.target)]))
        for mine, theirs in zip(*graphs, strict=True)
        for a, b in zip(mine.nodes, theirs.nodes, strict=True)
    )


def _plain(node: fx.Node) -> Any:
    return str(fx.node.map_arg((node.args, node.kwargs), lambda one: one.name))


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or constants of equal values: each strip has its own part of a mask."""
    return one is other or (one.shape == other.shape and not one.is_meta and torch.equal(one, other))

"""Programs of strips: one device runs them one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from halovae.distributed.mesh import Mesh
from halovae.distributed.sequence import in_sequence
from halovae.distributed.transport import Transport
from halovae.grid import Grid
from halovae.kernels.native import EAGER, Kernels
from halovae.plane import group_norms, operators, whole_maps
from halovae.plane.agreement import message_digests
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
    """

    count: int
    mesh_dim: MeshDim
    recompute: bool = False

    def __str__(self) -> str:
        return f"{self.count} strips of {self.mesh_dim}{', recomputing maps' if self.recompute else ''}"

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

    Args:
        strips: how many there are.
        programs: of the first strip, of those between, and of the last; or of each.
    """

    def __init__(self, strips: InStrips, programs: list[Program]) -> None:
        first, *_ = programs
        self.strips, self.programs = strips, programs
        self.chunked, self.streams = None, False
        self.takes, self.returns = replicated(shape(first.takes)), replicated(shape(first.returns))
        self.dtype, self.random = first.dtype, first.random
        self.writes = any(one.writes for one in programs)
        self.changes, self.coordinates = first.changes, {}
        self.fallbacks, self.gathered = first.fallbacks, first.gathered
        self.received, self.computed = first.received, first.computed

    def of(self, strip: int) -> Program:
        """The program of a strip."""
        if len(self.programs) == self.strips.count:
            return self.programs[strip]
        return self.programs[1 if 0 < strip < self.strips.count - 1 else min(strip, 2)]

    @property
    def graphs(self) -> Iterator[tuple[Program, int]]:
        """The different programs, each with the number of strips that run it."""
        between = self.strips.count - 2 if len(self.programs) < self.strips.count else 1
        for index, program in enumerate(self.programs):
            yield program, between if index == 1 else 1

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
                chunk = chunk if convert is None else convert(chunk)
                if not whole:
                    whole.append(chunk.new_empty(shape(self.returns)))
                target = whole[0] if returns is None else _part(whole[0], self.strips.dim, returns, place)
                if program.streams and program.chunked is not None:
                    target = target.narrow(program.chunked, start, chunk.shape[program.chunked])
                target.copy_(chunk)
                del chunk

        in_sequence(self.strips.grid, local.device, run)
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
        kept = sum(node.meta["bytes"] for node in self.programs[0].nodes() if node.target is whole_maps.hand)
        lines = max(one.bytes_sent for one in self.programs)
        waiting = [peak(one.graph, one.bodies, before=waits) for one in self.programs]
        # While one strip runs, the others wait.
        running = max(int(_GAPS * own) - least for own, least in zip(peaks, waiting, strict=True))
        everyone = sum(times * least for (_, times), least in zip(self.graphs, waiting, strict=True))
        # Each strip holds its part of the input until it ends.
        inputs = sum(times * size_of(next(iter(one.graph.nodes))) for one, times in self.graphs)
        return running + everyone + kept + lines + (inputs if self.waits else 0)

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
        strips: how many there are.

    Raises:
        NarrowStripError: there are too few rows (or cols) for them, or the function cannot be cut into strips.
        TraceError: the function cannot be recorded.
    """
    if size < strips.count:
        raise NarrowStripError(f"{strips} of an input of {size}: expected one or more in each")

    def of(place: int, layout: Strips, passes: tuple[str, ...] | None = None) -> Program:
        count = len(layout.bounds) - 1
        grid = InStrips(count, layout.mesh_dim).grid
        return record(Mesh(grid, device, _alone(place, count)), layout, passes)

    probe = of(0, Strips(strips.mesh_dim, (0, size - 1, size)), ())
    if probe.random:
        raise NarrowStripError("the function draws random numbers, and each strip would draw others")
    found: dict[Any, StripProgram] = {}
    refusal: NarrowStripError | None = None
    for ahead in dict.fromkeys(where_whole(probe, share) for share in _SMALL):
        try:
            found[ahead] = _recorded(of, probe, strips, size, *ahead)
            _check_agreement(found[ahead], device)
        except NarrowStripError as error:
            found.pop(ahead, None)
            refusal = refusal or error
    if not found:
        assert refusal is not None
        raise refusal
    return min(found.values(), key=lambda one: one.peak)


def _recorded(
    of: Callable[..., Program], probe: Program, strips: InStrips, size: int, whole: frozenset[str],
    last: frozenset[str],
) -> StripProgram:  # fmt: skip
    if any(map(writes, (probe.graph, *probe.bodies.values()))) and whole:
        raise NarrowStripError("the function writes in place, and strips read copies of whole maps")
    layout = _layout(probe, strips, size, whole, last)
    programs = _of_all(of, layout, strips.count)
    if any(_lines(one) != _lines(programs[0]) for one in programs):  # borders are padded by their own operators
        programs = _of_all(of, replace(layout, early=False), strips.count)
    if whole and not any(node.target in _PARTS for node in programs[0].nodes()):
        raise NarrowStripError("every strip would compute all of this function")
    return StripProgram(strips, programs)


def _of_all(of: Callable[[int, Strips], Program], layout: Strips, count: int) -> list[Program]:
    """Record the programs of all strips. Those between the first and the last share one, if they are alike."""
    places = [0, 1, count - 2, count - 1] if count > 3 else list(range(count))
    found = [of(place, layout) for place in places]
    if count > 4 and _alike(*found[1:3]):
        return [found[0], found[1], found[3]]
    return [*found[:2], *(of(place, layout) for place in range(2, count - 2)), *found[2:]]


def _lines(program: Program) -> list[Any]:
    """What the lines of a strip are rows of. They must be of the same maps in all strips."""
    fetches: list[Any] = [node for node in program.nodes() if node.target is operators.fetch]
    return [(node.meta.get("module"), node.args[0].op, node.args[0].target, node.args[1]) for node in fetches]


def _check_agreement(program: StripProgram, device: torch.device) -> None:
    """Check that strips leave what later ones read.

    Raises:
        NarrowStripError: they do not.
    """
    count = program.strips.count
    digests = {}
    for place in sorted({0, 1, 2, count - 2, count - 1} & set(range(count))):
        mesh = Mesh(program.strips.grid, device, _alone(place, count))
        digests[place] = message_digests(program.of(place), mesh)
    nothing = ("", "")
    for place, own in digests.items():
        later = digests.get(place + 1)
        if later is not None and own.get(place + 1, nothing)[0] != later.get(place, nothing)[1]:
            raise NarrowStripError(f"strips {place} and {place + 1} of this function do not agree on their borders")
    kept = Counter(node.args[1] for node in program.of(0).nodes() if node.target is whole_maps.hand)
    for place in range(1, len(program.programs)):
        read = Counter(node.args[3] for node in program.programs[place].nodes() if node.target is whole_maps.handed)
        if any(read[site] > kept[site] for site in read):
            raise NarrowStripError("strips of this function read whole maps that the first one does not keep")


def _alone(place: int, count: int) -> Transport:
    found = Transport()
    found.rank, found.world = place, count
    return found


def _layout(probe: Program, strips: InStrips, size: int, whole: frozenset[str], last: frozenset[str]) -> Strips:
    """Choose bounds: all strips make about as much of the result."""
    returns = sole(probe.returns[strips.dim])
    if returns is None:
        raise NarrowStripError("the function's result cannot be cut into strips")
    lag = max(0, -(-((size - 1) * returns.size - returns.bounds[1] * size) // returns.size))  # in cells of the input
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

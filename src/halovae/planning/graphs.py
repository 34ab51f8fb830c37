"""Plans for any autoencoder: a rank's traced graph is the cost model's input.

The decode of the rank with the most to do is traced on meta tensors for every grid that could win. A calibration
prices the operators of the graph.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Scope, Transport
from halovae.errors import TraceError, UnplannableError
from halovae.grid import Grid
from halovae.kernels.native import EAGER
from halovae.plane import context, group_norms, operators, whole_maps, windows
from halovae.plane.agreement import argument_key, meta_arguments
from halovae.plane.flops import flops
from halovae.plane.layout import shape as shape_of
from halovae.plane.live import is_operator, peak, shares, size, size_of
from halovae.plane.program import Program
from halovae.plane.strip_program import InStrips, StripProgram, record_strips
from halovae.plane.strips import Strips
from halovae.plane.trace import trace
from halovae.planning.cost import CPU, EXCHANGE, GATHER, Cost, Recorder, Work

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)
# Matrix products, and which argument is the second factor.
_PRODUCTS = {
    aten.mm.default: 1, aten.bmm.default: 1, aten.linear.default: 1, aten.addmm.default: 2, aten.baddbmm.default: 2,
}  # fmt: skip

_RUN = (*operators.BETWEEN_RANKS, *operators.STATISTICS, *windows.OPERATORS)  # priced by running them on meta tensors

WorkByKind = dict[tuple[str, str], Work]


class TracedTransport(Transport):
    """Transport of a rank that is traced. Nothing is sent; a recorder notes what would be."""

    def __init__(self, rank: int, world: int, recorder: Recorder | None = None) -> None:
        self.rank, self.world, self._recorder = rank, world, recorder

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        if self._recorder is not None:
            self._recorder.note(EXCHANGE, Work(1, bytes=max(map(_nbytes, (one for _, one in (*sends, *receives))))))
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        if self._recorder is not None:
            self._recorder.note(GATHER, Work(1, bytes=(ranks - 1) * _nbytes(own)))
        return [torch.empty_like(own) for _ in range(ranks)]


@dataclass(frozen=True)
class Traced:
    """What a rank takes for one item.

    Attributes:
        cost: the cost of its graph, by submodule and kind of operator.
        pictures: the shape of the decoded item.
        fallbacks: operators that no rule covers; they run replicated.
        random: whether the function draws random numbers.
        waits: whether strips wait for each other.
        strips: how many strips there are, of those that were asked for; None for at once.
        left: bytes of the peak that wait for later strips.
        moved: bytes to and from the host if these wait there, and the number of copies.
    """

    cost: Cost
    pictures: tuple[int, ...]
    fallbacks: tuple[str, ...]
    random: bool
    waits: bool = False
    strips: InStrips | None = None
    left: int = 0
    moved: tuple[int, int] = (0, 0)


def cells(shape: Sequence[int], multiple: int) -> tuple[int, int]:
    """Return the rows and cols of `[..., H, W]` that ranks share, each in units of `multiple` if divisible by it."""
    height, width = (size if size % multiple else size // multiple for size in shape[-2:])
    return height, width


def busiest(grid: Grid, height: int, width: int) -> int:
    """Return the rank with the most cells to compute, halos included."""
    load = []
    for rank, shard in enumerate(grid.shards(grid.batch, height, width)):
        _, row, col = grid.coordinates(rank)
        rows = shard.rows.size + (row > 0) + (row < grid.rows - 1)
        cols = shard.cols.size + (col > 0) + (col < grid.cols - 1)
        load.append(rows * cols)
    return load.index(max(load))


def traced(
    function: Callable[[Tensor], Tensor], module: nn.Module, shape: Sequence[int], dtype: torch.dtype, grid: Grid,
    rank: int | None = None, multiple: int = 1, compiled: bool = True, kind: str = "meta",
    strips: InStrips | None = None,
) -> Traced:  # fmt: skip
    """Return what a rank of a grid takes, by its graph.

    Args:
        function: decodes latents to pictures, or encodes pictures.
        module: the module whose parameters `function` uses; meta tensors will do.
        shape: the shape of the input, plane last.
        dtype: the dtype of the input.
        grid: rows and cols of ranks.
        rank: the rank; None for the one with the most to do.
        multiple: bounds between ranks are multiples of it, as in `trace`.
        compiled: whether a CPU's passes over memory are compiled.
        kind: the kind of device whose algorithms are priced, "cpu" or "meta"; see `context.on`.
        strips: how the rank computes its rows and cols, if it has all of them; None for at once.

    Raises:
        UnplannableError: the function cannot be traced.
        NarrowStripError: there are too few rows or cols for so many strips.
    """
    rank = busiest(grid, *cells(shape, multiple)) if rank is None else rank
    mesh = Mesh(grid, CPU, TracedTransport(rank, grid.size))

    def record(mesh: Mesh, layout: Strips | None, passes: Sequence[str] | None) -> Program:
        return trace(function, [module], mesh, shape, dtype, CPU, multiple, passes=passes, strips=layout)

    try:
        program = record_strips(record, CPU, shape[strips.dim], strips) if strips else record(mesh, None, None)
    except (TraceError, NotImplementedError) as error:
        raise UnplannableError(f"{type(module).__name__} cannot be planned: {error}") from error
    total: WorkByKind = defaultdict(Work)
    if not isinstance(program, StripProgram):
        messages, sent, weights, highest = _priced(program, mesh, total, compiled, kind)
        return Traced(
            Cost(dict(total), messages, sent, weights, highest), shape_of(program.returns), tuple(program.fallbacks),
            program.random,
        )  # fmt: skip
    weights, peaks = 0, []
    for index, (one, times) in enumerate(program.graphs):
        own: WorkByKind = defaultdict(Work)
        place = index if index <= program.shared else program.strips.count - len(program.programs) + index
        mesh = Mesh(program.strips.grid, CPU, TracedTransport(place, program.strips.count))
        _, _, weights, highest = _priced(one, mesh, own, compiled, kind)
        peaks.append(highest)
        for key, work in own.items():
            if key[1] not in (EXCHANGE, GATHER):  # lines stay in memory
                for _ in range(times):
                    total[key].add(work)
    cost = Cost(dict(total), 0, 0, weights, program.together(peaks))
    return Traced(
        cost, shape_of(program.returns), tuple(program.fallbacks), program.random, program.waits, program.strips,
        program.left, program.moved,
    )  # fmt: skip


def _priced(program: Program, mesh: Mesh, total: WorkByKind, compiled: bool, kind: str) -> tuple[int, int, int, int]:
    """Add the work of a program to `total`. Return its messages, and bytes: theirs, weights, peak."""
    pricer = _Pricer(mesh, program.bodies, compiled, kind)
    messages, sent = pricer.add(program.graph.nodes, total)
    everything = [node for graph in (program.graph, *program.bodies.values()) for node in graph.nodes]
    weights = {
        node.target: size_of(node) for node in everything if node.op == "get_attr" and not node.meta.get("constant")
    }
    return messages, sent, sum(weights.values()), peak(program.graph, program.bodies, pricer.scratch)


class _Watch(Recorder):
    """A recorder that computes the statistics of each kind of tensor once: PyTorch takes long to find their shapes.

    Args:
        results: results of earlier operators, shared by recorders.
        statistics: the same for operators that return several tensors.
    """

    def __init__(self, results: dict[Any, Any], statistics: dict[Any, Any]) -> None:
        super().__init__()
        self._results, self._statistics = results, statistics

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is not aten.var_mean.correction:
            return super().called(func, args, kwargs)
        x, *others = args
        key = x.shape, x.stride(), x.dtype, str(others), str(kwargs)
        if key not in self._statistics:
            self._statistics[key] = super().called(func, args, kwargs)
        return tuple(torch.empty_like(one) for one in self._statistics[key])


class _Pricer:
    """Adds up the work of nodes, by the kinds that calibrations know."""

    def __init__(self, mesh: Mesh, bodies: Mapping[str, fx.Graph], compiled: bool, kind: str) -> None:
        self._mesh, self._bodies, self._kind = mesh, bodies, kind
        self._compiled = compiled and kind == "cpu"
        self._known: dict[Any, tuple[dict[str, Work], int]] = {}  # work and peak of operators between ranks
        self._called: dict[str, tuple[WorkByKind, int, int]] = {}
        self._results: dict[Any, Any] = {}
        self._statistics: dict[Any, Any] = {}

    def add(self, nodes: Iterable[fx.Node], total: WorkByKind) -> tuple[int, int]:
        """Add the work of nodes to `total`. Return how many messages and bytes they send."""
        messages = sent = 0
        for node in nodes:
            if node.op == "call_module":
                name = str(node.target)
                if name not in self._called:
                    inner: WorkByKind = defaultdict(Work)
                    self._called[name] = inner, *self.add(self._bodies[name].nodes, inner)
                works, more, bytes_ = self._called[name]
                for key, work in works.items():
                    total[key].add(work)
                messages, sent = messages + more, sent + bytes_
            elif is_operator(node):
                layer = node.meta.get("module", "")
                for kind, work in self._works(node):
                    total[layer, kind].add(work)
                messages += node.meta.get("messages", 0)
                sent += node.meta.get("sent", 0)
        return messages, sent

    def _works(self, node: fx.Node) -> list[tuple[str, Work]]:
        if node.target in _RUN:
            return list(self._run(node)[0].items())
        if node.target is operators.attention:
            copied = Work(1, bytes=2 * size_of(node))
            return [("scaled_dot_product_attention", Work(1, flops(node), _touched(node))), ("clone", copied)]
        if node.target is group_norms.whole_group_norm:
            return [("native_group_norm", Work(1, bytes=_touched(node)))]
        if node.target is whole_maps.part:
            return [("view", Work(1))]
        return [_aten(node)]

    def scratch(self, node: fx.Node) -> int:
        """Return the bytes that an operator between ranks holds at its peak besides its result."""
        if node.target not in _RUN:
            return 0
        return max(0, self._run(node)[1] - (0 if shares(node) else size(node)))

    def _run(self, node: fx.Node) -> tuple[dict[str, Work], int]:
        """Run an operator between ranks on meta tensors. Return its work and its peak."""
        key = node.target, argument_key(node)
        if key not in self._known:
            recorder = _Watch(self._results, self._statistics)
            mesh = Mesh(self._mesh.grid, CPU, TracedTransport(self._mesh.rank, self._mesh.grid.size, recorder))
            kernels = recorder.kernels() if self._compiled else EAGER
            with _disable_current_modes(), torch.inference_mode(), context.on(mesh, kernels, kind=self._kind):
                args, kwargs = meta_arguments(node)
                target: Any = node.target
                with recorder:
                    target(*args, **kwargs)
            self._known[key] = recorder.taken(), recorder.peak
        return self._known[key]


def _aten(node: fx.Node) -> tuple[str, Work]:
    """Return the kind and the work of an operator of PyTorch, as `planning.cost.described` does."""
    target: Any = node.target
    if target is operator.getitem:  # one result of several
        source = node.all_input_nodes[0]
        kind, work = _aten(source)
        return kind, Work() if work.bytes == 0 else Work(bytes=size_of(node))
    name = target._schema.name.removeprefix("aten::").removeprefix("_")
    written = any(one.alias_info is not None and one.alias_info.is_write for one in target._schema.returns)
    if (shares(node) and not written) or name.startswith(("empty", "new_empty")):
        return "view", Work(1)
    if target in _CONVOLUTIONS:
        x, weight = node.all_input_nodes[:2]
        return "convolution", Work(1, flops(node), size_of(x) + size_of(node), _numel(weight))
    if target in _PRODUCTS:
        second = node.args[_PRODUCTS[target]]
        assert isinstance(second, fx.Node)
        if _is_weight(second):
            first = node.args[_PRODUCTS[target] - 1]
            assert isinstance(first, fx.Node)
            return "linear", Work(1, flops(node), size_of(first) + size_of(node), _numel(second))
        return "linear", Work(1, flops(node), _touched(node))
    if name.startswith("scaled_dot_product"):  # PyTorch chooses the kernel; the operator runs replicated
        query, key = (one.meta["shape"] for one in node.all_input_nodes[:2])
        return "scaled_dot_product_attention", Work(1, 4.0 * math.prod(query) * key[-2], _touched(node))
    return name, Work(1, bytes=_touched(node))


def _touched(node: fx.Node) -> int:
    return size_of(node) + sum(map(size_of, node.all_input_nodes))


def _numel(node: fx.Node) -> int:
    return math.prod(node.meta["shape"])


def _is_weight(node: fx.Node) -> bool:
    while shares(node):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""A rank's recorded graph, ready to be replayed."""

from __future__ import annotations

import operator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.profiler import record_function

from halovae.mesh import Mesh
from halovae.plane import operators
from halovae.plane.layout import Layout

if TYPE_CHECKING:
    from halovae.plane.plane import Plane


class Program:
    """What one rank does, without the module that it was recorded from.

    Attributes:
        graph: its operators. A node's `meta` has the `shape`, `dtype` and `bytes` of its result, the `module` that
            called it, and for operators between ranks the `messages` and bytes `sent`.
        takes: the layout of the input.
        returns: the layout of the result.
        dtype: of the result.
        random: whether it draws random numbers.
        writes: whether it writes to its input.
        fallbacks: calls of operators that no rule covers, which run replicated.
        gathered: bytes that these receive.
        received: bytes that all operators receive.
        computed: bytes of all results.
    """

    def __init__(
        self, graph: fx.Graph, attributes: dict[str, Tensor], plane: Plane, takes: Layout, returns: Layout,
        dtype: torch.dtype, random: bool, writes: bool,
    ) -> None:  # fmt: skip
        self.graph, self.takes, self.returns, self.dtype = graph, takes, returns, dtype
        self.random, self.writes = random, writes
        self.coordinates = plane.coordinates
        self.fallbacks, self.gathered = plane.fallbacks, plane.gathered
        self.received, self.computed = plane.received, plane.computed
        self._attributes = attributes

    @cached_property
    def _module(self) -> fx.GraphModule:
        """Code of the graph, made once it is run: plans only read it."""
        return fx.GraphModule(self._attributes, self.graph)

    def __call__(self, local: Tensor, mesh: Mesh, *extras: Tensor) -> Tensor:
        """Run it.

        Args:
            local: this rank's part of the input, as `takes` says.
            mesh: the ranks. All of them run their programs.
            extras: the further arguments that it was recorded with.

        Returns:
            This rank's part of the result, as `returns` says.
        """
        with operators.on(mesh), torch.no_grad(), torch._C.DisableTorchFunction():
            result: Tensor = self._module(local, *extras)
        return result

    def profiled(self, local: Tensor, mesh: Mesh, *extras: Tensor) -> Tensor:
        """Run it with a profiler region for each submodule that it was recorded from."""
        with operators.on(mesh), torch.no_grad():
            result: Tensor = _Regions(self._module).run(local, *extras)
        return result

    @property
    def peak(self) -> int:
        """Bytes of live tensors at the highest point, weights apart: input, results, and what operators copy."""
        return peak(self.graph)


class _Regions(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        with record_function(n.meta.get("module") or n.op):
            return super().run_node(n)


def peak(graph: fx.Graph) -> int:
    """Bytes of live tensors at the highest point of a graph whose tensors are freed after their last use.

    Views share their input's memory. Weights and constants are not counted.
    """
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        owner[node] = owner[node.args[0]] if shares(node) else node
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for one in (node, *node.all_input_nodes):
            last[owner[one]] = node
    ending: dict[fx.Node, list[fx.Node]] = {}
    for kept, node in last.items():
        ending.setdefault(node, []).append(kept)
    live = highest = 0
    for node in graph.nodes:
        if owner[node] is node:
            live += size(node)
            highest = max(highest, live)
        for gone in ending.get(node, []):
            live -= size(gone)
    return highest


def size(node: fx.Node) -> int:
    """Bytes that a node allocates for its result."""
    return 0 if node.op in ("get_attr", "output") else int(node.meta.get("bytes", 0))


def shares(node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of its first input."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    infos = [one.alias_info for one in schema.returns]
    return any(info is not None for info in infos) or node.target is torch.ops.aten.reshape.default

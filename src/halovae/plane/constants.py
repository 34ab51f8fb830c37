"""Constants of a recorded graph, which do not depend on its input: masks, positions, schedules."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.plane.live import is_write, root

_LARGEST = 2**20  # bytes of a constant that is computed once; larger ones are computed whenever the graph runs
# The same for one that is written in place, as masks are row by row: no pass runs over a graph that writes.
_LARGEST_WRITTEN = 64 * 2**20


@dataclass
class Memory:
    """A storage of a recorded graph.

    Attributes:
        storage: the storage, held so that no other one gets its id.
        constant: whether nothing in it depends on the input.
        attribute: whether it was created outside of the graph.
        written: whether an operator writes to it.
        changed: whether a tensor that lies in it was changed, by a write or by an operator that stands for one.
        nodes: the nodes whose results lie in it.
        tensors: the tensors that lie in it, as weak references.
        originals: for a result of a repeated call, the storages of the recorded call's result.
    """

    storage: Any
    constant: bool
    attribute: bool
    written: bool = False
    changed: bool = False
    nodes: list[fx.Node] = field(default_factory=list)
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    originals: list[Memory] = field(default_factory=list)

    @property
    def alike(self) -> list[Tensor]:
        """The tensors that lie in it and are alive; none if they are views of different parts of it."""
        alive = [one for ref in self.tensors if (one := ref()) is not None]
        places = {(one.shape, one.stride(), one.storage_offset(), one.dtype) for one in alive}
        return alive if len(places) == 1 else []

    def write(self, constant: bool) -> None:
        """Note a write to the storage, of a constant value or of another."""
        seen: set[int] = set()
        reached = [self]
        while reached:
            one = reached.pop()
            if id(one) not in seen:
                seen.add(id(one))
                one.written, one.changed, one.constant = True, True, one.constant and constant
                reached.extend(one.originals)


class Constants:
    """The values of a graph's constant nodes, computed in order, each once."""

    def __init__(self) -> None:
        self._values: dict[fx.Node, Any] = {}
        self._written: set[fx.Node] = set()  # the nodes in whose memory operators write

    def call(self, func: Any, arguments: tuple[Any, Any], graph: fx.Graph, attributes: dict[str, Tensor]) -> Any:
        """Return the result of an operator on constant nodes, at this point of the graph."""
        with _disable_current_modes(), torch.no_grad():
            for node in graph.nodes:
                self._compute(node, attributes, limited=False)
            args, kwargs = fx.node.map_arg((tuple(arguments[0]), arguments[1]), self._values.__getitem__)
            return func(*args, **kwargs)

    def fold(self, graph: fx.Graph, attributes: dict[str, Tensor]) -> None:
        """Turn the constants that other nodes use into attributes."""
        self._values.clear()
        self._written = {root(node.all_input_nodes[0]) for node in graph.nodes if is_write(node)}
        made: dict[tuple[fx.Node, int], fx.Node] = {}
        with _disable_current_modes(), torch.no_grad():
            for node in list(graph.nodes):
                if self._compute(node, attributes, limited=True):
                    continue
                for source in node.all_input_nodes:
                    value = self._values.get(source)
                    if not isinstance(value, Tensor) or source.op == "get_attr":
                        continue
                    key = source, value._version
                    if key not in made:
                        name = f"constant_{len(attributes)}"
                        attributes[name] = value.clone()
                        with graph.inserting_before(node):
                            made[key] = graph.create_node("get_attr", name)
                        made[key].meta = {**source.meta}
                    node.replace_input_with(source, made[key])
        for node in reversed(list(graph.nodes)):  # including operators that write, which `clean` would keep
            if node in self._values and not node.users:
                graph.erase_node(node)

    def _compute(self, node: fx.Node, attributes: dict[str, Tensor], limited: bool) -> bool:
        """Compute a node, if possible. Return whether its value is known."""
        if node in self._values:
            return True
        if not node.meta.get("constant") or node.op == "output":
            return False
        largest = max(_LARGEST, _LARGEST_WRITTEN) if limited and root(node) in self._written else _LARGEST
        if limited and node.meta.get("bytes", 0) > largest:
            return False
        if node.op == "get_attr":
            self._values[node] = attributes[str(node.target)]
            return True
        if any(source not in self._values for source in node.all_input_nodes):
            return False
        function: Any = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        self._values[node] = function(*args, **kwargs)
        return True

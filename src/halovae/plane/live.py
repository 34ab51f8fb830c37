"""Tensors that are live while a graph runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from halovae.plane import windows
from halovae.plane.operators import emit, pack, take
from halovae.plane.whole_maps import hand, part


def window_bytes(node: fx.Node) -> int:
    """Bytes of the map that a convolution normalizes, activates, or assembles, if that is not its input."""
    if node.target not in (windows.convolution, windows.residual_convolution):
        return 0
    arguments: Any = node.args
    if node.target is windows.residual_convolution:
        _, *arguments = arguments
    x, given = arguments[0], dict[str, Any](node.kwargs)
    own: int = size_of(x)
    frames = x.meta["shape"][2]
    more = given.get("zeros", 0) + sum(given.get("repeats", ()))
    past = size_of(given["past"]) if given.get("past") is not None else 0
    together = own // frames * (frames + more) + past
    result = size_of(node) if shares(node) else 0  # shared only if Winograd's convolution computes it
    if more or past or "edges" in given:
        return together + result
    total = own if result or (given.keys() & {"norm", "silu"} and "spare" not in given) else 0
    *_, cuts, early = arguments
    return total + (own if cuts and (not early or "spare" in given) else 0)


def size_of(node: fx.Node) -> int:
    """Bytes of a node's result, whether or not it shares memory."""
    return int(node.meta.get("bytes", 0))


def peak(
    graph: fx.Graph, bodies: Mapping[str, fx.Graph], scratch: Callable[[fx.Node], int] = window_bytes,
    before: Callable[[fx.Node], bool] | None = None,
) -> int:  # fmt: skip
    """Bytes of live tensors at the highest point of a graph whose tensors are freed after their last use.

    Views share their input's memory. Weights and constants are not counted.

    Args:
        graph: what runs.
        bodies: the graphs that it calls.
        scratch: bytes that an operator holds while it runs, besides its result.
        before: the highest point right before one of these nodes instead; None for that of all.
    """
    known: dict[tuple[str, frozenset[int]], int | None] = {}

    def highest(nodes: Iterable[fx.Node], given: frozenset[int]) -> int | None:
        """The highest point of a graph that owns the inputs in `given`, and borrows the others; None if it has none."""
        owner: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            owner[node] = owner[node.all_input_nodes[0]] if shares(node) else node
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for one in (node, *node.all_input_nodes):
                last[owner[one]] = node
        ending: dict[fx.Node, list[fx.Node]] = {}
        for kept, node in last.items():
            ending.setdefault(node, []).append(kept)
        live, top = 0, 0 if before is None else None
        for node in nodes:
            if before is not None and before(node):
                top = max(top or 0, live)
            if node.op == "call_module":
                box = node.all_input_nodes[0]
                free = frozenset(at for at, one in enumerate(box.args) if last[owner[one]] is box)  # type: ignore[index]
                key = str(node.target), free
                if key not in known:
                    known[key] = highest(bodies[key[0]].nodes, free)
                inner = known[key]
                top = top if inner is None else max(top or 0, live + inner)
            elif node.target is take:
                live += size(node) if node.args[1] in given else 0
            elif owner[node] is node:
                live += size(node)
            if before is None:
                top = max(top or 0, live + scratch(node))
            for gone in ending.get(node, []):
                if gone.target is not take or gone.args[1] in given:
                    live -= size(gone)
        return top

    return highest(graph.nodes, frozenset()) or 0


def is_operator(node: fx.Node) -> bool:
    """Whether a node computes something, and does not only pass on inputs or results of a called graph."""
    if node.op != "call_function" or node.target in (pack, take, emit):
        return False
    return node.target is not operator.getitem or node.all_input_nodes[0].op != "call_module"


def size(node: fx.Node) -> int:
    """Bytes that a node allocates for its result."""
    return 0 if node.op in ("get_attr", "output") else int(node.meta.get("bytes", 0))


def shares(node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of its first input."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in (hand, part, windows.added_, windows.residual_convolution):
        return True
    if node.target is windows.normalized:
        return bool(node.kwargs.get("spare"))
    if node.target is windows.convolution:  # by Winograd's convolution; `window_bytes` counts the result of others
        return bool(node.kwargs.get("spare")) and same(node, node.args[0])
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem and node.args[0].op != "call_module"
    infos = [one.alias_info for one in schema.returns]
    return any(info is not None for info in infos) or node.target is torch.ops.aten.reshape.default


def is_write(node: fx.Node) -> bool:
    """Whether an operator writes to a tensor that others may see."""
    schema: Any = getattr(node.target, "_schema", None)
    arguments = () if schema is None else schema.arguments
    return any(one.alias_info is not None and one.alias_info.is_write for one in arguments)


def same(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes have results of one shape and dtype."""
    return all(node.meta[name] == other.meta[name] for name in ("shape", "dtype"))


def root(node: fx.Node) -> fx.Node:
    """The node in whose memory a node's result lies."""
    while shares(node):
        node = node.all_input_nodes[0]
    return node

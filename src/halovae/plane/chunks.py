"""Results that are concatenated from chunks: each chunk is handed out as soon as it is computed."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from halovae.plane.live import root, shares
from halovae.plane.operators import emit, take
from halovae.plane.rules.registry import written

aten = torch.ops.aten
_SAME = (aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def split(graph: fx.Graph, bodies: Mapping[str, fx.Graph]) -> int | None:
    """Make a graph hand out its result in chunks, if it is a concatenation and later operators treat chunks separately.

    Instead of joining the chunks and then, for example, clamping the result, the graph clamps each chunk and hands it
    out with `emit`. The graph then returns nothing.

    Args:
        graph: returns one tensor.
        bodies: the graphs that it calls.

    Returns:
        The dim of the result along which chunks lie, or None if the graph is unchanged.
    """
    output = next(iter(reversed(graph.nodes)))
    node = output.all_input_nodes[0]
    later: list[fx.Node] = []  # operators after the concatenation, last first
    while node.target is not aten.cat.default:
        if not isinstance(node.target, OpOverload) or len(node.users) != 1 or written(node.target):
            return None
        if len(node.all_input_nodes) != 1 or any(isinstance(one, fx.Node) for one in node.args[1:]):
            return None
        later.append(node)
        node = node.all_input_nodes[0]
    if len(node.users) != 1:
        return None
    dim = _dim_of(node)
    chunks = _joined(node, dim)
    order = {one: place for place, one in enumerate(graph.nodes)}
    places = [order[one] for one in chunks]
    if len(chunks) < 2 or any(after <= before for before, after in itertools.pairwise(places)):
        return None  # chunks are not computed in the order of their positions
    roots = {root(one) for one in chunks}
    for one in graph.nodes:
        if isinstance(one.target, OpOverload) and written(one.target):
            target = root(one)
            if target in roots or target.op != "call_function" or target.target is operator.getitem:
                return None  # results of called graphs may share memory
    steps: list[Callable[[fx.Node], fx.Node]] = []
    for one in reversed(later):
        found = _step(graph, one, dim)
        if found is None:
            return None
        step, dim = found
        steps.append(step)
    if not 0 < dim < len(output.all_input_nodes[0].meta["shape"]) - 2:  # items, rows, cols
        return None
    start = 0
    for chunk in chunks:
        own = _is_its_own(chunk, node, bodies)
        with graph.inserting_after(chunk):
            for step in steps:
                chunk = step(chunk)
                graph.inserting_after(chunk)
                own = own or not shares(chunk)
            if not own:  # the receiver may write to it
                meta = chunk.meta
                chunk = graph.call_function(aten.clone.default, (chunk,), {"memory_format": torch.contiguous_format})
                chunk.meta = {**meta}
                graph.inserting_after(chunk)
            graph.call_function(emit, (chunk, start)).meta["module"] = ""
        start += chunk.meta["shape"][dim]
    assert start == output.all_input_nodes[0].meta["shape"][dim]
    output.args = (None,)
    return dim


def _is_its_own(chunk: fx.Node, cat: fx.Node, bodies: Mapping[str, fx.Graph]) -> bool:
    """Whether a chunk shares its memory with no other tensor, and only concatenations use it."""
    if set(chunk.users) - {cat} and any(one.target is not aten.cat.default for one in chunk.users):
        return False
    if chunk.op != "call_function" or shares(chunk):
        return False
    source = chunk.all_input_nodes[0] if chunk.all_input_nodes else chunk
    if chunk.target is not operator.getitem or source.op != "call_module":
        return len(chunk.users) == 1
    output = next(iter(reversed(bodies[str(source.target)].nodes)))
    results: Any = output.args[0]
    roots = [root(one) for one in results]
    found = roots[int(chunk.args[1])]  # type: ignore[arg-type]
    return found.op == "call_function" and found.target is not take and roots.count(found) == 1


def _dim_of(cat: fx.Node) -> int:
    dim: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return int(dim) % len(cat.meta["shape"])


def _joined(cat: fx.Node, dim: int) -> list[fx.Node]:
    """Return the inputs of a concatenation; nested concatenations are flattened."""
    found: list[fx.Node] = []
    left: list[Any] = [cat]  # modules that append frames one by one nest one concatenation per frame
    while left:
        one = left.pop()
        assert isinstance(one, fx.Node)
        inner = one.target is aten.cat.default and len(one.users) == 1 and _dim_of(one) == dim
        if inner or one is cat:
            left.extend(one.args[0])  # type: ignore[arg-type]
        else:
            found.append(one)
    return found[::-1]


def _step(graph: fx.Graph, node: fx.Node, dim: int) -> tuple[Callable[[fx.Node], fx.Node], int] | None:
    """Return a function that applies a node to one chunk, and the chunked dim of its result; None if there is none."""
    function: Any = node.target
    before, after = node.all_input_nodes[0].meta["shape"], node.meta["shape"]

    def with_args(args: Callable[[fx.Node], Sequence[Any]]) -> Callable[[fx.Node], fx.Node]:
        def step(chunk: fx.Node) -> fx.Node:
            made = graph.call_function(function, (chunk, *args(chunk)), node.kwargs)
            blank = torch.empty(chunk.meta["shape"], dtype=chunk.meta["dtype"], device="meta")
            kwargs = {**node.kwargs, **({"device": "meta"} if "device" in node.kwargs else {})}
            result = function(blank, *args(chunk), **kwargs)
            made.meta = {**node.meta, "shape": tuple(result.shape), "bytes": result.nbytes}
            return made

        return step

    rest = node.args[1:]
    if function in _SAME or (torch.Tag.pointwise in function.tags and tuple(before) == tuple(after)):
        return with_args(lambda _: rest), dim
    if function is aten.permute.default:
        order: Any = rest[0]
        return with_args(lambda _: rest), [one % len(before) for one in order].index(dim)
    if function in _VIEWS:
        ahead = math.prod(before[:dim])
        places = [at for at, size in enumerate(after) if size == before[dim] and math.prod(after[:at]) == ahead]
        if not places:
            return None
        (place, *_) = places
        return with_args(lambda chunk: ([*after[:place], chunk.meta["shape"][dim], *after[place + 1 :]],)), place
    return None

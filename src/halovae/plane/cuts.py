"""Compute a rank's shard of large constants, such as masks, instead of cutting it from the whole tensor.

An attention mask between all cells of a clip is larger than the clip. It is broadcast from small tensors, so a shard of
it can be computed from shards of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
_SMALLEST = 2**20  # bytes; the shard of a smaller tensor is cut from the whole
_BROADCAST = (aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default)
_COPIES = (aten._to_copy.default, aten.clone.default, aten.where.self, aten.masked_fill.Scalar)

# For each factor of a dim: its size, and the start and the length of the range that this rank keeps.
Kept = Sequence[tuple[int, int, int]]


def note(shard: fx.Node, whole: fx.Node, dim: int, kept: Kept) -> None:
    """Note that a node is this rank's shard of another one, cut along a dim."""
    shard.meta["cut"] = whole, dim, kept


def cut_early(
    graph: fx.Graph, attributes: dict[str, Tensor], is_fixed: Callable[[fx.Node], bool], device: torch.device
) -> None:
    """Compute the noted shards from shards of the tensors that the whole is computed from.

    Args:
        graph: changed in place. Nodes that are no longer used stay in it.
        attributes: the tensors that it reads, by name; indices are added.
        is_fixed: whether a node depends neither on the input nor on writes in place.
        device: where the graph will run.
    """
    for node in list(graph.nodes):
        if "cut" not in node.meta:
            continue
        whole, dim, kept = node.meta.pop("cut")
        if whole.meta["bytes"] < _SMALLEST or not is_fixed(whole):
            continue
        with _disable_current_modes():
            index = torch.arange(math.prod(size for size, _, _ in kept)).view([size for size, _, _ in kept])
            for at, (_, start, length) in enumerate(kept):
                index = index.narrow(at, start, length)
            index = index.flatten().to(device)
        with graph.inserting_before(node):
            found = _Cutting(graph, attributes, index, is_fixed).shard(whole, dim)
            if found is not None:
                node.replace_all_uses_with(found)


class _Cutting:
    """Makes nodes for the shard of a tensor that has some indices of a dim."""

    def __init__(
        self, graph: fx.Graph, attributes: dict[str, Tensor], index: Tensor, is_fixed: Callable[[fx.Node], bool]
    ) -> None:
        self._graph, self._attributes, self._index, self._is_fixed = graph, attributes, index, is_fixed
        self._node: fx.Node | None = None

    def shard(self, node: fx.Node, dim: int) -> fx.Node | None:
        """Return the shard of a node; None where it would have to be cut from a large whole."""
        if not self._is_fixed(node):
            return None
        if node.meta["bytes"] < _SMALLEST:
            return self._made(node, dim, aten.index_select.default, (node, dim, self._indices(node)), {})
        target: Any = node.target
        if node.op == "call_function" and target in _BROADCAST:
            return self._broadcast(node, dim)
        if node.op == "call_function" and (target in _COPIES or torch.Tag.pointwise in getattr(target, "tags", ())):
            shards: dict[fx.Node, fx.Node] = {}
            for one in node.all_input_nodes:
                place = dim - len(node.meta["shape"]) + len(one.meta["shape"])
                is_broadcast = place < 0 or one.meta["shape"][place] != node.meta["shape"][dim]
                found = one if is_broadcast else self.shard(one, place)
                if found is None:
                    return None
                shards[one] = found
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), shards.__getitem__)
            return self._made(node, dim, target, args, kwargs)
        return None

    def _indices(self, like: fx.Node) -> fx.Node:
        if self._node is None:
            name = f"constant_{len(self._attributes)}"
            self._attributes[name] = self._index
            self._node = self._graph.create_node("get_attr", name)
            own = {"shape": tuple(self._index.shape), "dtype": torch.int64, "bytes": 8 * len(self._index)}
            self._node.meta = {**like.meta, **own}
        return self._node

    def _broadcast(self, node: fx.Node, dim: int) -> fx.Node | None:
        source = node.all_input_nodes[0]
        own: tuple[int, ...] = source.meta["shape"]
        if node.target is aten.unsqueeze.default:
            at: Any = node.args[1]
            at %= len(own) + 1
            if dim == at:
                return None
            found = self.shard(source, dim - (dim > at))
            return found and self._made(node, dim, aten.unsqueeze.default, (found, at), {})
        sizes = [*node.meta["shape"]]
        if node.target is not aten.expand.default:  # a view; only dims of size 1 may differ
            real = [at for at, size in enumerate(own) if size != 1]
            if [own[at] for at in real] != [size for size in sizes if size != 1] or sizes[dim] == 1:
                return None
            found = self.shard(source, real[sum(size != 1 for size in sizes[:dim])])
            sizes[dim] = len(self._index)
            return found and self._made(node, dim, aten.reshape.default, (found, sizes), {})
        place = dim - len(sizes) + len(own)
        sizes[dim] = len(self._index)
        if place >= 0 and own[place] == node.meta["shape"][dim]:
            shard = self.shard(source, place)
            return shard and self._made(node, dim, aten.expand.default, (shard, sizes), {})
        return self._made(node, dim, aten.expand.default, (source, sizes), {})

    def _made(self, like: fx.Node, dim: int, target: Any, args: Any, kwargs: Any) -> fx.Node:
        made = self._graph.call_function(target, args, kwargs)
        shape = [*like.meta["shape"]]
        bytes_ = like.meta["bytes"] // shape[dim] * len(self._index)
        shape[dim] = len(self._index)
        made.meta = {key: value for key, value in like.meta.items() if key != "cut"}
        made.meta |= {"shape": tuple(shape), "bytes": bytes_}
        return made

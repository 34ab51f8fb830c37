"""Queries on recorded graphs, and ways to insert nodes, shared by passes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.live import is_write, root


def writes(graph: fx.Graph) -> bool:
    """Whether an operator of a graph writes to a tensor that others may see."""
    return any(map(is_write, graph.nodes))


def shared(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes, by `live.root`, that may share memory with tensors outside the graph.

    Called graphs may return views of their inputs. A graph's inputs and outputs belong to its caller.
    """
    found = set()
    for node in graph.nodes:
        if node.target in (operators.pack, operators.emit) or node.op == "output":
            found |= set(map(root, node.all_input_nodes))
        if node.op != "call_function" or node.target in (operators.take, operator.getitem):
            found.add(root(node))
    return found


def uses(user: fx.Node) -> list[fx.Node]:
    """Return the nodes among a node's arguments, with repetitions."""
    found: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), found.append)
    return found


def used_once(node: fx.Node) -> bool:
    """Whether a node has one user, which takes it as one argument."""
    return len(node.users) == 1 and uses(next(iter(node.users))).count(node) == 1


def only_user(node: Any, target: Any) -> bool:
    """Whether a value is a node that calls `target`, and has one user, which takes it as one argument."""
    return isinstance(node, fx.Node) and node.target is target and used_once(node)


def is_cast(node: Any, mesh: Mesh) -> bool:
    """Whether a value is a node that only changes a tensor's dtype."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten._to_copy.default:
        return False
    unchanged = {"layout": torch.strided, "device": mesh.device.torch_device}
    return all(
        name == "dtype" or (name in unchanged and value == unchanged[name]) for name, value in node.kwargs.items()
    )


def widened(wide: Any, rounded: fx.Node, mesh: Mesh) -> Any:
    """Return the half-precision tensor that `wide` casts to fp32 if `rounded` casts back to its dtype; else None."""
    if not is_cast(wide, mesh) or not is_cast(rounded, mesh) or wide.meta["dtype"] != torch.float32:
        return None
    (x,) = wide.args
    dtype = x.meta["dtype"]
    return x if dtype == rounded.meta["dtype"] and dtype.itemsize < torch.float32.itemsize else None


def replaced(
    node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *others: fx.Node
) -> fx.Node:
    """Replace a node by a call.

    Args:
        node: the node to replace.
        function: the function to call.
        args: its positional arguments.
        kwargs: its keyword arguments.
        others: nodes whose messages the call also sends; they are erased if they have no other users.
    """
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = {**node.meta}
    for name in ("messages", "sent"):
        new.meta[name] = sum(old.meta.get(name, 0) for old in (node, *others))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    for other in others:
        if not other.users:
            other.graph.erase_node(other)
    return new


def inserted(node: fx.Node, target: Any, arguments: tuple[Any, ...], shape: Sequence[int] | None = None) -> fx.Node:
    """Insert a call before a node, with the node's dtype. By default `arguments[1]` is the shape (reshape, expand)."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, arguments)
    call.meta = {**node.meta, "shape": tuple(arguments[1] if shape is None else shape), "messages": 0, "sent": 0}
    call.meta["bytes"] = math.prod(call.meta["shape"]) * node.meta["dtype"].itemsize
    return call


def recounted(node: fx.Node, mesh: Mesh) -> None:
    """Update a convolution's number of halo messages, and their bytes. The convolution has no norm yet."""
    cuts: Any = node.args[3 if node.target is windows.upsampled_convolution else 4]
    x: Any = node.args[0]
    with _disable_current_modes():
        repeats: Any = node.kwargs.get("repeats", ())  # halos include repeated frames
        sizes = [size + sum(repeats) * (at == 2) for at, size in enumerate(x.meta["shape"])]
        local: Tensor = torch.empty(sizes, dtype=x.meta["dtype"], device="meta")
        messages = sent = 0
        for dim, mesh_dim, bounds, needed, *_ in cuts:
            local, more, size = operators.fetched_shape(mesh, local, dim, mesh_dim, bounds, needed)
            messages, sent = messages + more, sent + size
    node.meta |= {"messages": messages, "sent": sent}

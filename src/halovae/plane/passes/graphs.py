"""What passes ask of a recorded graph, and how they put nodes in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.live import root


def writes(graph: fx.Graph) -> bool:
    """Whether an operator writes to a tensor that others may see."""
    schemas: Iterator[Any] = (getattr(node.target, "_schema", None) for node in graph.nodes)
    arguments = [one for schema in schemas if schema is not None for one in schema.arguments]
    return any(one.alias_info is not None and one.alias_info.is_write for one in arguments)


def shared(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory may be another's, too, by `live.root`.

    Called graphs may return views of what they take. What a graph takes or returns is its caller's.
    """
    found = set()
    for node in graph.nodes:
        if node.target in (operators.pack, operators.emit) or node.op == "output":
            found |= set(map(root, node.all_input_nodes))
        if node.op != "call_function" or node.target in (operators.take, operator.getitem):
            found.add(root(node))
    return found


def uses(user: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, each as often as it is there."""
    found: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), found.append)
    return found


def used_once(node: fx.Node) -> bool:
    """Whether a node is one argument of one other."""
    return len(node.users) == 1 and uses(next(iter(node.users))).count(node) == 1


def only_user(node: Any, target: Any) -> bool:
    """Whether a value is a node that calls `target`, and is one argument of one other node."""
    return isinstance(node, fx.Node) and node.target is target and used_once(node)


def is_cast(node: Any, mesh: Mesh) -> bool:
    """Whether a value is a node that does nothing but change a tensor's dtype."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten._to_copy.default:
        return False
    unchanged = {"layout": torch.strided, "device": mesh.device.torch_device}
    return all(
        name == "dtype" or (name in unchanged and value == unchanged[name]) for name, value in node.kwargs.items()
    )


def widened(wide: Any, rounded: fx.Node, mesh: Mesh) -> Any:
    """What of half precision is computed with in fp32, and rounded then; None if one of the casts is another."""
    if not is_cast(wide, mesh) or not is_cast(rounded, mesh) or wide.meta["dtype"] != torch.float32:
        return None
    (x,) = wide.args
    dtype = x.meta["dtype"]
    return x if dtype == rounded.meta["dtype"] and dtype.itemsize < torch.float32.itemsize else None


def replaced(
    node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *others: fx.Node
) -> fx.Node:
    """Put a call in place of a node.

    Args:
        node: what it replaces.
        function: what is called.
        args: with what.
        kwargs: and with what by name.
        others: nodes whose messages the call sends, too.
    """
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = {**node.meta}
    for name in ("messages", "sent"):
        new.meta[name] = sum(one.meta.get(name, 0) for one in (node, *others))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    for one in others:
        if not one.users:
            one.graph.erase_node(one)
    return new


def inserted(node: fx.Node, target: Any, arguments: tuple[Any, ...], shape: Sequence[int] | None = None) -> fx.Node:
    """A call put in before a node, of that one's dtype. To reshape and to expand tell their shape themselves."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, arguments)
    made.meta = {**node.meta, "shape": tuple(arguments[1] if shape is None else shape), "messages": 0, "sent": 0}
    made.meta["bytes"] = math.prod(made.meta["shape"]) * node.meta["dtype"].itemsize
    return made


def recounted(node: fx.Node, mesh: Mesh) -> None:
    """Note the messages that a convolution's halos are now, and their bytes. It has no norm yet."""
    cuts: Any = node.args[3 if node.target is windows.upsampled_convolution else 4]
    x: Any = node.args[0]
    with _disable_current_modes():
        repeats: Any = node.kwargs.get("repeats", ())  # they travel, too
        sizes = [size + sum(repeats) * (at == 2) for at, size in enumerate(x.meta["shape"])]
        part: Tensor = torch.empty(sizes, dtype=x.meta["dtype"], device="meta")
        messages = sent = 0
        for dim, mesh_dim, bounds, needed, *_ in cuts:
            part, more, size = operators.fetched_shape(mesh, part, dim, mesh_dim, bounds, needed)
            messages, sent = messages + more, sent + size
    node.meta |= {"messages": messages, "sent": sent}

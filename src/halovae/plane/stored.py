"""Recorded graphs on disk: a later process that shards the same module in the same way reads them instead of tracing.

A file has a checksum, a graph as JSON, and the constants that were computed for it, as safetensors. It has no code and
no weights: operators are looked up by their names, and weights are taken from the module. A file's name is the digest
of all that the graph depends on (`fingerprint`). If that is not certain, nothing is read or written.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import operator
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from halovae.device.kinds import cache_folder
from halovae.distributed.mesh import Mesh
from halovae.plane import backends, group_norms, operators, whole_maps, windows
from halovae.plane.fingerprint import Unstable, fingerprint
from halovae.plane.layout import Factor
from halovae.plane.plane import Plane
from halovae.plane.program import Program
from halovae.plane.trace import RECORDING

LIMIT = 256 * 2**20  # bytes of all files
LARGEST = 64 * 2**20  # bytes of one graph's constants
_FORMAT = 7
_FIELDS = ("chunked", "takes", "returns", "dtype", "random", "writes", "changes", "received", "computed")
_NAMED = {  # values of PyTorch's own types, by name
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format))
}


@dataclass(frozen=True)
class Identity:
    """Identifies a function that is not a module's method, and describes the side effects of its calls.

    Attributes:
        name: functions with the same name do the same with equal modules and options.
        notes: returns the side effects of a traced call as JSON. Raises `Unstable` if they have no description.
        recall: repeats the side effects by the notes, if the function is not traced. Raises any error if it cannot.
    """

    name: str
    notes: Callable[[], Any] = lambda: None
    recall: Callable[[Any], None] = lambda notes: None


def stored_or_traced(
    record: Callable[[], Program], function: Callable[..., Any], modules: Sequence[nn.Module],
    identity: Identity | None, mesh: Mesh, device: torch.device, settings: Any,
) -> Program:  # fmt: skip
    """Return a program from disk, or trace it and store it there. No messages are sent.

    Args:
        record: traces the function.
        function: the function.
        modules: the modules whose weights it uses.
        identity: identifies the function; None if it is a module or a method of one. Graphs of others are not kept.
        mesh: this rank's place.
        device: where the program will run.
        settings: everything else that it depends on, with the same `repr` in all processes.
    """
    if os.environ.get("HALOVAE_GRAPHS") == "0":
        return record()
    identity = identity or Identity("")
    weights = {  # by their names in graphs
        (f"module_{index}." if len(modules) > 1 else "") + name: one
        for index, module in enumerate(modules)
        for name, one in (*module.named_parameters(), *module.named_buffers())
    }
    with_kernels = backends.kernels(device.type) is not None
    try:
        with RECORDING:  # modules have hooks while they are recorded
            key = fingerprint(function, modules, identity.name, (_FORMAT, settings, device.type, with_kernels))
    except Exception:  # attributes that users keep on modules can raise anything
        return record()
    path = cache_folder() / "graphs" / f"{key}.graph"
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:  # a damaged file can raise anything
        if gc.isenabled():  # a collection can take longer than reading a graph
            gc.disable()
            stack.callback(gc.enable)
        found, notes = _unpacked(path.read_bytes(), key, weights, mesh, device)
        identity.recall(notes)
        with contextlib.suppress(OSError):
            os.utime(path)  # it counts as used
        return found
    with _Reads() as reads:
        found = record()
    if not reads.found:
        with contextlib.suppress(Exception):  # values without a description: the graph is not kept
            _write(path, _packed(found, key, weights, device, identity.notes()))
    return found


class _Reads(TorchFunctionMode):
    """Detects reads of the values of tensors outside of the graph, such as weights, that are no operators of it."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            self.found = self.found or type(args[0]) in (Tensor, nn.Parameter)
        return func(*args, **(kwargs or {}))


def _packed(program: Program, key: str, weights: dict[str, Tensor], device: torch.device, notes: Any) -> bytes:
    """Return a program as a file's content. Raises any error if something has no description, or is too large."""
    graphs = {"": program.graph, **program.bodies}
    used = {str(node.target): None for graph in graphs.values() for node in graph.nodes if node.op == "get_attr"}
    own = {name: tensor for name in used if (tensor := program._attributes[name]) is not weights.get(name)}
    if sum(one.nbytes for one in own.values()) > LARGEST:
        raise Unstable("constants are too large")
    shared: dict[str, int] = {}  # values that many nodes have: their index, by their JSON
    content = {
        "notes": notes,
        "graphs": {name: _described(graph, shared, device) for name, graph in graphs.items()},
        "shared": list(shared),
        "weights": {name: _signature(weights[name]) for name in used if name not in own},
        "constants": {name: [one.shape, one.stride(), one.device == device] for name, one in own.items()},
        "fields": _encoded({name: getattr(program, name) for name in _FIELDS}, {}, device),
        "counters": [dict(program.fallbacks), dict(program.gathered)],
    }
    text = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)
    tensors = {name: _flat(tensor, device) for name, tensor in own.items()}
    packed = safetensors.torch.save({**tensors, "graph": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    return hashlib.sha256(key.encode() + packed).digest() + packed


def _unpacked(
    packed: bytes, key: str, weights: dict[str, Tensor], mesh: Mesh, device: torch.device
) -> tuple[Program, Any]:
    """Return the program and the notes in a file's content. Raises any error if the file is unusable."""
    if packed[:32] != hashlib.sha256(key.encode() + packed[32:]).digest():
        raise ValueError("damaged, or another graph")
    tensors = safetensors.torch.load(packed[32:])
    content = json.loads(zlib.decompress(tensors.pop("graph").numpy().tobytes()))
    if any(_signature(weights[name]) != signature for name, signature in content["weights"].items()):
        raise ValueError("other weights")
    attributes = {name: weights[name] for name in content["weights"]}
    for name, (shape, strides, here) in content["constants"].items():
        # A copy, since the file's memory is not aligned.
        attributes[name] = tensors[name].clone().as_strided(shape, strides).to(device if here else "cpu")
    known = map(json.loads, content["shared"])
    shared = [_target(*one) if type(one) is list else _decoded(one, [], device) for one in known]
    bodies = {name: _graph(one, shared, device) for name, one in content["graphs"].items()}
    fields = _decoded(content["fields"], [], device)
    plane = Plane(mesh)
    plane.fallbacks, plane.gathered = map(Counter, content["counters"])
    plane.received, plane.computed = fields.pop("received"), fields.pop("computed")
    return Program(bodies.pop(""), bodies, attributes=attributes, plane=plane, **fields), content["notes"]


def _described(graph: fx.Graph, shared: dict[str, int], device: torch.device) -> list[list[Any]]:
    places: dict[fx.Node, int] = {}
    found = []
    for node in graph.nodes:
        both = map(json.dumps, (_name(node), _encoded(node.meta, {}, device)))
        own = [_encoded(one, places, device) for one in (node.args, node.kwargs)]
        found.append([node.name, *(shared.setdefault(one, len(shared)) for one in both), *own])
        places[node] = len(places)
    return found


def _graph(described: list[Any], shared: list[Any], device: torch.device) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for name, target, meta, *how in described:
        args, kwargs = (_decoded(one, nodes, device) for one in how)
        (op, function), meta = shared[target], dict(shared[meta])
        nodes.append(graph.create_node(op, function, args, kwargs, name))
        nodes[-1].meta = meta
    return graph


def _name(node: fx.Node) -> tuple[str, str]:
    """A node's kind and the name of its target."""
    target: Any = node.target
    if node.op != "call_function":
        return node.op, str(target)
    name = str(target) if isinstance(target, OpOverload) else f"{target.__module__}.{target.__name__}"
    if _target(node.op, name)[1] is not target:
        raise Unstable(f"{target} is not what its name stands for")
    return node.op, name


@cache
def _target(op: str, name: str) -> tuple[str, Any]:
    """What a name stands for: an operator of ATen or of the plane, or an item of a result."""
    place, _, function = name.rpartition(".")
    if op != "call_function":
        return op, name
    if name == "_operator.getitem":
        return op, operator.getitem
    for module in (group_norms, operators, whole_maps, windows):
        if place == module.__name__:
            return op, getattr(module, function)
    package, packet = place.split(".")
    if package != "aten":
        raise Unstable(f"{name} is no operator")
    return op, getattr(getattr(torch.ops.aten, packet), function)


def _encoded(value: Any, places: dict[fx.Node, int], device: torch.device) -> Any:
    """Return a value as JSON: plain values and lists as they are, others with the name of their type."""
    kind = type(value)
    if kind in (bool, int, float, str, type(None)):
        return value
    if kind is fx.Node:
        return {"node": places[value]}
    if kind in (dict, fx.immutable_collections.immutable_dict) and all(type(one) is str for one in value):
        return {"dict": {name: _encoded(one, places, device) for name, one in value.items()}}
    if kind is torch.device:
        if value.type == device.type and value != device and value.index is not None:
            raise Unstable("another device")
        return {"device": None if value == device else str(value)}
    if _NAMED.get(str(value)) is value:
        return {"torch": str(value)}
    items: Any = (value.size, value.mesh_dim, value.bounds) if kind is Factor else value
    if kind is slice:
        items = value.start, value.stop, value.step
    names = {Factor: "factor", slice: "slice", tuple: "tuple", torch.Size: "tuple"}
    encoded = [_encoded(one, places, device) for one in items]
    return encoded if kind in (list, fx.immutable_collections.immutable_list) else {names[kind]: encoded}


def _decoded(value: Any, nodes: Sequence[fx.Node], device: torch.device) -> Any:
    if type(value) is list:
        return [_decoded(one, nodes, device) for one in value]
    if type(value) is not dict:
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        return {name: _decoded(one, nodes, device) for name, one in content.items()}
    if kind == "torch":
        return _NAMED[content]
    if kind == "device":
        return device if content is None else torch.device(content)
    items = [_decoded(one, nodes, device) for one in content]
    return tuple(items) if kind == "tuple" else {"factor": Factor, "slice": slice}[kind](*items)


def _flat(x: Tensor, device: torch.device) -> Tensor:
    """A constant's values, in the order in which they lie in memory."""
    x = x.detach()
    order = sorted(range(x.ndim), key=lambda dim: (x.stride()[dim], x.shape[dim]), reverse=True)
    dense = x.permute(order).is_contiguous() or x.numel() == 0
    plain = type(x) is Tensor and x.layout == torch.strided and x.device in (device, torch.device("cpu"))
    if not plain or not dense or x.is_conj() or x.is_neg():
        raise Unstable("a constant that is not dense, or elsewhere")
    return x.as_strided((x.numel(),), (1,)).cpu().clone()


def _signature(x: Tensor) -> Any:
    return [list(x.shape), list(x.stride()), str(x.dtype)]


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, then delete the least recently used files beyond `LIMIT`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".tmp", f"{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    files = []
    for one in path.parent.glob("*.graph*"):
        with contextlib.suppress(OSError):  # another rank deleted it
            files.append((one.stat().st_mtime, one.stat().st_size, one))
    total = 0
    for _, size, one in sorted(files, reverse=True):
        total += size
        if total > LIMIT:
            one.unlink(missing_ok=True)

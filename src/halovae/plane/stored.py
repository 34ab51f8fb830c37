"""Recorded graphs on disk: a later process that shards the same module in the same way reads them instead of tracing.

A file has a graph as JSON, and the constants that were computed for it, as safetensors. It has no code and no weights:
operators are looked up by their names, and weights are taken from the module. A file's name is the digest of all that
the graph depends on (`fingerprint`). If that is not certain, nothing is read or written.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import json
import operator
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from halovae.mesh import Mesh
from halovae.plane import operators
from halovae.plane.fingerprint import Unstable, fingerprint
from halovae.plane.layout import Factor
from halovae.plane.plane import Plane
from halovae.plane.program import Program
from halovae.plane.trace import RECORDING

LIMIT = 256 * 2**20  # bytes of all files
LARGEST = 64 * 2**20  # bytes of one graph's constants
_FORMAT = 1
_NAMED = {  # values of PyTorch's own kinds, by name
    f"{kind.__name__}.{str(value).removeprefix('torch.')}": value
    for kind in (torch.dtype, torch.layout, torch.memory_format)
    for value in vars(torch).values()
    if isinstance(value, kind)
}


@dataclass(frozen=True)
class Identity:
    """Says what a function does, where that cannot be seen: it has state, or leaves more than its result.

    Attributes:
        name: functions with one name do the same with equal modules and options.
        notes: what a traced call leaves besides its result, as JSON. Raises `Unstable` if that has no description.
        recall: takes the notes where the function is not traced. Any error stands for notes that are of no use.
    """

    name: str
    notes: Callable[[], Any] = lambda: None
    recall: Callable[[Any], None] = lambda notes: None


def cache_folder() -> Path:
    """Where graphs and calibrations are kept: `HALOVAE_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("HALOVAE_CACHE") or platformdirs.user_cache_path("halovae"))


def stored_or_traced(
    record: Callable[[], Program], function: Callable[..., Any], modules: Sequence[nn.Module],
    identity: Identity | None, mesh: Mesh, device: torch.device, settings: Any,
) -> Program:  # fmt: skip
    """A program from disk, else the traced one, which is then kept there. Nothing is sent.

    Args:
        record: traces it.
        function: what is traced.
        modules: whose weights it uses.
        identity: of the function; None to look into it.
        mesh: this rank's place.
        device: where the program will run.
        settings: what else it depends on, with the same `repr` in all processes.
    """
    if os.environ.get("HALOVAE_GRAPHS") == "0":
        return record()
    identity = identity or Identity("")
    weights = _weights(modules)
    key, found = "", None
    # Modules have hooks while they are recorded, and what users keep on them can raise anything.
    with RECORDING, _no_collection(), contextlib.suppress(Exception):
        key = fingerprint(function, modules, identity.name, (_FORMAT, settings, device.type))
        path = cache_folder() / "graphs" / f"{key}.graph"
        found = _read(path, key, weights, mesh, device, identity)
    if not key:
        return record()
    if found is None:
        with _Reads() as reads:
            found = record()
        if not reads.found:
            with contextlib.suppress(Unstable, OSError):
                _write(path, _packed(found, key, weights, device, identity.notes()))
    return found


def _read(
    path: Path, key: str, weights: dict[str, Tensor], mesh: Mesh, device: torch.device, identity: Identity
) -> Program | None:
    """The program in a file, which counts as used; None if there is none, or none that is of use."""
    try:
        found, notes = _unpacked(path.read_bytes(), key, weights, mesh, device)
        identity.recall(notes)
    except Exception:  # a damaged file can raise anything
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage: going through all objects of a process can take longer than reading a graph."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _weights(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by the names that graphs have for them, as `trace` has them."""
    found: dict[str, Tensor] = {}
    for index, module in enumerate(modules):
        prefix = f"module_{index}." if len(modules) > 1 else ""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.setdefault(prefix + name, tensor)
    return found


class _Reads(TorchFunctionMode):
    """Notes whether values of a tensor are read that is not of the graph, past its operators: of a weight, say."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            self.found = self.found or type(args[0]) in (Tensor, nn.Parameter)
        return func(*args, **(kwargs or {}))


class _Table:
    """Distinct values in JSON, so that each is written once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Where the value is."""
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def _packed(program: Program, key: str, weights: dict[str, Tensor], device: torch.device, notes: Any) -> bytes:
    """A program as a file's content.

    Raises:
        Unstable: a part of it has no description, or its constants are too large.
    """
    graphs = (program.graph, *program.bodies.values())
    used = {str(node.target): None for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    own = {name: tensor for name in used if (tensor := program._attributes[name]) is not weights.get(name)}
    if sum(one.nbytes for one in own.values()) > LARGEST:
        raise Unstable("constants are too large")
    for name, tensor in own.items():
        if type(tensor) is not Tensor or tensor.device not in (device, torch.device("cpu")):
            raise Unstable(f"{name}: a {type(tensor).__name__} on {tensor.device}")
    tensors = {name: _flat(tensor) for name, tensor in own.items()}
    metas, targets = _Table(), _Table()
    content = {
        "key": key,
        "notes": notes,
        "graph": _described(program.graph, metas, targets, device),
        "bodies": {name: _described(body, metas, targets, device) for name, body in program.bodies.items()},
        "metas": metas.values,
        "targets": targets.values,
        "weights": {name: _likeness(weights[name]) for name in used if name not in own},
        "constants": {
            name: [list(one.shape), list(one.stride()), one.device == device, _sum(tensors[name])]
            for name, one in own.items()
        },
        "fields": {
            name: _encoded(getattr(program, name), {}, device)
            for name in ("chunked", "takes", "returns", "dtype", "random", "writes", "received", "computed")
        },
        "counters": [dict(program.fallbacks), dict(program.gathered)],
    }
    text = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)
    tensors["graph"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    try:
        return safetensors.torch.save(tensors)
    except Exception as error:  # a dtype that it does not know
        raise Unstable(str(error)) from error


def _unpacked(
    content: bytes, key: str, weights: dict[str, Tensor], mesh: Mesh, device: torch.device
) -> tuple[Program, Any]:
    """The program in a file's content, and the notes in it. Raises any error if it is of no use."""
    tensors = safetensors.torch.load(content)
    known = json.loads(zlib.decompress(tensors.pop("graph").numpy().tobytes()))
    if known["key"] != key:
        raise ValueError("another graph")
    attributes = {}
    for name, likeness in known["weights"].items():
        if _likeness(weights[name]) != likeness:
            raise ValueError(f"{name} is another weight")
        attributes[name] = weights[name]
    for name, (shape, strides, here, digest) in known["constants"].items():
        flat = tensors[name]
        if _sum(flat) != digest:
            raise ValueError(f"{name} is damaged")
        # Memory of its own: the file's is not aligned.
        attributes[name] = flat.clone().as_strided(shape, strides).to(device if here else "cpu")
    targets = [_target(*one) for one in known["targets"]]
    metas = [{name: _decoded(one, [], device) for name, one in meta.items()} for meta in known["metas"]]
    graph, *bodies = (_graph(one, metas, targets, device) for one in (known["graph"], *known["bodies"].values()))
    plane = Plane(mesh)
    fields = {name: _decoded(one, [], device) for name, one in known["fields"].items()}
    plane.fallbacks, plane.gathered = map(Counter, known["counters"])
    plane.received, plane.computed = fields["received"], fields["computed"]
    program = Program(
        graph, dict(zip(known["bodies"], bodies, strict=True)), fields["chunked"], attributes, plane, fields["takes"],
        fields["returns"], fields["dtype"], fields["random"], fields["writes"],
    )  # fmt: skip
    return program, known["notes"]


def _described(graph: fx.Graph, metas: _Table, targets: _Table, device: torch.device) -> list[Any]:
    places: dict[fx.Node, int] = {}
    found = []
    for node in graph.nodes:
        meta = {name: _encoded(one, {}, device) for name, one in node.meta.items()}
        args, kwargs = (_encoded(one, places, device) for one in (node.args, dict(node.kwargs)))
        found.append([node.name, targets.place(_name(node)), metas.place(meta), args, kwargs])
        places[node] = len(places)
    return found


def _graph(described: list[Any], metas: list[Any], targets: list[Any], device: torch.device) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for name, target, meta, args, kwargs in described:
        op, function = targets[target]
        node = graph.create_node(
            op, function, _decoded(args, nodes, device), _decoded(kwargs, nodes, device), name
        )  # fmt: skip
        node.meta = dict(metas[meta])
        nodes.append(node)
    return graph


def _name(node: fx.Node) -> tuple[str, str]:
    """A node's kind and target by name."""
    target: Any = node.target
    if node.op != "call_function":
        return node.op, str(target)
    name = "getitem" if target is operator.getitem else f"operators.{getattr(target, '__name__', '')}"
    if isinstance(target, OpOverload):
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
    try:
        found = _target(node.op, name)[1]
    except (AttributeError, ValueError) as error:
        raise Unstable(f"{target} has no name") from error
    if found is not target:
        raise Unstable(f"{target} is not what its name stands for")
    return node.op, name


@cache
def _target(op: str, name: str) -> tuple[str, Any]:
    """What a name stands for: an operator of ATen or of `plane.operators`, or an item of a result."""
    if op != "call_function":
        return op, name
    if name == "getitem":
        return op, operator.getitem
    package, function, *overload = name.split(".")
    if package == "aten":
        return op, getattr(getattr(torch.ops.aten, function), *overload)
    own = getattr(operators, function)
    if package != "operators" or not inspect.isfunction(own) or own.__module__ != operators.__name__:
        raise ValueError(f"{name} is no operator")
    return op, own


def _encoded(value: Any, places: dict[fx.Node, int], device: torch.device) -> Any:
    """A value in JSON: plain ones and lists as they are, others with the name of their kind."""
    kind = type(value)
    if kind in (bool, int, float, str, type(None)):
        return value
    if kind is fx.Node and value in places:
        return {"node": places[value]}
    if kind is Factor:
        return {"factor": [value.size, value.mesh_dim, list(value.bounds)]}
    if kind in (list, fx.immutable_collections.immutable_list):
        return [_encoded(one, places, device) for one in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [_encoded(one, places, device) for one in value]}
    if kind is slice:
        return {"slice": [_encoded(one, places, device) for one in (value.start, value.stop, value.step)]}
    if kind in (dict, fx.immutable_collections.immutable_dict) and all(type(one) is str for one in value):
        return {"dict": {name: _encoded(one, places, device) for name, one in value.items()}}
    if kind is torch.device:
        if value.type == device.type and value != device and value.index is not None:
            raise Unstable("another device")
        return {"here": None} if value == device else {"device": str(value)}
    name = f"{kind.__name__}.{str(value).removeprefix('torch.')}"
    if _NAMED.get(name) is value:
        return {"torch": name}
    raise Unstable(f"an argument is a {kind.__name__}")


def _decoded(value: Any, nodes: Sequence[fx.Node], device: torch.device) -> Any:
    if type(value) is list:
        return [_decoded(one, nodes, device) for one in value]
    if type(value) is not dict:
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple([_decoded(one, nodes, device) for one in content])
    if kind == "dict":
        return {name: _decoded(one, nodes, device) for name, one in content.items()}
    if kind == "torch":
        return _NAMED[content]
    if kind == "factor":
        return Factor(content[0], content[1], tuple(content[2]))
    if kind == "slice":
        return slice(*(_decoded(one, nodes, device) for one in content))
    if kind == "here":
        return device
    if kind == "device":
        return torch.device(content)
    raise ValueError(kind)


def _flat(x: Tensor) -> Tensor:
    """A constant's values as they lie in memory."""
    x = x.detach()
    order = sorted(range(x.ndim), key=lambda dim: (x.stride()[dim], x.shape[dim]), reverse=True)
    dense = x.permute(order).is_contiguous() or x.numel() == 0
    if not dense or x.layout != torch.strided or x.is_meta or x.is_conj() or x.is_neg():
        raise Unstable("a constant that is not dense")
    return x.as_strided((x.numel(),), (1,)).cpu().clone()


def _sum(flat: Tensor) -> str:
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _likeness(x: Tensor) -> Any:
    return [list(x.shape), list(x.stride()), str(x.dtype)]


def _write(path: Path, content: bytes) -> None:
    """Write a file at once or not at all, then delete those that were not used for longest."""
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

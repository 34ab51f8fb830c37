"""Record what one rank does as a flat graph of local operators and operators between ranks.

Operators run on meta tensors while they are recorded, so no device, no other rank and no memory is needed. Values that
do not depend on the input (masks, positions, schedules) are computed once and become constants of the graph.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from halovae.device.memory import tensors_in
from halovae.distributed.mesh import Mesh
from halovae.errors import TraceError
from halovae.plane import operators
from halovae.plane.chunks import split
from halovae.plane.constants import Constants, Memory
from halovae.plane.context import without_gradients
from halovae.plane.cuts import cut_early
from halovae.plane.hooks import paths, untouched
from halovae.plane.layout import local_shape
from halovae.plane.passes import chosen, improve
from halovae.plane.plane import Plane
from halovae.plane.program import Program
from halovae.plane.repeats import LeakError, Repeats, clean
from halovae.plane.rules.registry import is_composite, plane_tensors, unwriting, written
from halovae.plane.strip_graphs import rewrite
from halovae.plane.strips import Strips
from halovae.plane.tensor import is_channels_last
from halovae.plane.values import location, mapped, signature

aten = torch.ops.aten
RECORDING = threading.Lock()  # hooks on modules serve only one recording at a time


class Recorder(TorchDispatchMode):
    """Records the operators of one rank.

    Args:
        device: where the graph will run.
        names: parameters and buffers by `id`, with their names. They stay attributes of the graph.

    Attributes:
        graph: the recorded graph.
        attributes: the tensors that it reads, by name.
        module: the path of the submodule that is being called.
        plane: the plane whose operators are recorded.
        random: whether the graph draws random numbers.
        written: the storages that operators write to, one for each write.
    """

    def __init__(self, device: torch.device, names: dict[int, str]) -> None:
        super().__init__()
        self.device = device
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self.module = ""
        self.plane: Plane | None = None
        self.random = False
        self._names = names
        self._lifted: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by id and version: the tensor and its twin
        self._known: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self.written: list[Memory] = []
        self._memory: dict[int, Memory] = {}  # of each storage, by its id
        self._values = Constants()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports torch._dynamo, which takes seconds

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Add an input to the graph, and return its tensor."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            x = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.noted(x, self.graph.placeholder(name), False)
        return x

    def operator(self, function: Callable[..., Tensor], args: tuple[Any, ...], mesh: Mesh) -> Tensor:
        """Record a call of an operator between ranks, or of one that PyTorch would decompose."""
        with _disable_current_modes():
            args = tuple(self._twin(one) if isinstance(one, Tensor) else one for one in args)
            result, messages, sent = operators.shape_of(function, args, mesh)
        node = self.graph.call_function(function, tuple(map(self.node, args)))
        node.meta |= {"messages": messages, "sent": sent}
        self.noted(result, node, False)
        return result

    def empty(self, func: Any, args: tuple[Any, ...], sizes: Sequence[int], times: Sequence[int]) -> Tensor:
        """Record a resampling of a map without rows, which PyTorch refuses to compute; each cell becomes `times`."""
        with _disable_current_modes():
            result = torch.empty(tuple(sizes), dtype=args[0].dtype, device="meta")
            node = self.graph.call_function(func, mapped(self.node, mapped(self._twin, args)))
        node.meta["times"] = tuple(times)
        self.noted(result, node, False)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(True for _ in plane_tensors((*args, *kwargs.values()))):
            return NotImplemented
        if is_composite(func) and any(one.is_inference() for one in tensors_in((*args, *kwargs.values()))):
            with self:  # PyTorch decomposes operators on other tensors before
                return func.decompose(*args, **kwargs)
        result = self._recorded(func, args, kwargs)
        if self.plane is None or self.plane.inside:
            return result
        # Outside of rules, no meta tensors may appear: modules ask tensors for their device.
        lift, is_ours = self.plane.lift, lambda one: hasattr(one, "halovae_node")
        return mapped(lambda one: lift(one) if is_ours(one) else one, result)

    def _recorded(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_in((*args, *kwargs.values())))
        if func in (aten.lift_fresh.default, aten.detach_.default):  # the last operators of torch.tensor
            return self._twin(args[0])
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random and isinstance(kwargs.get("generator"), torch.Generator):
            raise TraceError(f"{func} draws from a generator that is an argument of the call{location()}")
        self.random = self.random or random
        args, kwargs = mapped(self._twin, (tuple(args), kwargs))
        constant = not random and all(self.memory(self._twin(one)).constant for one in tensors)
        if func in (aten._local_scalar_dense.default, aten.item.default) or torch.Tag.dynamic_output_shape in func.tags:
            if not constant:
                raise TraceError(f"{func} reads values that depend on the input{location()}")
            result = self._values.call(func, mapped(self.node, (args, kwargs)), self.graph, self.attributes)
            return mapped(self._twin, result)
        targets = written(func)
        if targets and not random and self._made_anew(func, args, kwargs, constant):
            return args[targets[0]]
        made_on_host = not tensors and self.device.type != "cpu" and _is_made_on_host(func, kwargs)
        if made_on_host and not random:
            kwargs = {**kwargs, "device": self.device}
        node = self.graph.call_function(func, *mapped(self.node, (args, kwargs)))
        if made_on_host and random:  # the host's generator draws
            node = self.graph.call_function(aten._to_copy.default, (node,), {"device": self.device})
        node.meta["constant"] = constant
        if targets:
            target: Tensor = args[targets[0]]
            memory = self.memory(target)
            if memory.attribute:
                raise TraceError(f"{func} writes to a tensor that is not of this call{location()}")
            memory.write(constant)
            self.written.append(memory)
            return target
        return self._results(self._on_meta(func, args, kwargs), node, constant)

    def _made_anew(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constant: bool) -> bool:
        """Record an operator that writes to a tensor as one that makes a new tensor, if no view of the old one is left.

        No pass runs over a graph that writes.
        """
        target: Tensor = args[0]
        memory, function = self.memory(target), unwriting(func)
        others = memory.alike
        if function is None or memory.attribute or not others or (memory.constant and constant):
            return False
        if func is aten.copy_.default and args[1].shape == target.shape and args[1].dtype == target.dtype:
            contiguous = torch.contiguous_format if target.is_contiguous() else torch.preserve_format
            function, args, kwargs = aten.clone.default, args[1:2], {"memory_format": contiguous}
        result = self._on_meta(function, args, kwargs)
        if any(getattr(result, name) != getattr(target, name) for name in ("shape", "dtype")):
            return False
        if result.stride() != target.stride():
            return False
        node = self.graph.call_function(function, *mapped(self.node, (args, kwargs)))
        node.meta |= {
            "shape": tuple(target.shape),
            "dtype": target.dtype,
            "bytes": target.numel() * target.element_size(),
        }
        node.meta |= {"module": self.module, "constant": False}
        memory.constant, memory.changed = False, True
        memory.nodes.append(node)
        self.written.append(memory)
        for one in others:
            one.halovae_node = node  # type: ignore[attr-defined]
        return True

    def _on_meta(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
        if not _makes_one(func):
            return func(*args, **kwargs)
        key = func, signature(args), signature(kwargs)
        if key not in self._known:
            result = func(*args, **kwargs)
            # On devices with channels-last maps, a channels-last input or weight makes the result channels-last.
            format_ = {4: torch.channels_last, 5: torch.channels_last_3d}.get(result.ndim)
            if func is aten.convolution.default and format_ is not None and any(map(is_channels_last, args[:2])):
                result = torch.empty_like(result, memory_format=format_)
            self._known[key] = result.shape, result.stride(), result.dtype
        shape, strides, dtype = self._known[key]
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")

    def _results(self, result: Any, node: fx.Node, constant: bool) -> Any:
        if isinstance(result, Tensor):
            self.noted(result, node, constant)
        if isinstance(result, (tuple, list)):
            for index, one in enumerate(result):
                if isinstance(one, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, index))
                    item.meta["constant"] = constant
                    self.noted(one, item, constant)
        return result

    def noted(self, result: Tensor, node: fx.Node, constant: bool, attribute: bool = False) -> Memory:
        """Note a node's result, and return the memory that it lies in."""
        node.meta |= {"shape": tuple(result.shape), "dtype": result.dtype, "module": self.module}
        node.meta["bytes"] = result.numel() * result.element_size()
        result.halovae_node = node  # type: ignore[attr-defined]
        storage = result.untyped_storage()
        memory = self._memory.setdefault(id(storage), Memory(storage, constant, attribute))
        memory.nodes.append(node)
        memory.tensors.append(weakref.ref(result))
        return memory

    def memory(self, x: Tensor) -> Memory:
        """The memory that a tensor lies in."""
        return self._memory[id(x.untyped_storage())]

    def _twin(self, x: Tensor) -> Tensor:
        """Return a tensor of the graph itself, or the meta twin of one from outside, which becomes an attribute."""
        if hasattr(x, "halovae_node"):
            return x
        named = id(x) in self._names
        key = (id(x), 0 if named or x.is_inference() else x._version)
        if key not in self._lifted:
            name = self._names[id(x)] if named else f"constant_{len(self.attributes)}"
            self.attributes[name] = x if named else self._own(x)
            twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            node = self.graph.create_node("get_attr", name)
            node.meta["constant"] = not named
            self.noted(twin, node, not named, True)
            self._lifted[key] = x, twin
        return self._lifted[key][1]

    def _own(self, x: Tensor) -> Tensor:
        """Copy a tensor from outside: it may be written to later. Within the call, all tensors claim one device."""
        return x.clone() if x.device.type == self.device.type else x.to(self.device)

    def node(self, value: Any) -> Any:
        """The node of a tensor; other values as they are."""
        return self._twin(value).halovae_node if isinstance(value, Tensor) else value  # type: ignore[attr-defined]

    def is_constant(self, x: Tensor) -> bool:
        """Whether a tensor does not depend on the input."""
        memory = self.memory(self._twin(x))
        return memory.constant or memory.attribute

    def writes(self, x: Tensor) -> bool:
        """Whether an operator writes to a tensor, or to a view of it."""
        return self.memory(x).written

    def changes(self, x: Tensor) -> bool:
        """Whether a tensor, or a view of it, was changed since it was made."""
        return self.memory(x).changed

    def finish(self, result: Tensor, repeats: Repeats) -> tuple[dict[str, fx.Graph], int | None]:
        """Make the graph return `result`, compute constants, and remove unused nodes.

        Returns:
            The graphs that it calls, and the dim along which it hands out its result in chunks; None if it does not.
        """
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            self.graph.output(self.node(result))
        for memory in self._memory.values():
            for node in memory.nodes:
                node.meta["constant"] = node.meta.get("constant", False) and memory.constant
                if node.target is aten.view.default and not memory.written:
                    # Its input may have other strides on a device than on meta.
                    node.target = aten.reshape.default
        moving = {node for memory in self._memory.values() if memory.written for node in memory.nodes}
        fixed = {node for node in self.graph.nodes if node.meta.get("constant") and node not in moving}
        cut_early(self.graph, self.attributes, fixed.__contains__, self.device)
        self._values.fold(self.graph, self.attributes)
        clean(self.graph)
        bodies = repeats.outline(self.graph)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            chunked = split(self.graph, bodies)
        clean(self.graph)
        for graph in (self.graph, *bodies.values()):
            graph.lint()
        return bodies, chunked


def trace(
    function: Callable[..., Tensor],
    modules: Sequence[nn.Module],
    mesh: Mesh,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    multiple: int = 1,
    extras: Sequence[tuple[Sequence[int], torch.dtype]] = (),
    passes: Sequence[str] | None = None,
    strips: Strips | None = None,
) -> Program:
    """Record what one rank does when a function is called with a tensor that is partitioned over a mesh.

    Args:
        function: from latents to pictures, or the reverse: `[..., H, W]` to `[..., H', W']`.
        modules: the modules whose parameters and buffers it uses; they are shared with the program.
        mesh: the mesh, and this rank's position on it. No messages are sent.
        shape: the shape of the whole input.
        dtype: the dtype of the input.
        device: where the program will run.
        multiple: along H and W, where it divides the input's extent, it also divides all bounds.
        extras: shapes and dtypes of further arguments of the function, which are replicated.
        passes: the passes that rewrite the graph; None for the ones in `HALOVAE_PASSES`, by default all.
        strips: how ranks that run one after the other cut maps; None for ranks that run at once.

    Raises:
        TraceError: the function reads values of its input, or draws from a generator of its own.
    """
    names = chosen() if passes is None else passes
    try:
        return _traced(function, modules, mesh, shape, dtype, device, multiple, extras, modules, names, strips)
    except LeakError:
        return _traced(function, modules, mesh, shape, dtype, device, multiple, extras, (), names, strips)


def _traced(
    function: Callable[..., Tensor], modules: Sequence[nn.Module], mesh: Mesh, shape: Sequence[int], dtype: torch.dtype,
    device: torch.device, multiple: int, extras: Sequence[tuple[Sequence[int], torch.dtype]],
    watched: Sequence[nn.Module], passes: Sequence[str], strips: Strips | None,
) -> Program:  # fmt: skip
    names: dict[int, str] = {}
    for index, module in enumerate(modules):
        prefix = f"module_{index}." if len(modules) > 1 else ""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            names.setdefault(id(tensor), prefix + name)
    recorder = Recorder(device, names)
    plane = recorder.plane = Plane(mesh, recorder, strips)
    layout = plane.layout_of(tuple(shape), multiple)
    with RECORDING, ExitStack() as stack:
        stack.enter_context(plane.active())
        stack.enter_context(recorder)
        for module in modules:
            stack.enter_context(untouched(module))
            stack.enter_context(paths(module, recorder))
        repeats = Repeats(recorder, watched)
        stack.enter_context(repeats.watched())
        cached = torch.is_autocast_cache_enabled()  # autocast would keep this graph's casts of weights
        torch.set_autocast_cache_enabled(False)
        stack.callback(torch.set_autocast_cache_enabled, cached)
        with without_gradients():  # weights may have been made in inference mode
            x = plane.wrap(recorder.input("x", local_shape(layout, plane.coordinates), dtype), layout)
            inputs = [recorder.input(f"extra_{index}", *one) for index, one in enumerate(extras)]
            result = function(x, *map(plane.lift, inputs))
            if not isinstance(result, Tensor):
                raise TypeError(f"expected a function that returns a tensor, but it returned {type(result).__name__}")
            lifted = plane.lift(result)
        bodies, chunked = recorder.finish(lifted.local, repeats)
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        if strips is not None:
            next(reversed(recorder.graph.nodes)).meta |= {"cuts": tuple(sorted(plane.cuts)), "placed": plane.placed}
            rewrite(recorder.graph, bodies, mesh, strips, device)
        changes = improve((recorder.graph, *bodies.values()), mesh, passes)
    return Program(
        recorder.graph,
        bodies,
        chunked,
        recorder.attributes,
        plane,
        layout,
        lifted.partition,
        lifted.dtype,
        recorder.random,
        recorder.writes(x.local),
        changes,
    )


def _is_made_on_host(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator without tensors makes one on the CPU, because its call names that or no device."""
    made = kwargs.get("device") or torch.get_default_device()
    return torch.device(made).type == "cpu" and any(one.name == "device" for one in func._schema.arguments)


@cache
def _makes_one(func: Any) -> bool:
    """Whether an operator returns one new tensor, whose shape follows from those of its arguments."""
    returns = func._schema.returns
    made = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType) and returns[0].alias_info is None
    return made and not written(func) and not is_composite(func)

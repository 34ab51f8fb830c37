"""A device that is not there: an accelerator for torch whose memory is the host's, and which notices every misuse.

It is torch's Python `PrivateUse1` backend. A boxed fallback runs each operator on CPU tensors over the same memory, so
results are the CPU's. It behaves like an accelerator where mistakes hide on the CPU:

- Operators refuse tensors of different devices, as CUDA's do. One number on the CPU is allowed in pointwise operators.
- Its addresses point nowhere, so code that passes `data_ptr()` to the host's kernels crashes. `numpy()` is refused.
- Whatever makes the host wait for the device is counted: reading a value (`item`, `bool`, `tolist`), copies from and to
  the host, results whose size depends on values, comparing tensors, and `synchronize`.

Storages are shared by views, strides are those of the CPU's results, and live and peak bytes are counted, all as on a
device. Registration is for good, and once per process: `install` is called in processes of its own.
"""

from __future__ import annotations

import os
import threading
import traceback
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

FAR = 1 << 46  # between the device's addresses and the host's
TOTAL = 64 << 30
HOST = torch.device("cpu")

# Operators that wait for the device: they return a value, or a result whose size depends on values.
_WAITS = {
    "_local_scalar_dense", "equal", "nonzero", "nonzero_numpy", "masked_select", "bincount", "unique_dim", "_unique2",
    "_unique", "unique_consecutive", "unique_dim_consecutive", "argwhere", "is_nonzero", "allclose",
}  # fmt: skip
# The host's kernels of these only make another view of a storage, on whatever device it is.
_VIEWS = (
    aten.as_strided.default, aten.view.default, aten._reshape_alias.default, aten.unfold.default,
    aten.set_.source_Storage_storage_offset, aten.set_.source_Tensor, aten.set_.source_Storage,
)  # fmt: skip


@dataclass
class Watch:
    """What a piece of work did that it must not do while a device computes.

    Attributes:
        waits: what made the host wait for the device, each with the line of halovae or of a test that called it.
        on_host: operators on tensors of several values that lie on the CPU.
    """

    waits: list[str] = field(default_factory=list)
    on_host: list[str] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)


class _State:
    """Live storages and their memory; what watches; one lock, since simulated ranks are threads."""

    kind = ""
    lock = threading.RLock()
    memory: dict[int, Any] = {}  # noqa: RUF012
    watches: list[Watch] = []  # noqa: RUF012
    live = peak = 0


@contextmanager
def watching() -> Iterator[Watch]:
    """Note what this thread does within the context."""
    watch = Watch()
    _State.watches.append(watch)
    try:
        with _HostMode(watch):
            yield watch
    finally:
        _State.watches.remove(watch)


def wait(what: str) -> None:
    """Note that the host waits for the device."""
    for watch in _State.watches:
        if watch.thread == threading.get_ident():
            watch.waits.append(f"{what} in {_caller()}")


def _caller() -> str:
    """The innermost line that is not of torch, of this file, of a recorded graph, or of what all calls go through."""
    through = (__file__, "device/kinds.py", "rules/creation.py")
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.endswith(through) and frame.filename[0] != "<":
            return f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} ({frame.name})"
    return "torch"


class _HostMode(TorchDispatchMode):
    """Notes operators that compute on the CPU. Tensors of one value do not count: they are arguments of kernels."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        if any(one.device == HOST and one.ndim for one in found):
            self._watch.on_host.append(f"{func} in {_caller()}")
        return result


def kind() -> str:
    """The device's type."""
    return _State.kind


def is_on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == _State.kind


def _on_host(x: Tensor) -> Tensor:
    """A CPU tensor over a device tensor's memory."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    held = _State.memory.get(storage.data_ptr() - FAR)
    if held is None:
        raise RuntimeError("a storage that this device did not allocate, as `copy.deepcopy` makes it")
    host: Tensor = torch.empty(0, dtype=x.dtype).set_(held, x.storage_offset(), x.size(), x.stride())
    return torch._conj(host) if x.is_conj() else host


def _on_device(x: Tensor) -> Tensor:
    """A device tensor over a CPU tensor's memory, which it keeps alive."""
    held = x.untyped_storage()
    size = held.nbytes()
    blank: Tensor = torch._C._acc.create_empty_tensor((0,), x.dtype)
    if not size:
        return _redispatch(aten.as_strided.default, blank, x.size(), x.stride(), 0)
    storage = torch._C._construct_storage_from_data_pointer(held.data_ptr() + FAR, torch.device(_State.kind, 0), size)
    key = held.data_ptr()
    with _State.lock:
        _State.memory[key] = held
        _State.live += size
        _State.peak = max(_State.peak, _State.live)
    weakref.finalize(storage, _freed, key, size)
    return _set(blank, storage, x)


def _freed(key: int, size: int) -> None:
    with _State.lock:
        _State.memory.pop(key, None)
        _State.live -= size


def _redispatch(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
    return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


def _run(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run any operator: the backend's fallback."""
    with torch._C.DisableTorchFunction():
        _check(operator, args, kwargs)
        if operator in _VIEWS:
            return _redispatch(operator, *args, **kwargs)
        if operator._schema.name.removeprefix("aten::") in _WAITS or _by_mask(operator, args):
            wait(str(operator))
        twins: list[tuple[Tensor, Tensor]] = []

        def lowered(x: Any) -> Any:
            if is_on_device(x):
                # An empty tensor may be resized by the operator.
                twin = _on_host(x) if x.numel() else torch.empty(x.shape, dtype=x.dtype)
                twins.append((x, twin))
                return twin
            return HOST if isinstance(x, torch.device) else x

        def lifted(x: Tensor) -> Tensor:
            for original, twin in twins:
                if x is twin:
                    return original
                if twin.numel() and x.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr():
                    return _redispatch(aten.as_strided.default, original, x.size(), x.stride(), x.storage_offset())
            return _on_device(x)

        args = tuple(map(_number_as_tensor, operator._schema.arguments, args))
        result = operator(*_mapped(lowered, args), **_mapped(lowered, kwargs))
        for x, twin in twins:
            if (x.shape, x.stride()) != (twin.shape, twin.stride()):  # given as `out`, and resized
                same = x.untyped_storage().data_ptr() - FAR == twin.untyped_storage().data_ptr()
                new = x if same else _on_device(twin)
                _set(x, new.untyped_storage(), twin)
        return _mapped(lambda x: lifted(x) if isinstance(x, Tensor) else x, result)


def _number_as_tensor(argument: Any, value: Any) -> Any:
    """Undo what torch does to tensors that hold a number of Python's before it calls a fallback in Python."""
    number = isinstance(value, (int, float, bool)) and str(argument.type) == "Tensor"
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if number else value


def _set(x: Tensor, storage: Any, like: Tensor) -> Tensor:
    """Make a device tensor one over a storage, with the sizes and strides of another tensor."""
    arguments = storage, like.storage_offset(), like.size(), like.stride()
    return _redispatch(aten.set_.source_Storage_storage_offset, x, *arguments)


def _mapped(function: Any, values: Any) -> Any:
    """Apply a function to each value in lists, tuples, and a dict, as operators take and return them."""
    if isinstance(values, (tuple, list)):
        return type(values)([_mapped(function, one) for one in values])
    if isinstance(values, dict):
        return {name: _mapped(function, one) for name, one in values.items()}
    return function(values)


def _leaves(values: Any) -> Iterator[Any]:
    for one in values:
        if isinstance(one, (tuple, list)):
            yield from _leaves(one)
        else:
            yield one


def _check(operator: OpOverload, args: Any, kwargs: Any) -> None:
    """Refuse tensors of several devices.

    Raises:
        RuntimeError: there are such, and not only numbers on the CPU in a pointwise operator.
    """
    for one in _leaves((*args, *kwargs.values())):
        if isinstance(one, Tensor) and one.device.type != _State.kind:
            is_number = one.ndim == 0 and one.device == HOST and torch.Tag.pointwise in operator.tags
            if not is_number and not (operator._schema.name == "aten::index_put_" and one.ndim == 0):
                raise RuntimeError(
                    f"{operator}: expected all tensors to be on the same device, but found one of shape "
                    f"{list(one.shape)} on {one.device} and others on {_State.kind}"
                )


def _by_mask(operator: OpOverload, args: Any) -> bool:
    """Whether an operator indexes by a mask, so that its work depends on the mask's values."""
    if operator._schema.name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within the device, or from or to the host. The latter waits: the host's memory is never pinned here."""
    with torch._C.DisableTorchFunction():
        from_host, to_host = not is_on_device(source), not is_on_device(target)
        if from_host or to_host:
            wait(f"a copy {'to' if to_host else 'from'} the host of {list(source.shape)}")
        (target if to_host else _on_host(target)).copy_(source if from_host else _on_host(source))
    return target


def _convolution(*args: Any) -> Tensor:
    return _run(aten.convolution.default, *args)


def _group_norm(*args: Any) -> tuple[Tensor, ...]:
    return _run(aten.native_group_norm.default, *args)


def _empty(shape: Any, dtype: Any = None, memory_format: Any = None, **options: Any) -> Tensor:
    with torch._C.DisableTorchFunction():
        kind = torch.contiguous_format if memory_format is None else memory_format
        return _on_device(torch.empty(shape, dtype=dtype, memory_format=kind))


def _empty_strided(shape: Any, stride: Any, dtype: Any = None, **options: Any) -> Tensor:
    with torch._C.DisableTorchFunction():
        return _on_device(torch.empty_strided(shape, stride, dtype=dtype))


class HostKernels:
    """A module of kernels, such as Triton's interpreter runs, called with CPU tensors over the device's memory."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._module, name)

        def call(*args: Any) -> Any:
            given = [one for one in _leaves(args) if isinstance(one, Tensor)]
            if not all(map(is_on_device, given)):
                raise RuntimeError(f"{name}: expected all tensors on {kind()}, got {[one.device for one in given]}")
            with _disable_current_modes():  # the interpreter works on the host
                result = kernel(*_mapped(lambda x: _on_host(x) if isinstance(x, Tensor) else x, args))
            return _on_device(result) if isinstance(result, Tensor) else result

        return call


class _Event:
    """An event whose clock is the host's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        import time

        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        """A queue waits, and not the host."""

    def synchronize(self) -> None:
        wait("Event.synchronize")

    def elapsed_time(self, later: _Event) -> float:
        assert self._timing
        return (later._at - self._at) * 1000


def _module(kind: str) -> types.ModuleType:
    """What is `torch.cuda` for CUDA devices."""
    module: Any = types.ModuleType(f"torch.{kind}")

    def reset(device: Any = None) -> None:
        _State.peak = _State.live

    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.manual_seed_all = lambda seed: None
    module.get_device_name = lambda device=None: "a device that is not there"
    module.synchronize = lambda device=None: wait("synchronize")
    module.mem_get_info = lambda device=None: (TOTAL - _State.live, TOTAL)
    module.memory_allocated = module.memory_reserved = lambda device=None: _State.live
    module.max_memory_allocated = module.max_memory_reserved = lambda device=None: _State.peak
    module.reset_peak_memory_stats = reset
    module.empty_cache = lambda: None
    module.Event = _Event
    return module


_libraries: list[torch.library.Library] = []


def install(kind: str) -> None:
    """Register the device.

    Args:
        kind: its type's name. With "npu" halovae follows that device's rules.
    """
    _State.kind = kind
    os.environ["HALOVAE_CAPTURE"] = "1"
    _setup_privateuseone_for_python_backend(kind, _module(kind))
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    some.impl("_copy_from", _copy_from, "PrivateUse1")
    some.impl("convolution_overrideable", _convolution, "PrivateUse1")
    some.impl("native_group_norm", _group_norm, "PrivateUse1")  # torch's own for new devices refuses channels last
    # `torch.tensor` within a dispatch mode allocates in a way that a fallback in Python cannot serve.
    some.impl("empty.memory_format", lambda size, **given: _empty(size, **given), "PrivateUse1")
    some.impl("empty_strided", lambda size, stride, **given: _empty_strided(size, stride, **given), "PrivateUse1")
    _libraries.extend((everything, some))

"""Keys of a recorded graph: options, flags and buffers of modules, and a digest of their weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import world_size
from halovae.plane.passes import chosen

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)


def module_key(module: nn.Module) -> Any:
    """The flags, buffers and hooks of one module, without submodules and weights."""
    values = tuple(
        (name, (id(value), value._version) if isinstance(value, Tensor) and not value.is_inference() else value)
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, *_SIMPLE))
    )
    hooks = tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
    return id(module), type(module), values, hooks, tuple(map(id, module._buffers.values()))


def value_key(value: Any) -> Any:
    """Return an option as a key; None if it cannot be compared by value. All generators are equal: graphs use none."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, Mapping):
        found: Any = [(str(name), value_key(one)) for name, one in value.items()]
        return None if any(one is None for _, one in found) else tuple(found)
    if isinstance(value, (list, tuple)):
        found = [value_key(one) for one in value]
        return None if None in found else tuple(found)
    return None


def hooked(module: nn.Module) -> Iterator[str]:
    """Names of submodules whose hooks move or cast weights (offloading, layerwise casting)."""
    for name, one in module.named_modules():
        if hasattr(one, "_diffusers_hook") or (name and hasattr(one, "_hf_hook")):
            yield name or type(one).__name__


class WeightsDigest:
    """The digest of modules' weights, computed once until they change.

    It is computed again if a weight is another tensor, or has other memory, another dtype or another device, if
    PyTorch's counter of writes (`_version`) moved, or if the world size changed. Writes to `.data` are not detected.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._weights: list[weakref.ref[Tensor]] = []
        self._state: Any = None
        self._digest = ""

    def __call__(self) -> str:
        """Return the digest."""
        weights = [one for module in self._modules for one in module.parameters()]
        state = world_size(), [_state(one) for one in weights]
        known = [ref() for ref in self._weights]  # not their addresses: a new tensor may have that of an old one
        if state != self._state or not all(one is other for one, other in zip(weights, known, strict=True)):
            self._digest = weights_digest(self._modules)
            self._weights, self._state = [weakref.ref(one) for one in weights], state
        return self._digest


def _state(weight: Tensor) -> Any:
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, weight.device, version


def weights_digest(modules: Sequence[nn.Module]) -> str:
    """Return a digest of all weights' shapes and sums, to find ranks with other weights; empty in a world of one."""
    if not dist.is_initialized() or world_size() == 1:
        return ""
    sums = [one.detach().double().sum() for module in modules for one in module.parameters() if not one.is_meta]
    shapes = hash(tuple(tuple(one.shape) for module in modules for one in module.parameters()))
    total = float(torch.stack(sums).mul(torch.arange(1, len(sums) + 1, device=sums[0].device)).sum()) if sums else 0.0
    return f"{shapes:x}/{total!r}"


def settings(mesh: Mesh, x: Tensor, extras: Sequence[Tensor], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a graph depends on besides the modules, the function and the device."""
    shapes = tuple((tuple(one.shape), one.dtype) for one in (x, *extras))
    kind = x.device.type
    casting = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return mesh.grid, mesh.rank, shapes, value_key(options), casting, torch.get_default_dtype(), chosen()


def device_of(modules: Sequence[nn.Module], x: Any) -> tuple[torch.device, Exception | None]:
    """Return the device of the modules' weights, or that of `x` if they have none; and an error if there are several.

    The error is to be raised on all ranks, which need a device to learn of it.
    """
    devices = {one.device for module in modules for one in module.parameters() if one.device.type != "meta"}
    if not devices:
        return x.device if isinstance(x, Tensor) else torch.device("cpu"), None
    if len(devices) == 1:
        return devices.pop(), None
    names = sorted(map(str, devices))
    error = f"the module's weights are on several devices ({', '.join(names)}): expected all of them on one"
    return torch.device(names[0]), ValueError(error)

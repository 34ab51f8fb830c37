"""A digest of everything that a recorded graph depends on. It holds across processes.

Only modules of PyTorch, diffusers and the packages below have one: versions and source files determine what they do.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
import time
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halovae.plane.state import has_only_attributes

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "typing_extensions")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_WRAPPED = {  # kinds of functions, and the attribute that holds the wrapped function
    types.FunctionType: "__wrapped__", staticmethod: "__func__", classmethod: "__func__", property: "fget",
    functools.cached_property: "func", functools.partial: "func", functools._lru_cache_wrapper: "__wrapped__",
}  # fmt: skip
_MODULE = frozenset(vars(nn.Module())) - {"training", "_modules", "_parameters", "_buffers"}
_SMALL = 2**20  # bytes of a buffer whose values count
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
# When this file was imported. The start time of the process would be safer, but systems compute it from their boot
# time, and are off by seconds if the clock was set since.
_STARTED = time.time()
_OWN_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()  # as read at import


class Unstable(Exception):
    """A graph depends on something that cannot be described across processes. The graph is not kept on disk."""


def fingerprint(function: Any, modules: Sequence[nn.Module], name: str, settings: Any) -> str:
    """Return a digest of everything that a graph depends on: equal in two processes only if their graphs are equal.

    Args:
        function: the traced function: one of the modules, or a method of one, unless it has a `name`.
        modules: the modules whose weights it uses.
        name: says what the function does with the modules; may be empty.
        settings: everything else that the graph depends on, with the same `repr` in all processes.

    Raises:
        Unstable: something does not belong to the packages, was changed in this process, or has no description.
    """
    owner, own = getattr(function, "__self__", function), getattr(function, "__name__", "")
    place = [index for index, one in enumerate(modules) if one is owner]
    if not name and not (place and getattr(function, "__func__", None) is getattr(type(owner), own, None)):
        raise Unstable(f"{function} is neither a module nor a method of one")
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise Unstable("hooks on all modules")
    found = _Fingerprint(modules)
    found.put(sys.version, torch.version.git_version, _OWN_SOURCES, settings, name, place, own)
    found.put([getattr(sys.modules.get(one), "__version__", None) for one in (*_PACKAGES, "halovae")])
    found.put(sorted(one for one in os.environ.items() if one[0].startswith(("DIFFUSERS_", "PYTORCH_", "TORCH_"))))
    backends = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    found.put(str(getattr(backends, "_active_backend", None)))
    found.put(torch.are_deterministic_algorithms_enabled(), torch.cuda.is_available(), _digest(function.__module__))
    found.tree()
    return found.digest.hexdigest()


class _Fingerprint:
    """Adds descriptions of values to a digest."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.digest = hashlib.sha256()
        self._modules = list(dict.fromkeys(one for root in modules for one in root.modules()))
        self._weights = {id(one) for root in modules for one in (*root.parameters(), *root.buffers())}
        self._seen = {id(one): index for index, one in enumerate(self._modules)}

    def put(self, *values: Any) -> None:
        """Add the `repr` of values."""
        text = repr(values).encode()
        self.digest.update(b"%d:" % len(text) + text)

    def _is_new(self, value: Any) -> bool:
        """Add the number of a value in order of first use. Return whether it is new. Values live as long as modules."""
        count = len(self._seen)
        self.put(self._seen.setdefault(id(value), count))
        return self._seen[id(value)] == count

    def tree(self) -> None:
        """Add modules: classes, attributes, the shapes of weights, and the values of small buffers."""
        self._names(torch)
        self._names(nn.functional)
        for module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
                raise Unstable(f"hooks on a {type(module).__name__}")
            self._class(type(module))
            for name, value in vars(module).items():
                if name in _MODULE or name.startswith("_halovae_") or hasattr(value, "halovae_method"):
                    continue
                if callable(value) and hasattr(type(module), name):
                    raise Unstable(f"{name} of a {type(module).__name__} was replaced")
                self.put(name)
                self._add(value)

    def _add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.put(value)
        elif kind is tuple or self._is_new(value):
            self.put(kind)
            for one in self._inside(value, kind):
                self._add(one)

    def _inside(self, value: Any, kind: type) -> Iterable[Any]:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.generic):
            return (value.item(),)
        if kind in (list, tuple):
            return len(value), *value
        if kind is dict:
            return len(value), *value, *value.values()
        if f"{kind.__module__}.{kind.__name__}" == "diffusers.configuration_utils.FrozenDict":
            values = dict(value, _use_default_values=tuple(sorted(value.get("_use_default_values", ()))))
            return len(values), *(one for item in sorted(values.items()) for one in item)  # its order is arbitrary
        if isinstance(value, nn.Module) or not has_only_attributes(value) or not _digest(kind.__module__):
            raise Unstable(f"a {kind.__name__}")
        self._class(kind)
        return (vars(value),)

    def _tensor(self, x: Tensor) -> Iterable[Any]:
        live, values = id(x) in self._weights, ""
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or (x.nbytes > _SMALL and not live):
            raise Unstable(f"a {type(x).__name__}")
        if x.nbytes <= _SMALL and not (live and type(x) is nn.Parameter):
            plain = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            values = hashlib.sha256(plain.tobytes()).hexdigest()
        return x.shape, x.stride(), x.dtype, x.device.type, x.requires_grad, values

    def _class(self, cls: type) -> None:
        for one in cls.__mro__:
            self.put(one.__module__, one.__name__)
            module = sys.modules[one.__module__]
            if getattr(module, one.__name__, None) is not one:
                raise Unstable(f"{one} is not what its name stands for")
            if _digest(one.__module__):
                self._names(one)
                self._names(module)

    def _names(self, owner: Any) -> None:
        """Add the functions and plain values of a class or a Python module; none may come from elsewhere."""
        if self._is_new(owner):
            for name, value in vars(owner).items():
                if type(value) in _PLAIN and (isinstance(owner, type) or not isinstance(value, str)):
                    self.put(name, value)  # not global strings: some packages generate one in each process
                elif callable(value) or type(value) in _WRAPPED:
                    self.put(name, type(value))
                    self._function(value)

    def _function(self, value: Any) -> None:
        """Add where a function is defined, and the functions that it wraps."""
        if type(value) in _WRAPPED and self._is_new(value):
            if isinstance(value, types.FunctionType):
                place = value.__globals__["__name__"]
                self.put(place, value.__code__.co_firstlineno, _digest(place, False))
            cells = getattr(value, "__closure__", None) or ()
            for one in (getattr(value, _WRAPPED[type(value)], None), *(cell.cell_contents for cell in cells)):
                self._function(one)


@functools.cache
def _digest(name: str, read: bool = True) -> str:
    """Return the digest of a Python module's file, which is read or only checked; empty for the standard library."""
    package = name.partition(".")[0]
    if package in sys.stdlib_module_names:
        return ""
    path = Path(str(sys.modules[name].__file__))
    if package != "halovae" and not (package in _PACKAGES and str(path).startswith(_INSTALLED)):
        raise Unstable(f"{name} is not of an installed package that is known")
    if path.stat().st_mtime > _STARTED:
        raise Unstable(f"{path} has changed since it was loaded")
    return hashlib.sha256(path.read_bytes() if read else b"").hexdigest()

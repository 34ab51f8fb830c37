"""What a recorded graph depends on, as a digest that holds in all processes: code, flags and shapes, but no weights."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import inspect
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
)  # fmt: skip
_BUILTIN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, np.ufunc,
)  # fmt: skip
_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__")
_MADE_BY_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_MODULE = frozenset(vars(nn.Module()))  # what each module has
_SMALL = 2**20  # bytes of a buffer whose values count
_VARIABLES = ("DIFFUSERS_", "PYTORCH_", "TORCH_")  # what the names of environment variables that count begin with
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OWN_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()  # as they are when they are imported


class Unstable(Exception):
    """What a graph depends on has no description that holds in other processes: the graph is not kept on disk."""


def fingerprint(function: Callable[..., Any], modules: Sequence[nn.Module], name: str, settings: Any) -> str:
    """A digest of all that a graph depends on. It is equal in two processes only if their graphs are equal.

    It covers versions, the code of the modules' classes and of the function, the source files that these import,
    flags, shapes of weights, and the values of small buffers.

    Args:
        function: what is traced.
        modules: whose weights it uses.
        name: says what the function does with the modules; empty to look into it.
        settings: what else the graph depends on, with the same `repr` in all processes.

    Raises:
        Unstable: there are hooks, replaced methods, or values of a kind that has no description.
    """
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise Unstable("hooks on all modules")
    packages = [getattr(sys.modules.get(one), "__version__", None) for one in ("diffusers", "transformers", "halovae")]
    found = _Fingerprint(modules)
    found.put(sys.version, torch.__version__, torch.version.git_version, *packages, _OWN_SOURCES, settings)
    found.put(torch.are_deterministic_algorithms_enabled(), torch.cuda.is_available())
    found.put(sorted(one for one in os.environ.items() if one[0].startswith(_VARIABLES)))
    found.tree(modules)
    found.function(function, name)
    found.sources()
    return found.digest.hexdigest()


class _Fingerprint:
    """Adds descriptions of values to a digest."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.digest = hashlib.sha256()
        self._paths = {
            id(one): f"{index}.{name}" for index, module in enumerate(modules) for name, one in module.named_modules()
        }
        self._seen: dict[int, tuple[int, Any]] = {}  # by id: in which order values were added, and themselves
        self._looked_into: dict[int, types.FunctionType] = {}
        self._defining: dict[str, None] = {}  # names of Python modules whose classes and functions were added
        self._packages: set[str] = set()  # those of the modules' classes and of the function

    def put(self, *values: Any) -> None:
        """Add the `repr` of values."""
        for value in values:
            text = repr(value).encode()
            self.digest.update(b"%d:" % len(text) + text)

    def tree(self, modules: Sequence[nn.Module]) -> None:
        """Add modules: classes, flags, the shapes of weights, and the values of small buffers."""
        for index, root in enumerate(modules):
            for path, module in root.named_modules():
                self.put(index, path, module.training)
                self._packages.add(_package(type(module).__module__))
                self.add(type(module))
                self._flags(module, path)
            for name, weight in (*root.named_parameters(), *root.named_buffers()):
                self._weight(name, weight)
            self.put([_content(buffer) for buffer in root.buffers() if buffer.nbytes <= _SMALL])

    def _flags(self, module: nn.Module, path: str) -> None:
        if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
            raise Unstable(f"hooks on {path!r}")
        for name, value in vars(module).items():
            replaced = callable(value) and hasattr(type(module), name)
            if name in _MODULE or name.startswith("_halovae_") or (replaced and hasattr(value, "halovae_method")):
                continue
            if replaced or name in ("_hf_hook", "_diffusers_hook"):
                raise Unstable(f"{name} of {path!r} was replaced")
            self.put(name)
            self.add(value)

    def function(self, function: Callable[..., Any], name: str) -> None:
        """Add the function that is traced."""
        owner = getattr(function, "__self__", None)
        inner: Any = getattr(function, "__func__", function)
        self._packages.add(_package(str(inner.__module__)))
        if name:
            self.put(name)
            self.add(inner)
        elif isinstance(function, nn.Module):
            self.add(function)
        elif isinstance(owner, nn.Module):
            members = ((one, value) for cls in type(owner).__mro__ for one, value in vars(cls).items())
            found = next((one for one, value in members if value is inner), None)
            if found is None:
                raise Unstable(f"{function} is not of {type(owner).__name__}")
            self.put(found)
            self.add(owner)
        elif isinstance(function, types.FunctionType):
            self._look_into(function)
        else:
            raise Unstable(f"a {type(function).__name__}")

    def _look_into(self, function: types.FunctionType) -> None:
        """Add a function that uses modules, plain values and other such functions, and leaves only its result."""
        if id(function) in self._looked_into:
            return
        self._looked_into[id(function)] = function
        self.add(function)
        for code in _codes(function.__code__):
            for step in dis.get_instructions(code):
                outer = step.opname == "STORE_DEREF" and step.argval in function.__code__.co_freevars
                if outer or step.opname in ("STORE_GLOBAL", "STORE_ATTR", "IMPORT_NAME"):
                    raise Unstable(f"{function.__qualname__} has effects, or imports modules")
            for name in code.co_names:
                if name in function.__globals__:
                    self.put(name)
                    self._used(function.__globals__[name])
        for cell in function.__closure__ or ():
            self._used(cell.cell_contents)

    def _used(self, value: Any) -> None:
        if isinstance(value, types.FunctionType) and _package(value.__module__) != "torch":
            self._look_into(value)
        elif isinstance(value, (types.ModuleType, nn.Module, type, types.FunctionType, *_BUILTIN, *_PLAIN)):
            self.add(value)
        else:
            raise Unstable(f"a function uses a {type(value).__name__}")

    def add(self, value: Any) -> None:
        """Add any value.

        Raises:
            Unstable: it has no description.
        """
        if type(value) in _PLAIN:
            self.put(value)
        elif id(value) in self._paths:
            self.put("module", self._paths[id(value)])
        elif type(value) is not tuple and id(value) in self._seen:
            self.put("seen", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self.put("begin")
            self._describe(value)
            self.put("end")

    def _describe(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self.put(value.__name__)
            self._defining[value.__name__] = None
        elif isinstance(value, enum.Enum):
            self.put(str(type(value)), value.name)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, nn.Module):
            raise Unstable(f"a {type(value).__name__} that is not of the modules")
        elif isinstance(value, Tensor):
            self._weight("", value)
            self.put(_content(value))
        elif isinstance(value, (np.ndarray, np.generic)):
            self.put(value.shape, str(value.dtype), _content(value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif (parts := _parts(value)) is not None:
            self.put(type(value).__name__)
            self.add(parts)
        elif isinstance(value, _BUILTIN):
            if not isinstance(getattr(value, "__self__", None), (types.ModuleType, type, type(None))):
                raise Unstable(f"a method of an object: {value.__qualname__}")
            self.put(type(value).__name__, getattr(value, "__module__", ""), str(getattr(value, "__qualname__", value)))
        elif isinstance(value, (logging.Logger, re.Pattern, inspect.Signature)):
            self.put(value.name if isinstance(value, logging.Logger) else str(value))
        elif isinstance(value, (set, frozenset)) and all(type(one) in _PLAIN for one in value):
            self.put(sorted(map(repr, value)))
        elif isinstance(value, Mapping):
            self.put(str(type(value)), len(value))
            for name, one in value.items():
                self.add(name)
                # diffusers' configs have this list in another order in each process.
                self.add(set(one) if name == "_use_default_values" else one)
        elif isinstance(value, (list, tuple)):
            self.put(str(type(value)), len(value))
            for one in value:
                self.add(one)
        else:
            self.add((type(value), _state(value)))

    def _class(self, cls: type) -> None:
        for one in cls.__mro__:
            self.put(one.__module__, one.__qualname__)
            top = _package(one.__module__)
            if top == "torch" or top in sys.stdlib_module_names or not one.__flags__ & _MADE_BY_PYTHON:
                continue
            self._defining[one.__module__] = None
            if issubclass(one, enum.Enum):
                self.put([(member.name, repr(member.value)) for member in one])
                continue
            for name, value in vars(one).items():
                special = name == "_abc_impl" or (name.startswith("__") and name.endswith("__"))
                if not special or isinstance(value, (types.FunctionType, staticmethod, classmethod)):
                    self.put(name)
                    self.add(value)

    def _function(self, function: types.FunctionType) -> None:
        self._defining[str(function.__globals__.get("__name__"))] = None
        self.put(function.__qualname__)
        self._code(function.__code__)
        self.add((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self.put("empty")

    def _code(self, value: Any) -> None:
        if isinstance(value, types.CodeType):
            self.put(value.co_code, value.co_names, value.co_varnames, value.co_freevars, len(value.co_consts))
            for one in value.co_consts:
                self._code(one)
        elif isinstance(value, (tuple, frozenset)):
            self.put(type(value).__name__, len(value))
            for one in sorted(value, key=repr) if isinstance(value, frozenset) else value:
                self._code(one)
        else:
            self.put(value)

    def _weight(self, name: str, x: Tensor) -> None:
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            raise Unstable(f"{name}: a {type(x).__name__}")
        self.put(name, type(x).__name__, tuple(x.shape), x.stride(), x.dtype, x.device.type, x.requires_grad)

    def sources(self) -> None:
        """Add the files of the Python modules that were named, and those that they import.

        Those in the packages of the modules' classes and of the function, and those that are not installed. Of other
        packages their versions are added.

        Raises:
            Unstable: a module has no file, or its file has changed since the process began.
        """
        names, known = list(self._defining), set(self._defining)
        found: dict[str, Any] = {}
        for name in names:
            top, module = _package(name), sys.modules.get(name)
            if top in sys.stdlib_module_names:
                continue
            if module is None or (name == "__main__" and not hasattr(module, "__file__")):
                raise Unstable(f"{name} has no file")
            file = getattr(module, "__file__", None)
            installed = file is not None and file.startswith(_INSTALLED)
            version = getattr(sys.modules.get(top), "__version__", None)
            if top in ("torch", "numpy") or (installed and version is not None and top not in self._packages):
                found[top] = version
                continue
            if top == "halovae" and name not in self._defining:
                continue  # its version is known, and all of the plane's sources
            if file is not None:
                found[name] = _file_digest(file)
            if top == "halovae" or (installed and hasattr(module, "__path__")):
                continue  # lazy packages have what happens to be loaded
            found[f"{name} values"] = _plain_values(module, installed)
            for value in vars(module).values():
                used = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
                if isinstance(used, str) and used in sys.modules and used not in known:
                    known.add(used)
                    names.append(used)
        self.put(*sorted(found.items()))


def _package(module: str) -> str:
    return module.partition(".")[0]


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What a method, a descriptor or another wrapper of functions is made of; None for other values."""
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return None


def _content(x: Tensor | np.ndarray | np.generic) -> str:
    """A digest of numbers."""
    if isinstance(x, Tensor):
        if x.is_meta:
            raise Unstable("a tensor without data")
        x = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if x.dtype.hasobject:
        raise Unstable("an array of objects")
    return hashlib.sha256(x.tobytes()).hexdigest()


def _state(value: Any) -> Any:
    """The attributes of an object, if it has nothing else."""
    kind = type(value)
    if any(getattr(kind, name, None) is not getattr(object, name, None) for name in _COPYING):
        raise Unstable(f"a {kind.__name__}")
    try:
        return value.__reduce_ex__(2)[2:]
    except TypeError as error:  # it has memory of its own
        raise Unstable(f"a {kind.__name__}") from error


def _plain_values(module: types.ModuleType, installed: bool) -> list[tuple[str, str]]:
    """Values that code may read and others may change: a module's globals, and attributes of its classes."""
    kinds = (bool, int, float, type(None)) if installed else _PLAIN  # some packages draw a name for each process
    read = set(vars(module)) if installed else set(_names_read(vars(module).values(), vars(module)))
    if not installed and read & {"environ", "getenv"}:
        raise Unstable(f"{module.__name__} reads the environment")

    def text(value: Any) -> str:
        if type(value) is tuple:
            return str([text(one) for one in value])
        if isinstance(value, (Tensor, np.ndarray)):
            return _content(value)
        return repr(value) if type(value) in kinds or isinstance(value, enum.Enum) else ""

    found = []
    for name, value in vars(module).items():
        if name not in read or name[:2] == "__":
            continue  # such as the time when a script began
        own = isinstance(value, type) and value.__module__ == module.__name__
        for inner, one in vars(value).items() if own else [("", value)]:
            if inner[:2] != "__" and text(one):
                found.append((f"{name}.{inner}", text(one)))
    return sorted(found)


def _names_read(values: Iterable[Any], scope: dict[str, Any]) -> Iterator[str]:
    """Names in the code of those functions and classes that the module with these globals defines."""
    for value in values:
        value = getattr(value, "fget", getattr(value, "__func__", value))
        if isinstance(value, type) and value.__module__ == scope.get("__name__"):
            yield from (value.__name__, *_names_read(vars(value).values(), scope))
        elif isinstance(value, types.FunctionType) and value.__globals__ is scope:
            yield from (name for code in _codes(value.__code__) for name in code.co_names)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


@functools.cache
def _file_digest(path: str) -> str:
    if os.stat(path).st_mtime > psutil.Process().create_time():
        raise Unstable(f"{path} has changed since it was loaded")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

"""The state of a module call: tensors in its arguments and on its module, and the containers that hold them."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from halovae.plane.tensor import PlaneTensor

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout,
    Enum,
)  # fmt: skip
# Attributes that every module has, except those that a call depends on. Callers check hooks themselves.
_OWN = set(vars(nn.Module())) - {"training"}
_MADE = (list, dict, OrderedDict)  # containers that a call may create and change

Snapshot = tuple[tuple[Any, tuple[tuple[Any, Hashable], ...]], ...]


class Unclear(Exception):
    """The state holds a value whose changes cannot be tracked."""


class State:
    """Tensors and their holders, numbered in the order of a traversal.

    Calls with equal snapshots differ only in tensor values.

    Args:
        arguments: the call's arguments.
        module: the called module; what it and its submodules keep besides their weights is part of the state.

    Attributes:
        tensors: plane tensors.
        holders: lists, dicts, modules, and other objects with attributes.
    """

    def __init__(self, arguments: list[Any], module: nn.Module) -> None:
        self.tensors: list[PlaneTensor] = []
        self.holders: list[Any] = []
        self._numbers: dict[int, Hashable] = {}
        self._kept: dict[int, Any] = {}  # keeps ids from being reused
        for holder in (arguments, *module.modules()):
            self._hold(holder)

    def snapshot(self) -> Snapshot:
        """The contents of all holders.

        Raises:
            Unclear: a value may change without a trace.
        """
        found = []
        for holder in self.holders:  # grows during the loop
            found.append((type(holder), tuple((key, self.describe(value)) for key, value in _items(holder))))
        return tuple(found)

    def describe(self, value: Any) -> Hashable:
        """A hashable description: plain values by value, tensors and holders by number.

        Raises:
            Unclear: the value may change without a trace.
        """
        if isinstance(value, _PLAIN):
            return "plain", type(value), value
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        if isinstance(value, PlaneTensor):
            self._numbers[id(value)] = described = "tensor", len(self.tensors)
            self.tensors.append(value)
            return described
        if isinstance(value, (tuple, torch.Size)):
            return "tuple", type(value), tuple(map(self.describe, value))
        if isinstance(value, functools.partial):
            inside = tuple(map(self.describe, (value.func, value.args, value.keywords)))
            self._kept[id(value)] = value
            return "object", id(value), inside
        if not _is_fixed(value):
            if not isinstance(value, (list, dict)) and not has_only_attributes(value):
                raise Unclear(type(value).__name__)
            return self._hold(value)
        self._kept[id(value)] = value
        return "object", id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else 0

    def _hold(self, value: Any) -> Hashable:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = "holder", len(self.holders)
            self.holders.append(value)
            if isinstance(value, nn.Module):  # not the called one; its holder may call it
                for one in value._modules.values():
                    if one is not None:
                        self._hold(one)
        return self._numbers[id(value)]

    def replay(
        self, other: State, tensors: list[PlaneTensor], before: Snapshot, after: Snapshot, returned: Hashable
    ) -> Any:
        """Apply the effects of a recorded call with an equal snapshot, and return its result.

        Args:
            other: the recorded call's state.
            tensors: this call's new tensors, in the order of the recorded call's.
            before: the snapshot before both calls.
            after: the snapshot after the recorded call.
            returned: a description of the recorded call's result.
        """
        self._kept.update(other._kept)
        self.tensors.extend(tensors)
        self.holders.extend(kind() for kind, _ in after[len(before) :])
        for holder, then, now in zip(self.holders, (*before, *[None] * len(after)), after, strict=False):
            if then != now:
                _fill(holder, [(key, self._value(one)) for key, one in now[1]])
        return self._value(returned)

    def _value(self, description: Any) -> Any:
        kind, which, *rest = description
        if kind == "plain":
            return rest[0]
        if kind == "tensor":
            return self.tensors[which]
        if kind == "holder":
            return self.holders[which]
        if kind == "object":
            return self._kept[which]
        values = list(map(self._value, rest[0]))
        return which._make(values) if hasattr(which, "_make") else which(values)


def check_made(after: Snapshot, before: Snapshot) -> None:
    """Check that `replay` can repeat what a call made or changed.

    Raises:
        Unclear: it cannot.
    """
    for index, (kind, now) in enumerate(after):
        then = before[index][1] if index < len(before) else None
        if now == then:
            continue
        if then is None or issubclass(kind, (list, dict)):
            if kind not in _MADE:
                raise Unclear(kind.__name__)
        elif [one for one in now if isinstance(one[0], tuple)] != [one for one in then if isinstance(one[0], tuple)]:
            raise Unclear("weights or submodules")


def _is_fixed(value: Any) -> bool:
    """Whether a value cannot change, or is a tensor, whose version shows changes."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    fixed = (Tensor, type, types.BuiltinFunctionType, types.ModuleType, range, torch.finfo, torch.iinfo, OpOverload)
    return isinstance(value, fixed)


def has_only_attributes(value: Any) -> bool:
    """Whether an object keeps everything in its attributes."""
    slots = any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    written = all(kind is object or kind.__flags__ & (1 << 9) for kind in type(value).__mro__)  # in Python
    return hasattr(value, "__dict__") and not slots and written


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(holder, list):
        yield from enumerate(holder)
        if type(holder) is not list:
            yield from (((None, name), value) for name, value in vars(holder).items())
    elif isinstance(holder, dict):
        yield from holder.items()
        if type(holder) not in _MADE:
            yield from (((None, name), value) for name, value in vars(holder).items())
    elif isinstance(holder, nn.Module):
        for kind in ("_parameters", "_modules"):  # only `_fill` skips such keys
            yield (None, kind), hash(tuple(map(id, vars(holder)[kind].values())))
        if holder._buffers:
            yield "_buffers", holder._buffers
        for name, value in vars(holder).items():
            if name not in _OWN and name != "forward":
                yield name, value
    else:
        yield from vars(holder).items()


def _fill(holder: Any, items: list[tuple[Any, Any]]) -> None:
    if isinstance(holder, list):
        holder[:] = [value for _, value in items]
        return
    if isinstance(holder, dict):
        holder.clear()
        holder.update(items)
        return
    needed = {name: value for name, value in items if isinstance(name, str)}
    for name, _ in list(_items(holder)):
        if isinstance(name, str) and name not in needed:
            del vars(holder)[name]
    vars(holder).update(needed)

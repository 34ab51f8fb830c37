"""What happens around a module while it is recorded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from halovae.plane.trace import Recorder


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Restore on exit what a module keeps on itself, such as caches between chunks, and tensors on objects it holds."""
    saved: dict[int, tuple[Any, Any]] = {}
    held: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def save(value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, (nn.Module, Tensor, type, ModuleType)):
            # Such as a scheduler, which moves its tensors to the device that it is called for.
            held[id(attributes)] = attributes, attributes.copy()
        if type(value) in (dict, OrderedDict, list) and id(value) not in saved:
            saved[id(value)] = value, value.copy()
            for one in value.values() if isinstance(value, dict) else value:
                save(one)

    for one in module.modules():
        save(vars(one))
    try:
        yield
    finally:
        for now, before in held.values():
            for name in [name for name, value in now.items() if isinstance(value, Tensor)]:
                if name not in before:
                    del now[name]
                elif now[name] is not before[name]:
                    now[name] = before[name]
        for now, before in saved.values():
            if isinstance(now, list):
                if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                    now[:] = before
                continue
            for name in [name for name in now if name not in before]:
                del now[name]
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value


@contextmanager
def paths(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Set the recorder's `module` to the path of the submodule that is being called."""
    handles, before, thread = [], [], threading.get_ident()

    def hooks(name: str) -> tuple[Any, Any]:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if threading.get_ident() == thread:
                before.append(recorder.module)
                recorder.module = name
                plane = recorder.plane
                if plane is not None and plane.strips is not None:
                    return plane.strips.collect(plane, inputs, name)
            return None

        def leave(_: nn.Module, __: Any, result: Any) -> Any:
            if threading.get_ident() == thread:
                plane = recorder.plane
                if plane is not None and plane.strips is not None:
                    result = plane.strips.cut(plane, result, name)
                recorder.module = before.pop()
            return result

        return enter, leave

    for name, submodule in module.named_modules():
        enter, leave = hooks(name)
        handles.append(submodule.register_forward_pre_hook(enter))
        handles.append(submodule.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

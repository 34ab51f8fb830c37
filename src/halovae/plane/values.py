"""Arguments of operators as a recorder sees them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor


def signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((name, signature(one)) for name, one in value.items())
    return type(value), value


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the value with the function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, one) for one in value])
    if isinstance(value, dict):
        return {name: mapped(function, one) for name, one in value.items()}
    return value


def location() -> str:
    """The current line of code outside of PyTorch and of this package, for messages."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and "/halovae/plane/" not in frame.filename:
            return f", at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""

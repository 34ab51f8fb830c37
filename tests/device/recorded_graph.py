"""A graph of captured work that is not a device's: it notes operators while they run, and runs them again.

As on a device, a replay reads and writes the same memory as the capture, whatever the host does in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph:
    """Operators that were noted, each with its arguments and results."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            found = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, Tensor)]
            for old, new in zip(results, found, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class recording(TorchDispatchMode):
    """The context that captures; with `broken`, it refuses as a device refuses work that waits."""

    broken = False

    def __init__(self, graph: RecordedGraph, capture_error_mode: str = "global") -> None:
        super().__init__()
        assert capture_error_mode == "thread_local"
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        found = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        self._graph.calls.append((func, args, kwargs or {}, found))
        return result

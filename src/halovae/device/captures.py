"""Captured graphs of a device's work (`torch.cuda.CUDAGraph`, NPUGraph, XPUGraph): queued by one call of the host.

The host takes 15 to 25 microseconds to queue an operator, and a decode of a picture has hundreds: small pictures are
bound by that. A captured graph reads its inputs from memory of its own, and writes its results to such memory.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from halovae.device.kinds import Device

CALLS = 2  # eager calls before a capture: kernels are compiled and algorithms chosen in these
LIMIT = 8  # graphs at most
SHARE = 1 / 4  # of the device's free memory, at most, for all graphs
# Bytes that captured work may take. Larger work is not bound by the host: FLUX at 2048x2048, which takes 5 GiB, gained
# 1 of 115 ms on an H100, and Wan2.1 at 832x480, which takes 3.5 GiB, 21 of 217.
LARGEST = 4 * 2**30
_KNOWN = 256  # keys that are counted


class Captures:
    """A bounded pool of captured graphs on one device. The least recently used graph goes first.

    Nothing is captured unless `HALOVAE_CAPTURE=1` asks for it, where the device has no such graphs, or after memory ran
    out.

    Args:
        device: the device.

    Attributes:
        replays: how often a graph was used.
    """

    def __init__(self, device: Device) -> None:
        self.replays = 0
        self._device = device
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._lock = threading.Lock()  # a graph's own memory serves one call at a time
        self._allowed = os.environ.get("HALOVAE_CAPTURE") == "1" and device.new_capture() is not None

    @property
    def allowed(self) -> bool:
        """Whether graphs may be captured."""
        return self._allowed

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self, owner: object, key: Hashable, size: int, function: Callable[[list[Tensor]], Any], inputs: list[Tensor]
    ) -> Any:
        """Call a function, or replay what it queued before with equal shapes.

        Args:
            owner: its graphs are dropped when it is gone.
            key: identifies the work of the owner; in a graph, only values of the inputs may change.
            size: bytes that the function takes at its peak.
            function: takes the list of inputs, and returns tensors, in tuples or lists. It may empty the list, to free
                inputs early, but not write to them.
            inputs: tensors on the device.

        Returns:
            What the function returns, in memory of its own.
        """
        if not self._allowed or self._device.is_choosing or not self._lock.acquire(blocking=False):
            return function(inputs)
        try:
            whole = id(owner), key, tuple((one.shape, one.stride(), one.dtype) for one in inputs)
            graph = self._graphs.get(whole)
            if graph is None and self._is_due(owner, whole):
                graph = self._captured(whole, size, function, inputs)
            if graph is not None:
                self._graphs.move_to_end(whole)
                self.replays += 1
                return graph.replay(inputs)
        finally:
            self._lock.release()
        return function(inputs)

    def clear(self) -> None:
        """Drop all graphs, and capture no more: memory ran out."""
        self._allowed = False
        with self._lock:
            self._graphs.clear()

    def release(self) -> bool:
        """Drop all graphs, because something else needs their memory. Return whether there were any."""
        with self._lock:
            if not self._graphs:
                return False
            self._graphs.clear()
        self._device.module.empty_cache()
        return True

    def _is_due(self, owner: object, key: Hashable) -> bool:
        """Count a call. Whether there were enough eager ones before it, and none that could not be captured."""
        if key not in self._calls:
            weakref.finalize(owner, self._drop, key).atexit = False
            self._calls[key] = 0
        self._calls.move_to_end(key)
        self._calls[key] += 1
        while len(self._calls) > _KNOWN:
            self._calls.popitem(last=False)
        return self._calls[key] == CALLS + 1

    def _drop(self, key: Hashable) -> None:
        self._graphs.pop(key, None)
        self._calls.pop(key, None)

    def _captured(
        self, key: Hashable, size: int, function: Callable[[list[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> _Graph | None:
        """Capture a function; None where memory is short, or the work cannot be captured."""
        whole = size + 2 * sum(one.nbytes for one in inputs)
        if size > LARGEST:
            return None
        while self._graphs and (len(self._graphs) >= LIMIT or not self._fits(whole)):
            self._graphs.popitem(last=False)
            self._device.module.empty_cache()
        if not self._fits(whole):
            return None
        try:
            graph = self._graphs[key] = _Graph(self._device, whole, function, inputs)
        except RuntimeError as error:
            warnings.warn(f"work is queued operator by operator: {error}", RuntimeWarning, stacklevel=4)
            return None
        return graph

    def _fits(self, size: int) -> bool:
        held = sum(one.size for one in list(self._graphs.values()))  # an owner's end drops graphs at any moment
        return held + size <= SHARE * (self._device.memory()[0] + held)


class _Graph:
    """A captured call of a function.

    Attributes:
        size: bytes that it takes.
    """

    def __init__(
        self, device: Device, size: int, function: Callable[[list[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> None:
        self.size = size
        with torch.inference_mode(False):  # later calls may run outside of inference mode, and write to these
            self._inputs = [one.clone() for one in inputs]
            capture = device.new_capture()
            assert capture is not None
            self._graph, recording = capture
            with device.on_current_stream(), recording, torch.no_grad():
                self._results = function([*self._inputs])
        self._copied = device.event()

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Queue the work for other inputs, and return copies of its results: the next replay overwrites them."""
        if self._copied is not None:
            self._copied.wait()  # a call on another stream may still read the graph's memory
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            results = tree_map_only(torch.Tensor, torch.clone, self._results)
        if self._copied is not None:
            self._copied.record()
        return results


@cache
def captures(device: torch.device) -> Captures:
    """Return the pool that all calls on a device share."""
    return Captures(Device(device))

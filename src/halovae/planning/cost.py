"""What a decode takes, in the features that a calibration prices: calls, FLOPs, bytes, weights, by kind of operator.

Operators between ranks run on meta tensors. A recorder counts the work of the operators that they consist of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from halovae.device.memory import LiveBytes
from halovae.kernels.native import EAGER, LANES, Kernels, Norms

CPU = torch.device("cpu")
# Kinds of work that are not operators. An exchange swaps borders or sends frames; its bytes are those of the largest
# message. A gather collects what all ranks have; its bytes are those that come from the others.
EXCHANGE, GATHER = "exchange", "gather"


@dataclass
class Work:
    """The work of all operators of one kind.

    Attributes:
        calls: how many operators there are.
        flops: multiplications and additions, as torch's FLOP counter counts them.
        bytes: bytes that they read and write, without weights.
        weights: how many numbers their weights have.
    """

    calls: float = 0
    flops: float = 0
    bytes: float = 0
    weights: float = 0

    def add(self, other: Work, times: float = 1) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)


@dataclass(frozen=True)
class Cost:
    """What the rank with the most to do takes.

    Attributes:
        work: its work by layer and kind of operator; exchanges and gathers are kinds as well.
        messages: how many messages it sends; a gather is one to each other rank.
        bytes_sent: the bytes of these messages.
        weights: bytes of the parameters that it uses.
        peak: bytes of live tensors at the highest point, with feature caches, without weights and the finished clip.
    """

    work: dict[tuple[str, str], Work]
    messages: int
    bytes_sent: int
    weights: int
    peak: int

    @property
    def flops(self) -> int:
        """The FLOPs of all layers."""
        return round(sum(work.flops for work in self.work.values()))

    def kinds(self) -> dict[str, Work]:
        """The work of all layers by kind."""
        return self._summed(1)

    def layers(self) -> dict[str, Work]:
        """The work of all kinds by layer."""
        return self._summed(0)

    def _summed(self, index: int) -> dict[str, Work]:
        total: dict[str, Work] = defaultdict(Work)
        for key, work in self.work.items():
            total[key[index]].add(work)
        return dict(total)


class Recorder(LiveBytes):
    """Counts the work of each operator on meta tensors, and the bytes that would live."""

    counts_meta = True

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)
        self._results: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}  # by call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.note(*described(func, args, kwargs or {}, result))
        return result

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the operator's result. An operator that writes into its first argument does nothing without data."""
        if _in_place(func):
            return args[0]
        if _named(func)[1]:
            return super().called(func, args, kwargs)
        # For many operators torch infers shapes in Python, which is slow. Most calls repeat an earlier one.
        call = func, tuple(map(_likeness, args)), tuple((name, _likeness(one)) for name, one in kwargs.items())
        if call not in self._results:
            result = self._laid_out(func, args, kwargs)
            inputs = [one.untyped_storage() for one in args if isinstance(one, Tensor)]
            if not isinstance(result, Tensor) or result.untyped_storage() in inputs:
                return result
            self._results[call] = result.shape, result.stride(), result.dtype
        shape, stride, dtype = self._results[call]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _laid_out(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = super().called(func, args, kwargs)
        if "conv" in func._schema.name and args[0].stride(1) == 1:  # with data, channels stay last
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            result = torch.empty_like(result, memory_format=formats[result.ndim])
        return result

    def note(self, kind: str, work: Work) -> None:
        """Count the work of one operator."""
        self.work[kind].add(work)

    def kernels(self) -> Kernels:
        """Return stand-ins for compiled kernels, which no mode sees. They only count their work."""

        def normalize(x: Tensor, scale: Tensor, added: float, least: float, silu: bool, out: Tensor) -> None:
            self.note("norm_silu", norm_work(x, out))

        def nothing(*_: Any) -> Any:
            raise AssertionError("GroupNorm is counted by its operators")

        def takes(x: Tensor) -> bool:
            return x.dtype != torch.float64 and x.stride(-1) == 1 and x.shape[-1] % LANES == 0

        return replace(EAGER, norms=Norms(takes, normalize, nothing, nothing))

    def taken(self) -> dict[str, Work]:
        """Return the work by kind since the last call of this method."""
        work, self.work = self.work, defaultdict(Work)
        return dict(work)


def norm_work(x: Tensor, out: Tensor) -> Work:
    """Return the work of a compiled norm over channels with SiLU."""
    return Work(calls=1, bytes=_bytes(x) + _bytes(out))


def described(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[str, Work]:
    """Return the kind of an operator, and the work of this call."""
    name, is_view = _named(func)
    if is_view:
        return name, Work(calls=1)
    tensors = [one for one in args if isinstance(one, Tensor)]
    if func is torch.ops.halovae.convolve.default:
        window, weight, _, out, *_ = tensors
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return f"{name} {args[5]}", Work(1, flops, _bytes(window) + _bytes(out), weight.numel())
    flops, weights = 0.0, 0
    if name in ("conv2d", "conv3d", "convolution", "mkldnn_convolution", "linear", "addmm", "mm"):
        weight = tensors[2 if name == "addmm" else 1]
        per_result = weight.shape[0] if name in ("addmm", "mm") else math.prod(weight.shape[1:])
        flops, weights = 2.0 * result.numel() * per_result, weight.numel()
        name = "linear" if name in ("linear", "addmm", "mm") else "convolution"
        tensors = tensors[:1]
    elif name == "scaled_dot_product_attention":
        flops = 4.0 * math.prod(tensors[0].shape) * tensors[1].shape[-2]
    if name == "cat":
        tensors = list(args[0])
    results = result if isinstance(result, (list, tuple)) else [result]
    written = [one for one in results if isinstance(one, Tensor)]
    return name, Work(1, flops, sum(map(_bytes, tensors + written)), weights)


@cache
def _named(func: Any) -> tuple[str, bool]:
    """Return a name for what an operator does, and whether it touches no data."""
    schema = func._schema
    name = schema.name.removeprefix("aten::").replace("::", " ").removeprefix("_")
    aliases = [one.alias_info for one in schema.returns]
    untouched = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    if untouched or name.startswith(("empty", "new_empty", "halovae buffer", "prim")):
        return "view", True
    if name in ("detach", "lift_fresh", "reshape"):
        return "view", True
    return name, False


def _likeness(value: Any) -> Any:
    """Return what the shape and layout of an operator's result depend on in an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_likeness, value))
    return type(value), value  # 1 and 1.0 make different results


@cache
def _in_place(func: Any) -> bool:
    returns, first = func._schema.returns, func._schema.arguments[:1]
    written = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return written and first[0].name == "self"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""Passes over memory of Winograd's convolution and of the norms before it: by PyTorch's operators, or compiled.

`native.cpp` reads and writes each value once, as the C++ compiler of this machine makes it. What it cannot do is left
to the operators: numbers of channels that 16 does not divide, fp64, maps whose cells have gaps.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from halovae.kernels import compiler
from halovae.kernels.schemes import Matrix, Scheme

LANES = 16  # channels that `native.cpp` takes at once
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOOKING = 2  # seconds that a call may wait to hear whether there is a library from an earlier process


@dataclass(frozen=True)
class Norms:
    """Norms of maps `[N, *, C]`, each in one loop; computed in fp32 and rounded once.

    Attributes:
        takes: whether they can read, or write to, a map.
        normalize: `x / sqrt(max(|x|^2 + added, least)) * scale` over the last dim: takes `x`, `scale` `[C]`, `added`,
            `least`, whether SiLU follows, and memory for the result, which may be `x`.
        scale_and_shift: `x * factors + terms`: takes `x`, both of them `[N, C]`, whether SiLU follows, and memory for
            the result, which may be `x`.
        moments: the variance and the mean of each channel, `[2, N, C]`. Takes `x`, which is contiguous.
    """

    takes: Callable[[Tensor], bool]
    normalize: Callable[[Tensor, Tensor, float, float, bool, Tensor], None]
    scale_and_shift: Callable[[Tensor, Tensor, Tensor, bool, Tensor], None]
    moments: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernels:
    """What passes over memory are made with. Maps are seen with the channels last, whatever their layout in memory.

    Attributes:
        spread: takes a band of a window `[T, L, W, C]`, its rows of tiles, the scheme, fp32 memory for what is in
            between, and memory for the result `[products^2, T, tiles, C]`.
        merge: takes products `[products^2, T, tiles, O]`, the rows of tiles, the scheme, memory for what is in between,
            a bias `[O]`, the result's memory `[T, H, W, O]`, and whether to add to it.
        norms: those that are one loop, if there are any.
    """

    spread: Callable[[Tensor, int, Scheme, Tensor, Tensor], None]
    merge: Callable[[Tensor, int, Scheme, Tensor, Tensor, Tensor, bool], None]
    norms: Norms | None


def _spread(band: Tensor, rows: int, how: Scheme, memory: Tensor, out: Tensor) -> None:
    frames, _, width, channels = band.shape
    cols = (width - len(how.spread[0])) // how.step + 1
    halfway = carved(memory, (how.products, frames, rows, width, channels))
    _combine(how.spread, _strided(band, 1, how.step, rows, len(how.spread[0])), halfway.unbind())
    final = out.view(how.products, how.products, frames, rows, cols, channels)
    inputs = _strided(halfway, 3, how.step, cols, len(how.spread[0]))
    _combine(how.spread, inputs, final.unbind())


def _merge(products: Tensor, rows: int, how: Scheme, memory: Tensor, bias: Tensor, out: Tensor, add: bool) -> None:
    frames, width, channels = out.shape[0], out.shape[2], out.shape[3]
    halfway = carved(memory, (how.products, frames, rows, width, channels))
    cols = halfway.unflatten(3, (-1, how.results)).unbind(4)
    parts = products.view(how.products, how.products, frames, rows, -1, channels)
    _combine(how.merge, parts.unbind(), cols)
    lines = out.unflatten(1, (rows, how.results)).unbind(2)
    for line, total in zip(lines, _combined(how.merge, halfway.unbind()), strict=True):
        line.copy_(total + bias + line if add else total + bias)


def _strided(x: Tensor, dim: int, step: int, count: int, inputs: int) -> list[Tensor]:
    """The cells of tiles along a dim: the first of each, the second, and so on."""
    return [x.narrow(dim, at, step * (count - 1) + 1)[(slice(None),) * dim + (slice(None, None, step),)]
            for at in range(inputs)]  # fmt: skip


def _combine(matrix: Matrix, parts: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    for out, total in zip(outs, _combined(matrix, parts), strict=True):
        out.copy_(total)


def _combined(matrix: Matrix, parts: Sequence[Tensor]) -> list[Tensor]:
    """The product of a matrix and parts, in fp32."""
    sums = []
    for row in matrix:
        terms = [part.float() * factor for factor, part in zip(row, parts, strict=True) if factor]
        total = terms[0]
        for term in terms[1:]:
            total += term
        sums.append(total)
    return sums


def carved(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of flat memory as a tensor."""
    return memory[: math.prod(shape)].view(*shape)


EAGER = Kernels(_spread, _merge, None)


def compiled() -> Kernels:
    """The kernels as a C++ compiler makes them, in 3 s; the library is kept in the cache folder.

    Raises:
        OSError: there is no compiler, or it failed.
    """
    attempt = _attempt()
    attempt.wait()
    if isinstance(attempt.outcome, OSError):
        raise attempt.outcome
    assert attempt.outcome is not None
    return attempt.outcome


def prepare(device: torch.device) -> None:
    """Begin to compile kernels for a device in the background."""
    if device.type == "cpu":
        _attempt()


def ready(device: torch.device, wait: bool = False) -> bool:
    """Whether there are compiled kernels for a device. If there are none yet, they are compiled in the background.

    Args:
        device: the kind of device counts.
        wait: for the compiler.
    """
    if device.type != "cpu":
        return False
    attempt = _attempt()
    attempt.looked.wait(max(0.0, attempt.begin + _LOOKING - time.monotonic()))
    if wait:
        attempt.wait()
    return isinstance(attempt.outcome, Kernels)


def explain(device: torch.device) -> None:
    """Say why kernels for a device cannot be compiled, if that is so.

    Warns:
        RuntimeWarning: once in a process.
    """
    if device.type != "cpu":
        return
    attempt = _attempt()
    if isinstance(attempt.outcome, OSError) and not attempt.told:
        attempt.told = True
        warnings.warn(
            f"kernels run uncompiled, since they could not be compiled: {attempt.outcome}", RuntimeWarning, stacklevel=3
        )


class _Attempt(threading.Thread):
    """Loads the library, or compiles it.

    Attributes:
        looked: is set once it is known whether there is one from an earlier process.
        outcome: the kernels, or why there are none; None before that is known.
        begin: when it began, by the monotonic clock.
        told: whether somebody was told why there are none.
    """

    def __init__(self) -> None:
        # No daemon: a process that is done earlier waits for the compiler, and leaves the library to later ones.
        super().__init__(name="halovae kernels")
        self.looked = threading.Event()
        self.outcome: Kernels | OSError | None = None
        self.begin, self.told = time.monotonic(), False
        try:
            self.start()
        except RuntimeError as error:  # the system has no more threads
            self.outcome = OSError(str(error))
            self.looked.set()

    def wait(self) -> None:
        """Wait for its end."""
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        try:
            self.outcome = _Library(compiler.loaded(self.looked)).kernels()
        except Exception as error:
            self.outcome = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
        finally:
            self.looked.set()


_starting = threading.Lock()


def _attempt() -> _Attempt:
    """The only attempt of this process."""
    with _starting:
        return _attempted()


_attempted = cache(_Attempt)


def _in_child() -> None:
    """Forget an attempt that a fork cut off: threads do not come along."""
    global _starting
    _starting = threading.Lock()
    if _attempted.cache_info().currsize:
        if _attempted().outcome is None:
            _attempted.cache_clear()
        else:
            _attempted().looked = threading.Event()  # the fork may hold the lock of the other one
            _attempted().looked.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class _Library:
    """`native.cpp` with tensors for arguments."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    def kernels(self) -> Kernels:
        norms = Norms(self.takes, self.normalize, self.scale_and_shift, self.moments)
        return Kernels(self.spread, self.merge, norms)

    def takes(self, x: Tensor) -> bool:
        """Whether channels lie side by side, cells of a row one after the other, and it can compute with them."""
        channels = x.shape[-1]
        plain = x.device.type == "cpu" and x.dtype in _DTYPES and channels % LANES == 0 and 3 <= x.ndim <= 5
        plain = plain and x.stride(-1) == 1 and (x.shape[-2] == 1 or x.stride(-2) == channels)
        return plain and hasattr(self._functions, f"normalize_{_named(x)}")

    def normalize(self, x: Tensor, scale: Tensor, added: float, least: float, silu: bool, out: Tensor) -> None:
        scale = scale.float().contiguous()
        limits = ctypes.c_float(added), ctypes.c_float(least)
        for item, result in zip(_frames(x), _frames(out), strict=True):
            self._call(f"normalize_{_named(x)}", *_map(item), scale, *limits, silu, result, *result.stride()[:2])

    def scale_and_shift(self, x: Tensor, factors: Tensor, terms: Tensor, silu: bool, out: Tensor) -> None:
        for at, (item, result) in enumerate(zip(_frames(x), _frames(out), strict=True)):
            given = factors[at].float().contiguous(), terms[at].float().contiguous()
            self._call(f"scale_and_shift_{_named(x)}", *_map(item), *given, silu, result, *result.stride()[:2])

    def moments(self, x: Tensor) -> Tensor:
        found = torch.empty((2, len(x), x.shape[-1]), dtype=torch.float32, device=x.device)
        for item, variance, mean in zip(x.flatten(1, -2), *found, strict=True):
            self._call(f"moments_{_named(x)}", item, *item.shape, variance, mean)
        return found

    def spread(self, band: Tensor, rows: int, how: Scheme, memory: Tensor, out: Tensor) -> None:
        if not (self.takes(band) and _is_plain(out)):
            EAGER.spread(band, rows, how, memory, out)
            return
        frames, _, width, channels = band.shape
        cols = (width - len(how.spread[0])) // how.step + 1
        sizes = *band.stride()[:2], frames, rows, cols, channels
        self._call(f"spread_{how.name}_{_named(band)}", band, *sizes, out)

    def merge(
        self, products: Tensor, rows: int, how: Scheme, memory: Tensor, bias: Tensor, out: Tensor, add: bool
    ) -> None:
        frames, _, width, channels = out.shape
        known = out.dtype in _DTYPES and channels % LANES == 0 and out.stride(3) == 1 and _is_plain(products)
        if not known or not hasattr(self._functions, f"normalize_{_named(out)}"):
            EAGER.merge(products, rows, how, memory, bias, out, add)
            return
        sizes = frames, rows, width // how.results, channels
        bias = bias.float().contiguous()
        self._call(f"merge_{how.name}_{_named(out)}", products, *sizes, bias, out, *out.stride()[:3], add)

    def _call(self, name: str, *arguments: Tensor | int | ctypes.c_float) -> None:
        """Call a function with pointers to tensors, numbers, and the number of threads."""
        threads = ctypes.c_int(torch.get_num_threads())
        getattr(self._functions, name)(*map(_for_c, arguments), threads)


def _for_c(
    argument: Tensor | int | ctypes.c_float,
) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_ssize_t | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int(argument) if isinstance(argument, bool) else ctypes.c_ssize_t(argument)
    return argument


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def _named(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _frames(x: Tensor) -> list[Tensor]:
    """The items of a map `[N, *, C]` as `[T, H, W, C]`."""
    return [item[(None,) * (4 - item.ndim)] for item in x]


def _map(x: Tensor) -> tuple[Tensor | int, ...]:
    """A map `[T, H, W, C]`: where it lies, how far frames and rows are apart, and its extents."""
    return x, *x.stride()[:2], *x.shape

"""The memory-bound kernels of Winograd's convolution and of the norms before it: compiled, or by PyTorch's operators.

Compiled kernels (`native.cpp`) read and write each value once. PyTorch's operators handle what these do not support:
channel counts not divisible by 16, fp64, maps with gaps between cells.
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

LANES = 16  # channels per vector in `native.cpp`
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOOKING = 2  # seconds that a call may wait for the check for a library from an earlier process


@dataclass(frozen=True)
class Norms:
    """Single-loop norms of maps `[N, *, C]`, computed in fp32 and rounded once.

    Attributes:
        takes: whether the norms can read or write a map.
        normalize: `x / sqrt(max(|x|^2 + added, least)) * scale` over the last dim: takes `x`, `scale` `[C]`, `added`,
            `least`, whether SiLU follows, and memory for the result, which may be `x`.
        scale_and_shift: `x * factors + terms`: takes `x`, `factors` and `terms` `[N, C]`, whether SiLU follows, and
            memory for the result, which may be `x`.
        moments: the variance and the mean of each channel, `[2, N, C]`. Takes a contiguous `x`.
    """

    takes: Callable[[Tensor], bool]
    normalize: Callable[[Tensor, Tensor, float, float, bool, Tensor], None]
    scale_and_shift: Callable[[Tensor, Tensor, Tensor, bool, Tensor], None]
    moments: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernels:
    """One implementation of the memory-bound kernels. Arguments have their channels in the last dim.

    Attributes:
        input_transform: takes a row block of a window `[T, L, W, C]`, the number of tile rows, the scheme, fp32 memory
            for intermediate values, and memory for the result `[products^2, T, tiles, C]`.
        output_transform: takes products `[products^2, T, tiles, O]`, the number of tile rows, the scheme, memory for
            intermediate values, a bias `[O]`, memory for the result `[T, H, W, O]`, and whether to add to it.
        norms: the single-loop norms, or None.
    """

    input_transform: Callable[[Tensor, int, Scheme, Tensor, Tensor], None]
    output_transform: Callable[[Tensor, int, Scheme, Tensor, Tensor, Tensor, bool], None]
    norms: Norms | None


def _input_transform(block: Tensor, rows: int, how: Scheme, memory: Tensor, out: Tensor) -> None:
    frames, _, width, channels = block.shape
    cols = (width - len(how.input_transform[0])) // how.step + 1
    halfway = carved(memory, (how.products, frames, rows, width, channels))
    _combine(how.input_transform, _strided(block, 1, how.step, rows, len(how.input_transform[0])), halfway.unbind())
    final = out.view(how.products, how.products, frames, rows, cols, channels)
    inputs = _strided(halfway, 3, how.step, cols, len(how.input_transform[0]))
    _combine(how.input_transform, inputs, final.unbind())


def _output_transform(
    products: Tensor, rows: int, how: Scheme, memory: Tensor, bias: Tensor, out: Tensor, add: bool
) -> None:
    frames, width, channels = out.shape[0], out.shape[2], out.shape[3]
    halfway = carved(memory, (how.products, frames, rows, width, channels))
    cols = halfway.unflatten(3, (-1, how.results)).unbind(4)
    parts = products.view(how.products, how.products, frames, rows, -1, channels)
    _combine(how.output_transform, parts.unbind(), cols)
    results = out.unflatten(1, (rows, how.results)).unbind(2)
    for result, total in zip(results, _combined(how.output_transform, halfway.unbind()), strict=True):
        result.copy_(total + bias + result if add else total + bias)


def _strided(x: Tensor, dim: int, step: int, count: int, inputs: int) -> list[Tensor]:
    """Return the first cell of each tile along a dim, the second of each, and so on."""
    return [x.narrow(dim, at, step * (count - 1) + 1)[(slice(None),) * dim + (slice(None, None, step),)]
            for at in range(inputs)]  # fmt: skip


def _combine(matrix: Matrix, parts: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    for out, total in zip(outs, _combined(matrix, parts), strict=True):
        out.copy_(total)


def _combined(matrix: Matrix, parts: Sequence[Tensor]) -> list[Tensor]:
    """Multiply a matrix by a vector of tensors, in fp32."""
    sums = []
    for row in matrix:
        terms = [part.float() * factor for factor, part in zip(row, parts, strict=True) if factor]
        total = terms[0]
        for term in terms[1:]:
            total += term
        sums.append(total)
    return sums


def carved(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the beginning of flat memory as a tensor of a shape."""
    return memory[: math.prod(shape)].view(*shape)


EAGER = Kernels(_input_transform, _output_transform, None)


def compiled() -> Kernels:
    """Return the compiled kernels. The first call compiles them in 3 s unless the cache folder has the library.

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
    """Start compiling the kernels for a device in the background."""
    if device.type == "cpu":
        _attempt()


def ready(device: torch.device, wait: bool = False) -> bool:
    """Whether there are compiled kernels for a device. If not, start compiling them in the background.

    Args:
        device: only its type matters.
        wait: wait until the compiler is done.
    """
    if device.type != "cpu":
        return False
    attempt = _attempt()
    attempt.cache_checked.wait(max(0.0, attempt.begin + _LOOKING - time.monotonic()))
    if wait:
        attempt.wait()
    return isinstance(attempt.outcome, Kernels)


def explain(device: torch.device) -> None:
    """Warn if the kernels for a device could not be compiled.

    Warns:
        RuntimeWarning: once per process, with the reason.
    """
    if device.type != "cpu":
        return
    attempt = _attempt()
    if isinstance(attempt.outcome, OSError) and not attempt.warned:
        attempt.warned = True
        warnings.warn(
            f"kernels run uncompiled, since they could not be compiled: {attempt.outcome}", RuntimeWarning, stacklevel=3
        )


class _Attempt(threading.Thread):
    """Loads the library, or compiles it.

    Attributes:
        cache_checked: set once it is known whether an earlier process left a library.
        outcome: the kernels, or the error; None until the attempt ends.
        begin: its start on the monotonic clock.
        warned: whether the error was reported.
    """

    def __init__(self) -> None:
        # Not a daemon: a process that ends earlier waits for the compiler and leaves the library to later processes.
        super().__init__(name="halovae kernels")
        self.cache_checked = threading.Event()
        self.outcome: Kernels | OSError | None = None
        self.begin, self.warned = time.monotonic(), False
        try:
            self.start()
        except RuntimeError as error:  # the system is out of threads
            self.outcome = OSError(str(error))
            self.cache_checked.set()

    def wait(self) -> None:
        """Wait until the attempt ends."""
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        try:
            self.outcome = _Library(compiler.loaded(self.cache_checked)).kernels()
        except Exception as error:
            self.outcome = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
        finally:
            self.cache_checked.set()


_starting = threading.Lock()


def _attempt() -> _Attempt:
    """The only attempt of this process."""
    with _starting:
        return _attempted()


_attempted = cache(_Attempt)


def _in_child() -> None:
    """Forget an attempt that a fork interrupted: threads do not survive in the child."""
    global _starting
    _starting = threading.Lock()
    if _attempted.cache_info().currsize:
        if _attempted().outcome is None:
            _attempted.cache_clear()
        else:
            _attempted().cache_checked = threading.Event()  # the parent's event may have been locked at the fork
            _attempted().cache_checked.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class _Library:
    """Calls the functions of `native.cpp` with tensors."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    def kernels(self) -> Kernels:
        norms = Norms(self.takes, self.normalize, self.scale_and_shift, self.moments)
        return Kernels(self.input_transform, self.output_transform, norms)

    def takes(self, x: Tensor) -> bool:
        """Whether a map's rows are contiguous, and the library supports its dtype and channel count."""
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
            affine = factors[at].float().contiguous(), terms[at].float().contiguous()
            self._call(f"scale_and_shift_{_named(x)}", *_map(item), *affine, silu, result, *result.stride()[:2])

    def moments(self, x: Tensor) -> Tensor:
        result = torch.empty((2, len(x), x.shape[-1]), dtype=torch.float32, device=x.device)
        for item, variance, mean in zip(x.flatten(1, -2), *result, strict=True):
            self._call(f"moments_{_named(x)}", item, *item.shape, variance, mean)
        return result

    def input_transform(self, block: Tensor, rows: int, how: Scheme, memory: Tensor, out: Tensor) -> None:
        if not (self.takes(block) and _is_plain(out)):
            EAGER.input_transform(block, rows, how, memory, out)
            return
        frames, _, width, channels = block.shape
        cols = (width - len(how.input_transform[0])) // how.step + 1
        sizes = *block.stride()[:2], frames, rows, cols, channels
        self._call(f"input_transform_{how.name}_{_named(block)}", block, *sizes, out)

    def output_transform(
        self, products: Tensor, rows: int, how: Scheme, memory: Tensor, bias: Tensor, out: Tensor, add: bool
    ) -> None:
        frames, _, width, channels = out.shape
        supported = out.dtype in _DTYPES and channels % LANES == 0 and out.stride(3) == 1 and _is_plain(products)
        if not supported or not hasattr(self._functions, f"normalize_{_named(out)}"):
            EAGER.output_transform(products, rows, how, memory, bias, out, add)
            return
        sizes = frames, rows, width // how.results, channels
        bias = bias.float().contiguous()
        self._call(f"output_transform_{how.name}_{_named(out)}", products, *sizes, bias, out, *out.stride()[:3], add)

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
    """The arguments for a map `[T, H, W, C]`: the map, the strides of frames and rows, and its extents."""
    return x, *x.stride()[:2], *x.shape

"""Decodes to be compared: who decodes, on ranks of its own, and what each decode took. Contestants take turns."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from halovae.bench.profile import Profile, peaks, profiled
from halovae.device.kinds import RANK_ENVIRONMENT, Device, Stopwatch
from halovae.device.memory import Memory, MemoryMeter
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.distributed.ranks import Ranks
from halovae.distributed.transport import Link
from halovae.errors import RankError
from halovae.grid import Grid
from halovae.kernels.native import ready
from halovae.models import zoo
from halovae.models.classes import decode_options
from halovae.models.load import diffusers_module
from halovae.report import DecodeReport
from halovae.runtime.sharing import Call
from halovae.runtime.simulate import Simulation, simulate
from halovae.runtime.vae import VAE, load

# What a contestant's processes hold between calls.
_held: dict[str, Any] = {}


@dataclass(frozen=True)
class Model:
    """What to load, and how.

    Attributes:
        path: of the VAE: a folder in diffusers layout, or a file.
        name: the class of its VAE.
        dtype: what to compute in.
        device: its kind.
        exact: whether fp32 means fp32: CUDA's convolutions round their input to TF32 otherwise, as torch has it.
        call: which call is measured; pictures take the latents' place in an encode.
    """

    path: Path
    name: str
    dtype: torch.dtype
    device: str
    exact: bool = False
    call: Call = "decode"


@dataclass(frozen=True)
class Taken:
    """What one decode took over its ranks: the slowest one's seconds, and their memory, at rest before any decode."""

    seconds: float
    memory: Memory


def _hold_halovae(model: Model, options: dict[str, Any]) -> None:
    torch.backends.cudnn.allow_tf32 = not model.exact
    device = Device.default(model.device).torch_device
    decoder = load(model.path, dtype=model.dtype, device=device, encoder=model.call == "encode")
    for parameter in decoder.module.parameters():
        parameter.data.sum()  # weights mapped from a file are not in memory before they are used

    def decode(latents: Tensor) -> tuple[Tensor | None, DecodeReport]:
        stream = decoder.stream(latents, **options, **_own_options(latents))
        return stream.join(), stream.report

    def encode(pictures: Tensor) -> tuple[Tensor | None, Memory]:
        memory = MemoryMeter(Device(decoder.device))
        with memory.counting():
            moments = decoder.encode(pictures, **options)
        return moments, memory.read()

    ready(decoder.device, wait=True)
    _hold(decoder.device, decode if model.call == "decode" else encode, decoder)
    _held["options"] = options


def _own_options(latents: Tensor) -> dict[str, Any]:
    """What this process's model needs besides latents."""
    owner: VAE = _held["owner"]
    return decode_options(owner.module, latents)


def _hold_diffusers(model: Model, tiled: bool, channels_last: bool, compiled: bool) -> None:
    torch.backends.cudnn.allow_tf32 = not model.exact
    device = Device.default(model.device)
    vae: Any = diffusers_module(model.path, model.dtype, encoder=model.call == "encode")
    vae.to(device.torch_device)

    def laid_out(x: Tensor) -> Tensor:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))

    for parameter in vae.parameters():  # the same, in memory of their own
        parameter.data = laid_out(parameter.data.clone())
    if tiled:
        vae.enable_tiling()

    def decode(latents: Tensor) -> tuple[Tensor | None, Memory]:
        memory = MemoryMeter(device)
        with torch.inference_mode(), memory.counting():
            x = laid_out(latents.to(device.torch_device, model.dtype))
            is_decode = model.call == "decode"
            result = vae.decode(x, **decode_options(vae, x)).sample if is_decode else zoo.encode(vae, x)
        device.synchronize()
        return result, memory.read()

    _hold(device.torch_device, decode, vae)
    if compiled:
        (vae.decoder if model.call == "decode" else vae.encoder).compile()


def _hold(device: torch.device, decode: Callable[..., tuple[Tensor | None, Any]], owner: Any) -> None:
    # Resting is what this process holds before its first decode: later, the allocator keeps some of what was freed.
    own = Device(device)
    _held.update(device=own, decode=decode, owner=owner, resting=MemoryMeter(own).resting)


class OutOfMemory(RuntimeError):
    """A decode found too little memory; `reserved` is how many bytes it had."""

    def __init__(self, reserved: int) -> None:
        super().__init__(reserved)
        self.reserved = reserved


def _decode(latents: Tensor, keep: bool) -> tuple[float, Memory, Tensor | None, DecodeReport | None]:
    """What this rank took, with the frames if they are to be kept, and halovae's report."""
    device: Device = _held["device"]
    if dist.is_initialized():
        dist.barrier()
    clock = Stopwatch(device)
    with _noticing_lack_of_memory(device):
        with clock.running():
            frames, took = _held["decode"](latents)
        seconds = clock.seconds()
    kept = frames.cpu() if keep and frames is not None else None
    report = took if isinstance(took, DecodeReport) else None
    memory = took if report is None else report.memory
    return seconds, replace(memory, resting=_held["resting"]), kept, report


def _plan(latents: Tensor) -> None:
    _held["owner"].stream(latents, **_held["options"], **_own_options(latents)).close()


def _warm_up(shape: Sequence[int]) -> float:
    with _noticing_lack_of_memory(_held["device"]):
        own = _own_options(torch.zeros(*shape))
        return float(_held["owner"].warmup(shape, **_held["options"], **own))


def _profiled(latents: Tensor, label: str, trace: Path) -> Profile | None:
    """On rank 0, what its decode is made of."""
    device: Device = _held["device"]
    with FlopCounterMode(display=False) as counter:
        _held["decode"](latents)
    if dist.is_initialized() and dist.get_rank() > 0:
        _held["decode"](latents)
        return None
    one = profiled(device, lambda: _held["decode"](latents), counter.get_total_flops(), label, trace)
    return replace(one, peaks=peaks(device, _held["owner"].dtype))


@contextmanager
def _noticing_lack_of_memory(device: Device) -> Iterator[None]:
    whole = MemoryMeter(device)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what it held lets the rest of this process go on
        raise OutOfMemory(whole.read().peak_reserved) from error


def _simulate(latents: Tensor, grid: Grid, link: Link) -> Simulation:
    return simulate(_held["owner"], latents, grid, link, **_own_options(latents))


@dataclass
class Contestant:
    """One way to decode, and what its decodes took.

    Attributes:
        name: for tables.
        model: what it decodes with.
        ranks: how many ranks do.
        threads: CPU threads of each.
        kind: "halovae", "diffusers", or "tiled" for diffusers' tiling.
        compiled: whether diffusers' module is compiled.
        channels_last: whether channels lie side by side in diffusers' weights and latents.
        options: of its decodes; see `VAE.stream`.
        report: halovae's of the last decode, by rank 0.
        taken: what each decode took, in order.
        out_of_memory: the bytes reserved when memory ran out; None while it has not.
        frames: of the last decode that was told to keep them.
        warmup_seconds: what the slowest rank took to warm up.
    """

    name: str
    model: Model
    ranks: int
    threads: int
    kind: str = "halovae"
    compiled: bool = False
    channels_last: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"mode": "parallel"})
    report: DecodeReport | None = None
    taken: list[Taken] = field(default_factory=list)
    out_of_memory: int | None = None
    frames: Tensor | None = None
    warmup_seconds: float = 0
    _group: Ranks | None = None

    @property
    def group(self) -> Ranks:
        """Its processes, started with the model in them when they are first needed."""
        if self._group is None:
            own = self.kind == "halovae"
            # diffusers runs as its users run it
            self._group = Ranks(self.ranks, self.threads, RANK_ENVIRONMENT if own else {})
            if own:
                self._group.run(_hold_halovae, self.model, self.options)
            else:
                self._group.run(_hold_diffusers, self.model, self.kind == "tiled", self.channels_last, self.compiled)
        return self._group

    def warm_up(self, latents: Tensor) -> None:
        """Do what is only done the first time, which nobody measures, before decodes of these latents."""
        own, is_decode = self.kind == "halovae", self.model.call == "decode"
        if own and is_decode:
            self._attempted(_plan, latents)
            seconds = self._attempted(_warm_up, latents.shape)
        else:
            # On an accelerator kernels are chosen by shape, as by a compiler; the CPU just loads.
            crop = latents[:, :, :2] if latents.ndim == 5 else latents
            by_shape = self.model.device != "cpu" or self.compiled or not is_decode
            crop = latents if by_shape else crop[..., : self.ranks, : self.ranks]
            seconds = [taken[0] for taken in self._attempted(_decode, crop, False)]
        self.warmup_seconds = max(seconds, default=0)

    def decode(self, latents: Tensor, keep: bool = False) -> None:
        """Decode once more, unless memory ran out before."""
        results = self._attempted(_decode, latents, keep)
        if results:
            seconds, memories, *_ = zip(*results, strict=True)
            self.report = results[0][3]
            self.taken.append(Taken(max(seconds), Memory.over(memories)))
        if results and keep:
            self.frames = results[0][2]

    def _attempted(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function` returned on each rank; nothing once memory has run out."""
        if self.out_of_memory is not None:
            return []
        try:
            return self.group.run(function, *args)
        except RankError as error:
            if not (error.killed or isinstance(error.cause, OutOfMemory)):
                raise
            # A rank that the system ended cannot say how far it came.
            self.out_of_memory = error.cause.reserved if isinstance(error.cause, OutOfMemory) else 0
            self.close()
            return []

    def profile(self, latents: Tensor, trace: Path) -> Profile | None:
        """What rank 0's decode is made of, with a Chrome trace; None if memory ran out before."""
        label = f"{self.name}, {self.ranks} rank{'s' * (self.ranks > 1)}"
        return next(iter(self._attempted(_profiled, latents, label, trace)), None)

    def simulate(self, latents: Tensor, grid: Grid, link: Link) -> Simulation:
        """Decode by simulated ranks in this contestant's one process."""
        return self.group.run(_simulate, latents, grid, link)[0]

    @property
    def seconds(self) -> float:
        """The median over the decodes."""
        return statistics.median(taken.seconds for taken in self.taken)

    def memory(self, figure: str) -> float:
        """The median over the decodes of an attribute of `Memory`."""
        return statistics.median(getattr(taken.memory, figure) for taken in self.taken)

    def close(self) -> None:
        """End its processes."""
        if self._group is not None:
            self._group.close()
            self._group = None

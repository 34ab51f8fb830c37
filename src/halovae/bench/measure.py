"""Contestants that take turns: each decodes on ranks of its own, and keeps what its decodes took."""

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
from halovae.runtime.options import Call
from halovae.runtime.simulate import Simulation, simulate
from halovae.runtime.vae import VAE, load

# What a contestant's processes hold between calls.
_held: dict[str, Any] = {}

_LEAST = 2  # rows and cols of latents to warm up with; padding by reflection takes no fewer


@dataclass(frozen=True)
class Model:
    """What to load, and how.

    Attributes:
        path: the VAE: a folder in diffusers layout, or a file.
        name: the class of the VAE.
        dtype: the dtype of computation.
        device: the kind of device.
        exact: whether fp32 means fp32; by torch's default, CUDA's convolutions round their input to TF32.
        call: the call that is measured; in an encode, pictures take the place of latents.
    """

    path: Path
    name: str
    dtype: torch.dtype
    device: str
    exact: bool = False
    call: Call = "decode"


@dataclass(frozen=True)
class Taken:
    """The slowest rank's seconds in one decode, and the memory over all ranks. At rest: before the first decode."""

    seconds: float
    memory: Memory


def _hold_halovae(model: Model, options: dict[str, Any]) -> None:
    torch.backends.cudnn.allow_tf32 = not model.exact
    device = Device.default(model.device).torch_device
    decoder = load(model.path, dtype=model.dtype, device=device, encoder=model.call == "encode")
    for parameter in decoder.module.parameters():
        parameter.data.sum()  # weights mapped from a file are not in memory before they are used

    def decode(latents: Tensor) -> tuple[Tensor | None, DecodeReport]:
        stream = decoder.stream(latents, **options, module_kwargs=_model_options(latents))
        return stream.join(), stream.report

    def encode(pictures: Tensor) -> tuple[Tensor | None, Memory]:
        memory = MemoryMeter(Device(decoder.device))
        with memory.counting():
            moments = decoder.encode(pictures, **options)
        return moments, memory.read()

    ready(decoder.device, wait=True)
    _hold(decoder.device, decode if model.call == "decode" else encode, decoder)
    _held["options"] = options


def _model_options(latents: Tensor) -> dict[str, Any]:
    """Return the options that this process's model needs besides latents."""
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

    for parameter in vae.parameters():  # equal weights in memory of their own
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
    # Memory at rest is measured before the first decode: afterwards the allocator keeps some of what was freed.
    wrapped = Device(device)
    _held.update(device=wrapped, decode=decode, owner=owner, resting=MemoryMeter(wrapped).resting)


class OutOfMemory(RuntimeError):
    """A decode ran out of memory; `reserved` is how many bytes it had reserved."""

    def __init__(self, reserved: int) -> None:
        super().__init__(reserved)
        self.reserved = reserved


def _decode(latents: Tensor, keep: bool) -> tuple[float, Memory, Tensor | None, DecodeReport | None]:
    """Decode once. Return this rank's seconds and memory, the frames on the CPU if `keep`, and halovae's report."""
    device: Device = _held["device"]
    if dist.is_initialized():
        dist.barrier()
    clock = Stopwatch(device)
    with _raising_out_of_memory(device):
        with clock.running():
            frames, took = _held["decode"](latents)
        seconds = clock.seconds()
    kept = frames.cpu() if keep and frames is not None else None
    report = took if isinstance(took, DecodeReport) else None
    memory = took if report is None else report.memory
    return seconds, replace(memory, resting=_held["resting"]), kept, report


def _plan(latents: Tensor) -> None:
    _held["owner"].stream(latents, **_held["options"], module_kwargs=_model_options(latents)).close()


def _warm_up(shape: Sequence[int]) -> float:
    with _raising_out_of_memory(_held["device"]):
        options = _model_options(torch.zeros(*shape))
        return float(_held["owner"].warmup(shape, **_held["options"], module_kwargs=options))


def _profiled(latents: Tensor, label: str, trace: Path) -> Profile | None:
    """Profile a decode on rank 0; None on the others."""
    device: Device = _held["device"]
    with FlopCounterMode(display=False) as counter:
        _held["decode"](latents)
    if dist.is_initialized() and dist.get_rank() > 0:
        _held["decode"](latents)
        return None
    profile = profiled(device, lambda: _held["decode"](latents), counter.get_total_flops(), label, trace)
    return replace(profile, peaks=peaks(device, _held["owner"].dtype))


@contextmanager
def _raising_out_of_memory(device: Device) -> Iterator[None]:
    meter = MemoryMeter(device)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # frees what the decode held
        raise OutOfMemory(meter.read().peak_reserved) from error


def _simulate(latents: Tensor, grid: Grid, link: Link) -> Simulation:
    return simulate(_held["owner"], latents, grid, link, module_kwargs=_model_options(latents))


@dataclass
class Contestant:
    """One way to decode, and what its decodes took.

    Attributes:
        name: its name in tables.
        model: the model that it decodes with.
        ranks: how many ranks decode.
        threads: CPU threads of each rank.
        kind: "halovae", "diffusers", or "tiled" for diffusers' tiling.
        compiled: whether diffusers' module is compiled.
        channels_last: whether channels lie side by side in diffusers' weights and latents.
        options: options of its decodes; see `VAE.stream`.
        report: rank 0's report of halovae's last decode.
        taken: what each decode took, in order.
        out_of_memory: the bytes reserved when memory ran out; None while it has not.
        frames: the frames of the last decode with `keep`.
        warmup_seconds: seconds that the slowest rank took to warm up.
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
    _processes: Ranks | None = None

    @property
    def processes(self) -> Ranks:
        """Its processes. They start, and load the model, when they are first needed."""
        if self._processes is None:
            is_ours = self.kind == "halovae"
            # diffusers runs as its users run it
            self._processes = Ranks(self.ranks, self.threads, RANK_ENVIRONMENT if is_ours else {})
            if is_ours:
                self._processes.run(_hold_halovae, self.model, self.options)
            else:
                self._processes.run(
                    _hold_diffusers, self.model, self.kind == "tiled", self.channels_last, self.compiled
                )
        return self._processes

    def warm_up(self, latents: Tensor) -> None:
        """Do unmeasured what only the first decode of these latents does."""
        is_ours, is_decode = self.kind == "halovae", self.model.call == "decode"
        if is_ours and is_decode:
            self._attempted(_plan, latents)
            seconds = self._attempted(_warm_up, latents.shape)
        else:
            # Accelerators and compilers choose kernels by shape; the CPU only loads them.
            crop = latents[:, :, :2] if latents.ndim == 5 else latents
            by_shape = self.model.device != "cpu" or self.compiled or not is_decode
            least = max(self.ranks, _LEAST)
            crop = latents if by_shape else crop[..., :least, :least]
            seconds = [taken[0] for taken in self._attempted(_decode, crop, False)]
        self.warmup_seconds = max(seconds, default=0)

    def decode(self, latents: Tensor, keep: bool = False) -> None:
        """Decode once more, unless memory has run out."""
        results = self._attempted(_decode, latents, keep)
        if results:
            seconds, memories, *_ = zip(*results, strict=True)
            self.report = results[0][3]
            self.taken.append(Taken(max(seconds), Memory.over(memories)))
        if results and keep:
            self.frames = results[0][2]

    def _attempted(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function` on each rank. Return the results; none once memory has run out."""
        if self.out_of_memory is not None:
            return []
        try:
            return self.processes.run(function, *args)
        except RankError as error:
            if not (error.killed or isinstance(error.cause, OutOfMemory)):
                raise
            # A rank that the system killed cannot say how much it had reserved.
            self.out_of_memory = error.cause.reserved if isinstance(error.cause, OutOfMemory) else 0
            self.close()
            return []

    def profile(self, latents: Tensor, trace: Path) -> Profile | None:
        """Profile a decode on rank 0, and write a Chrome trace; None if memory has run out."""
        label = f"{self.name}, {self.ranks} rank{'s' * (self.ranks > 1)}"
        return next(iter(self._attempted(_profiled, latents, label, trace)), None)

    def simulate(self, latents: Tensor, grid: Grid, link: Link) -> Simulation:
        """Decode on simulated ranks in this contestant's one process."""
        return self.processes.run(_simulate, latents, grid, link)[0]

    @property
    def seconds(self) -> float:
        """The median over the decodes."""
        return statistics.median(taken.seconds for taken in self.taken)

    def memory(self, figure: str) -> float:
        """The median over the decodes of an attribute of `Memory`."""
        return statistics.median(getattr(taken.memory, figure) for taken in self.taken)

    def close(self) -> None:
        """End its processes."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

"""What runs in a process that has the stand-in device. Functions return plain values, for tests to judge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from device import stand_in
from device.recorded_graph import RecordedGraph, recording
from samples import latents, reference, vae
from torch import Tensor, nn

import halovae
from halovae import VAE
from halovae.bench import on_grids
from halovae.device.captures import captures
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.grid import Grid
from halovae.models import zoo
from halovae.models.zoo import Direction
from halovae.plane import backends, windows
from halovae.plane.strip_program import InStrips, StripProgram

ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
_SIMULATION = "distributed/simulated.py"  # waits for its clocks; ranks that are processes do not


@dataclass
class Outcome:
    """What calls on the device did.

    Attributes:
        error: of the result, relative to the same call by diffusers on the CPU.
        devices: the kinds of devices that the results of all ranks are on.
        waits: what made the host wait in the second call, by chunks where there are any.
        on_host: operators on tensors of the CPU in the second call.
        eager: why it was not recorded.
    """

    error: float = 0.0
    devices: set[str] = field(default_factory=set)
    waits: list[str] = field(default_factory=list)
    on_host: list[str] = field(default_factory=list)
    eager: str = ""


@contextmanager
def triton() -> Iterator[None]:
    """Use the Triton kernels, as on CUDA devices, in Triton's interpreter."""
    from halovae.kernels import triton_kernels

    before, kernels = backends.kernels, stand_in.HostKernels(triton_kernels)
    backends.kernels = lambda kind: None if kind == "meta" else kernels  # type: ignore[assignment]
    try:
        yield
    finally:
        backends.kernels = before


def call(name: str, direction: Direction, grid: str, fused: bool = False) -> Outcome:
    """Decode or encode twice on one rank, or on simulated ranks; the second call is watched.

    Args:
        name: of an entry of the zoo.
        direction: which of its two calls.
        grid: of the ranks.
        fused: whether with Triton kernels.
    """
    if fused:
        with triton():
            return call(name, direction, grid)
    entry, shape = ENTRIES[name], Grid.parse(grid)
    device = torch.device(stand_in.kind())
    expected = on_grids.plain(entry, direction, torch.float64)
    module = zoo.build(entry, torch.float64)
    x = on_grids.example(entry, direction, torch.float64).to(device)
    done = Outcome()

    def rank(mesh: Mesh) -> Tensor:
        own = copy.deepcopy(module).to(device)  # some classes keep caches on themselves
        sharded = halovae.shard(lambda z: zoo.CALLS[direction](own, z), own, multiple=entry.multiple(direction))
        with torch.no_grad():
            torch.manual_seed(0)  # as `zoo.decode` does, which a recorded graph does not repeat
            first = sharded(x, mesh=mesh)
            torch.manual_seed(0)
            with stand_in.watching() as seen:
                result = sharded(x, mesh=mesh)
        assert first is not None
        assert result is not None
        assert torch.equal(first, result)
        assert sharded.report is not None
        done.eager = done.eager or sharded.report.eager
        done.waits.extend(one for one in seen.waits if _SIMULATION not in one)
        done.on_host.extend(seen.on_host)
        done.devices.add(result.device.type)
        return result

    results = on_threads(shape, device, rank) if shape.size > 1 else [rank(Mesh(shape, device))]
    done.error = on_grids.error([one.cpu() for one in results], expected)
    return done


def stream(family: str, dtype: torch.dtype | None = None) -> tuple[list[list[str]], list[str], Outcome]:
    """Stream a clip twice.

    Args:
        family: of `samples`.
        dtype: of the frames.

    Returns:
        The waits of each chunk of the second time, and of the end; those of reading its report; and the outcome.
    """
    z, device = latents(family, 4, 4, 5), torch.device(stand_in.kind())
    expected = reference(family, z)
    decoder = VAE(copy.deepcopy(vae(family)).to(device))
    there = z.to(device)
    decoder.decode(there, dtype=dtype)
    done, chunks, waits = Outcome(), [], []
    with stand_in.watching() as seen:
        pieces = decoder.stream(there, dtype=dtype)
        while True:
            before = len(seen.waits)
            chunk = next(pieces, None)
            waits.append(seen.waits[before:])
            if chunk is None:
                break
            chunks.append(chunk)
    done.devices = {one.device.type for one in chunks}
    done.waits, done.on_host = seen.waits, seen.on_host
    with stand_in.watching() as seen:
        assert pieces.report.seconds > 0
    frames = torch.cat(chunks, 2).cpu()
    if dtype == torch.uint8:
        expected = expected.div(2).add(0.5).clamp(0, 1).mul(255).round()
    done.error = float((frames.float() - expected).abs().max())
    return waits, seen.waits, done


def parallelized(family: str) -> Outcome:
    """Decode and encode by the methods of an autoencoder that `halovae.parallelize` replaced."""
    module, device = copy.deepcopy(vae(family)), torch.device(stand_in.kind())
    z = latents(family, frames=2)
    with torch.no_grad():
        frames = module.decode(z).sample
        moments = module.encode(frames).latent_dist.parameters
        halovae.parallelize(module.to(device))
        done = Outcome()
        for call, x, expected in (
            (lambda given: module.decode(given).sample, z, frames),
            (lambda given: module.encode(given).latent_dist.parameters, frames, moments),
        ):
            there = x.to(device)
            call(there)
            with stand_in.watching() as seen:
                found = call(there)
            done.waits += seen.waits
            done.on_host += seen.on_host
            done.devices.add(found.device.type)
            done.error = max(done.error, float((found.cpu() - expected).abs().max()))
    return done


@contextmanager
def graphs() -> Iterator[None]:
    """Give the device captured graphs. They note operators, and run them again."""
    device: Any = getattr(torch, stand_in.kind())
    names = {f"{stand_in.kind().upper()}Graph": RecordedGraph, "graph": recording}
    for name, value in names.items():
        setattr(device, name, value)
    captures.cache_clear()
    try:
        yield
    finally:
        for name in names:
            delattr(device, name)
        captures.cache_clear()


def captured(name: str, direction: Direction, counted: bool = False) -> tuple[float, int, int, str]:
    """Call an entry of the zoo six times, each time with other values, where the device has graphs.

    Args:
        name: of the entry.
        direction: which call.
        counted: whether somebody hears of steps.

    Returns:
        The largest error; how often a graph was replayed, and how many there are; and why it was not recorded.
    """
    hearing = halovae.on_each_step(lambda done, total: None) if counted else nullcontext()
    with graphs(), torch.no_grad(), hearing:
        entry, device = ENTRIES[name], torch.device(stand_in.kind(), 0)
        module = zoo.build(entry, torch.float64)
        own = copy.deepcopy(module).to(device)
        sharded = halovae.shard(lambda z: zoo.CALLS[direction](own, z), own, multiple=entry.multiple(direction))
        x, found = on_grids.example(entry, direction, torch.float64), list[Tensor]()
        expected = []
        for step in range(6):
            z = x * (1 + step / 4)
            expected.append(zoo.CALLS[direction](module, z))
            result = sharded(z.to(device))
            assert result is not None
            found.append(result)  # read at the end: later calls must not overwrite it
        error = max(on_grids.error([one.cpu()], truth) for one, truth in zip(found, expected, strict=True))
        pool = captures(device)
        assert sharded.report is not None
        return error, pool.replays, len(pool), sharded.report.eager


def captured_stream(family: str, budget: int | None = None) -> tuple[float, int, list[str]]:
    """Warm up, then stream a clip as pictures where the device has graphs.

    Returns:
        The largest error in steps of 255, how often a graph was replayed while it streamed, and waits.
    """
    with graphs():
        z, device = latents(family, 6, 4, 5), torch.device(stand_in.kind(), 0)
        expected = reference(family, z).div(2).add(0.5).clamp(0, 1).mul(255).round()
        decoder = VAE(copy.deepcopy(vae(family)).to(device))
        decoder.warmup(z.shape, memory_budget=budget)
        there, before = z.to(device), captures(device).replays
        with stand_in.watching() as seen:
            pieces = [one for one in decoder.stream(there, dtype=torch.uint8, memory_budget=budget) if one is not None]
        frames = torch.cat(pieces, 2).cpu()
        return float((frames.float() - expected).abs().max()), captures(device).replays - before, seen.waits


def peaks(name: str) -> tuple[int, int]:
    """The peak of a picture's decode on one rank, in bytes: by the recorded graph, and as the device counted it."""
    entry, device = ENTRIES[name], torch.device(stand_in.kind())
    module = zoo.build(entry, torch.float32).to(device)
    x = on_grids.example(entry, "decode", torch.float32).to(device)
    sharded = halovae.shard(lambda z: zoo.decode(module, z), module)
    counts: Any = getattr(torch, stand_in.kind())
    with torch.no_grad():
        sharded(x)
        counts.reset_peak_memory_stats()
        before = counts.memory_allocated()
        sharded(x)
    assert sharded.report is not None
    return sharded.report.peak, counts.max_memory_allocated() - before


def in_strips(name: str, host: bool) -> tuple[int, int, int, float]:
    """A clip's decode in strips: bytes left for later strips, the peak as planned and as counted, and the error."""
    entry, device = ENTRIES[name], torch.device(stand_in.kind())
    module = zoo.build(entry, torch.float32)
    x = torch.randn((1, (entry.shape("decode") or ())[1], 3, 8, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = zoo.decode(module, x)
    module.to(device)
    x = x.to(device)
    sharded = halovae.shard(lambda z: zoo.decode(module, z), module)
    counts: Any = getattr(torch, stand_in.kind())
    way = InStrips(8, "cols", host=host)
    with torch.no_grad():
        sharded(x, grid=Grid(), strips=way)
        counts.reset_peak_memory_stats()
        before = counts.memory_allocated()
        found = sharded(x, grid=Grid(), strips=way)
    assert found is not None
    ((program, *_),) = [(one,) for one in sharded._programs.values() if isinstance(one, StripProgram)]
    own = counts.max_memory_allocated() - before - found.nbytes
    return program.left, program.peak, own, float((found.cpu() - expected).abs().max())


class Tables(nn.Module):
    """A module that makes tensors on the host, and moves them to its input's device, as diffusers' often do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = [1.0, 2.0, 3.0]
        self.kept = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        ramp = torch.arange(3).to(x.device).to(x.dtype)
        x = x * ramp.view(3, 1, 1) + torch.tensor(self.scale).to(x).view(3, 1, 1)
        noise = torch.rand(x.shape[1]).to(x)
        return x + self.kept.to(x.device).view(3, 1, 1) + noise.view(3, 1, 1)


def tables() -> tuple[float, str]:
    """The error of a module that makes tensors on the host, and why it was not recorded."""
    torch.manual_seed(1)
    module = Tables().double()
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = module(x)
        sharded = halovae.shard(module.to(stand_in.kind()))
        there = x.to(stand_in.kind())
        sharded(there)
        torch.manual_seed(0)
        found = sharded(there)
    assert found is not None
    assert sharded.report is not None
    return float((found.cpu() - expected).abs().max()), sharded.report.eager


class Misused(nn.Module):
    """A module that does what must be noticed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "made on the host":
            return x + torch.ones(x.shape)
        if self.how == "joined with the host's":
            return torch.cat([x, torch.ones(x.shape)], 1)
        if self.how == "numpy":
            return x + float(x.numpy()[0, 0, 0, 0])
        if self.how == "item":
            return x / x.abs().max().item()
        if self.how == "bool":
            return x if bool((x > 0).any()) else -x
        if self.how == "tolist":
            return x * x[0, 0, 0].tolist()[0]
        if self.how == "to the host and back":
            return x.cpu().mul(2).to(x.device)
        if self.how == "indexed by a mask":
            x[x > 0] = 0
            return x
        if self.how == "uploaded":
            return x * torch.tensor([1.0, 2.0, 3.0], device=x.device).view(3, 1, 1)
        if self.how == "compared":
            return x if torch.equal(x, x) else -x
        assert self.how == "nothing"
        return x


def misused(how: str) -> tuple[str, list[str], list[str]]:
    """Call a module on the device, and return the error, if there was one, waits, and operators on the host."""
    device = torch.device(stand_in.kind())
    module = Misused(how).to(device)
    x = torch.randn(1, 3, 4, 4, device=device)
    error = ""
    with torch.no_grad(), stand_in.watching() as seen:
        try:
            module(x)
        except (RuntimeError, TypeError) as raised:
            error = str(raised)
    return error, seen.waits, seen.on_host


def address() -> None:
    """Hand a device tensor's address to code of the host, which reads there: the process ends."""
    import ctypes

    ctypes.string_at(torch.ones(4, device=stand_in.kind()).data_ptr(), 4)


def broken(how: str) -> str | Outcome:
    """Decode a clip with a mistake in halovae's own code, and return the outcome, or the error.

    Args:
        how: "zeros" are made on the CPU; or "reading" a value at each join of a clip's past.
    """
    after = windows._after

    def zeros(count: int, past: Tensor | None, x: Tensor) -> Tensor:
        blank = torch.zeros(*x.shape[:2], count, *x.shape[3:], dtype=x.dtype)
        return torch.cat([*([blank] if count else []), *([] if past is None else [past]), x], 2)

    def reading(count: int, past: Tensor | None, x: Tensor) -> Tensor:
        assert x.is_meta or x.sum().item() is not None
        return after(count, past, x)

    wrong: Any = {"zeros": zeros, "reading": reading}[how]
    windows._after = wrong
    try:
        return call("AutoencoderKLWan (2.1)", "decode", "1x1")
    except RuntimeError as error:
        return str(error)
    finally:
        windows._after = after

"""Measure this machine once, and remember it.

A VAE of the true widths but fewer blocks decodes small latents of several sizes, by its recorded graph. Each operator
is timed, and for each kind the rates per call, FLOP, byte and weight that explain these times best become its entry.
"""

from __future__ import annotations

import math
import os
import re
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halovae.device.kinds import Device, cache_folder
from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Link
from halovae.grid import Grid
from halovae.kernels.halves import has_units
from halovae.kernels.native import EAGER, Kernels
from halovae.models.architectures import sample_vae
from halovae.plane.results import ShardReport
from halovae.plane.sharded import Sharded
from halovae.planning.calibration import OTHER, Calibration, Rates
from halovae.planning.cost import Work, described, norm_work

# Latent frames, rows and cols of the decodes that are timed; accelerators need more to be busy.
SAMPLES: tuple[tuple[int, int, int], ...] = ((3, 4, 4), (3, 8, 8), (2, 16, 16), (1, 32, 32))
CHANNELS = 16
LARGER = 4
# Rows and cols of each rank in the decode that is shared.
SHARED = 8
MESSAGES = (2**10, 2**16, 2**20, 2**24)
FEATURES = ("calls", "flops", "bytes", "weights")

Timed = tuple[str, Work, float]


class _Timing(TorchDispatchMode):
    """Times each operator."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.samples: list[Timed] = []
        self._device = device
        self._within = False  # whether an operator runs

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        self._within = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._within = False
        self._device.synchronize()
        seconds = time.perf_counter() - begin
        self.samples.append((*described(func, args, kwargs or {}, result), seconds))
        return result

    def kernels(self, real: Kernels) -> Kernels:
        """Compiled norms of cells, which no mode sees, timed where they are not a part of an operator."""

        norms = real.norms
        if norms is None:
            return real

        def normalize(x: Tensor, scale: Tensor, added: float, least: float, silu: bool, out: Tensor) -> None:
            begin = time.perf_counter()
            norms.normalize(x, scale, added, least, silu, out)
            if self._within:
                return
            self._device.synchronize()
            self.samples.append(("norm_silu", norm_work(x, out), time.perf_counter() - begin))

        return replace(real, norms=replace(norms, normalize=normalize))


class _Sample:
    """Decodes of a true-size VAE with as few blocks as it can have."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        vae = sample_vae(device.torch_device, dtype)
        self._device, self._dtype = device, dtype
        self._sharded = Sharded(lambda latents: vae.decode(latents).sample, [vae])

    def decode(
        self, mesh: Mesh, shape: tuple[int, int, int], kernels: Kernels, timing: _Timing | None = None
    ) -> tuple[float, ShardReport]:
        """Decode latents of so many frames, rows and cols; returns what it took, but for the recording."""
        latents = torch.randn(1, CHANNELS, *shape, generator=torch.Generator().manual_seed(0))
        latents = latents.to(self._device.torch_device, self._dtype)
        chunks = self._sharded.stream(latents, mesh=mesh, gather="none", kernels=kernels)
        with nullcontext() if timing is None else timing:
            begin = time.perf_counter()
            chunks.join()
            self._device.synchronize()
            seconds = time.perf_counter() - begin
        assert self._sharded.report is not None
        return seconds, self._sharded.report


def rates(sample: _Sample, device: Device, kernels: Kernels) -> dict[str, Rates]:
    """Measure what this rank takes for each kind of operator."""
    samples: list[Timed] = []
    alone = Mesh(Grid(), device.torch_device)
    for frames, rows, cols in SAMPLES:
        larger = 1 if device.kind == "cpu" else LARGER
        shape = frames, rows * larger, cols * larger
        timing = _Timing(device)
        sample.decode(alone, shape, kernels)
        sample.decode(alone, shape, timing.kernels(kernels), timing)
        samples += timing.samples
        if len(samples) == len(timing.samples):  # the smallest, where what lies between the operators shows
            whole = min(sample.decode(alone, shape, kernels)[0] for _ in range(3))
            between = max(0.0, whole - sum(seconds for *_, seconds in samples)) / len(samples)
    fitted = fit(samples)
    return {kind: replace(one, calls=one.calls + between) for kind, one in fitted.items()}


def _meeting(sample: _Sample, mesh: Mesh, kernels: Kernels) -> float:
    """Seconds that ranks wait for each other at a message amid a decode: none is ever quite as fast as the others."""
    shape = 1, SHARED * mesh.grid.size, SHARED
    taken = [sample.decode(mesh, shape, kernels)[1] for _ in range(12)][2:]
    own = statistics.median(one.waiting / one.calls for one in taken)
    return statistics.mean(mesh.transport.all_values(own))


def fit(samples: Sequence[Timed]) -> dict[str, Rates]:
    """For each kind the rates that explain the samples best, none below zero, and those of all passes over memory."""
    kinds: dict[str, list[tuple[Work, float]]] = defaultdict(list)
    for kind, work, seconds in samples:
        kinds[kind].append((work, seconds))
        if not work.flops and kind != "view":
            kinds[OTHER].append((work, seconds))
    return {kind: _fitted(found) for kind, found in kinds.items()}


def _fitted(samples: Sequence[tuple[Work, float]]) -> Rates:
    features = torch.tensor([[getattr(work, name) for name in FEATURES] for work, _ in samples], dtype=torch.float64)
    seconds = torch.tensor([seconds for _, seconds in samples], dtype=torch.float64).clamp_min(1e-9)
    # Between the absolute error, which would forget the small ones, and the relative one, which knows nothing else.
    weight = seconds.rsqrt().unsqueeze(1)
    best, found = math.inf, Rates(calls=float(seconds.mean()))
    scale = features.amax(0)
    usable = [index for index in range(len(FEATURES)) if scale[index] > 0]
    for count in range(1, len(usable) + 1):
        for chosen in map(list, combinations(usable, count)):  # as few features as there are, all may be tried
            left = features[:, chosen] / scale[chosen] * weight
            solution = torch.linalg.lstsq(left, seconds.unsqueeze(1) * weight, driver="gelsd").solution
            error = float((left @ solution - seconds.unsqueeze(1) * weight).square().sum())
            if (solution >= 0).all() and error < best * (1 - 1e-6):
                values = (solution.flatten() / scale[chosen]).tolist()
                best = error
                found = Rates(**{FEATURES[index]: value for index, value in zip(chosen, values, strict=True)})
    return found


def _link(take: Callable[[int], object], device: Device) -> Link:
    """What `take(bytes)` takes, by its medians over several sizes."""
    samples = []
    for size in MESSAGES:
        seconds = []
        for _ in range(12):
            begin = time.perf_counter()
            take(size)
            device.synchronize()
            seconds.append(time.perf_counter() - begin)
        samples.append((Work(calls=1, bytes=size), statistics.median(seconds[2:])))
    fitted = _fitted(samples)
    return Link(fitted.calls, fitted.bytes)


def _exchange(mesh: Mesh, pair: tuple[int, int], size: int) -> None:
    if mesh.rank in pair:
        peer = pair[1] if mesh.rank == pair[0] else pair[0]
        mine, theirs = (torch.empty(size, dtype=torch.uint8, device=mesh.device.torch_device) for _ in range(2))
        mesh.transport.exchange("rows", [(peer, mine)], [(peer, theirs)])


def measure(mesh: Mesh, dtype: torch.dtype, kernels: Kernels) -> Calibration:
    """Measure; all ranks of the mesh, which spans the world along its rows, call, and all get rank 0's figures."""
    device = mesh.device
    sample = _Sample(device, dtype)
    together = rates(sample, device, kernels)
    alone, hosts = together, mesh.transport.all_values(socket.gethostname())
    if mesh.transport.world > 1:
        alone = rates(sample, device, kernels) if mesh.rank == 0 else {}
        mesh.transport.all_values(None)  # until it is done
    size = mesh.grid.size
    exchange, gather = {"host": Link(0, 0)}, {"host": Link(0, 0)}
    for pair in [(rank, rank + 1) for rank in range(size - 1)]:
        name = "host" if hosts[pair[0]] == hosts[pair[1]] else "hosts"
        if exchange.get(name, Link(0, 0)) == Link(0, 0):
            exchange[name] = mesh.transport.all_values(_link(partial(_exchange, mesh, pair), device))[pair[0]]
    if size > 1:

        def everyone(count: int) -> None:
            own = torch.empty(max(1, count // (size - 1)), dtype=torch.uint8, device=mesh.device.torch_device)
            mesh.transport.all_gather("plane", own, size)

        gather = dict.fromkeys(exchange, _link(everyone, device))
        meeting = _meeting(sample, mesh, kernels)
        exchange, gather = (
            {pair: replace(link, latency=max(link.latency, meeting)) for pair, link in links.items()}
            for links in (exchange, gather)
        )
    source = torch.empty(MESSAGES[-1], dtype=torch.uint8, device=mesh.device.torch_device)
    target = torch.empty_like(source, device="cpu")
    copy = _link(lambda count: target[:count].copy_(source[:count]), device)
    own = Calibration(device.describe()["device"], device.kind, "measured", alone, together, exchange, gather, copy)
    return mesh.transport.all_values(own)[0]


@dataclass(frozen=True)
class _Key:
    """What a calibration is good for."""

    device: str
    backend: str
    dtype: str
    ranks: int
    threads: int
    torch: str
    kernels: str

    @property
    def path(self) -> Path:
        name = "-".join(str(value) for value in vars(self).values())
        return cache_folder() / (re.sub(r"[^\w.+]+", "-", name) + ".json")


def key_of(mesh: Mesh, dtype: torch.dtype, eager: bool) -> _Key:
    """What a calibration of these ranks is kept by; `eager` are the kernels."""
    device = mesh.device
    native = device.kind != "cpu" or has_units(dtype)
    return _Key(
        device=device.describe()["device"],
        backend=device.backend,
        dtype=str(dtype).removeprefix("torch.") + ("" if native else " by fp32"),
        ranks=mesh.transport.world,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels="eager, bands" if eager else "C++, bands",  # convolutions hold their norms
    )


def calibrated(
    mesh: Mesh, dtype: torch.dtype, kernels: Kernels, *, remeasure: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:  # fmt: skip
    """This machine's calibration: what rank 0 has on file, else what all ranks measure now.

    Args:
        mesh: of all ranks of the world, along its rows.
        dtype: what is computed in.
        kernels: which ones.
        remeasure: measure even if there is a file.
        say: told, on rank 0, what takes so long.
    """
    path = key_of(mesh, dtype, kernels is EAGER).path
    kept = stored(path) if mesh.rank == 0 and not remeasure else None
    kept = mesh.transport.all_values(kept)[0]
    if kept is not None:
        return kept
    if mesh.rank == 0:
        say(f"measuring this machine once, for {path}")
    measured = measure(mesh, dtype, kernels)
    if mesh.rank == 0:
        _keep(path, measured)
    return measured


def stored(path: Path) -> Calibration | None:
    """The calibration in a file, if there is one as this version writes it."""
    try:
        return Calibration.from_json(path.read_text())
    except (OSError, ValueError):  # missing, broken, or of another version: measured again
        return None


def _keep(path: Path, measured: Calibration) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(measured.as_json() + "\n")
        partial.replace(path)
    except OSError:  # a read-only home: measured again next time
        partial.unlink(missing_ok=True)

"""Measure this machine once, and keep the result on file.

A VAE of the true widths but with fewer blocks decodes small latents of several sizes by its recorded graph. Each
operator is timed. Each kind of operator gets the rates per call, FLOP, byte, and weight that best explain these times.
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

from halovae.device.copies import pinned
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

# Latent frames, rows, and cols of the timed decodes.
SAMPLES: tuple[tuple[int, int, int], ...] = ((3, 4, 4), (3, 8, 8), (2, 16, 16), (1, 32, 32))
CHANNELS = 16
LARGER = 4  # accelerators need this many times the rows and cols to be busy
# Rows and cols of each rank's shard in the shared decode.
SHARED = 8
MESSAGES = (2**10, 2**16, 2**20, 2**24)
FEATURES = ("calls", "flops", "bytes", "weights")

Timed = tuple[str, Work, float]


class _Timing(TorchDispatchMode):
    """Times each operator that runs."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.samples: list[Timed] = []
        self._device = device
        self._within = False  # whether an operator is running

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
        """Return `real` with timed norms, which no mode sees. Norms within an operator count toward that operator."""

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
    """A VAE of the true widths with as few blocks as it can have, and its decodes."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        vae = sample_vae(device.torch_device, dtype)
        self._device, self._dtype = device, dtype
        self._sharded = Sharded(lambda latents: vae.decode(latents).sample, [vae])

    def decode(
        self, mesh: Mesh, shape: tuple[int, int, int], kernels: Kernels, timing: _Timing | None = None
    ) -> tuple[float, ShardReport]:
        """Decode latents of `shape` (frames, rows, cols). Return the seconds, without the recording, and the report."""
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
    """Measure this rank's rates for each kind of operator."""
    samples: list[Timed] = []
    mesh = Mesh(Grid(), device.torch_device)
    for frames, rows, cols in SAMPLES:
        larger = 1 if device.kind == "cpu" else LARGER
        shape = frames, rows * larger, cols * larger
        timing = _Timing(device)
        sample.decode(mesh, shape, kernels)
        sample.decode(mesh, shape, timing.kernels(kernels), timing)
        samples += timing.samples
        if len(samples) == len(timing.samples):  # the smallest decode shows the time between operators best
            whole = min(sample.decode(mesh, shape, kernels)[0] for _ in range(3))
            between = max(0.0, whole - sum(seconds for *_, seconds in samples)) / len(samples)
    fitted = fit(samples)
    return {kind: replace(one, calls=one.calls + between) for kind, one in fitted.items()}


def _meeting(sample: _Sample, mesh: Mesh, kernels: Kernels) -> float:
    """Return the seconds that ranks wait for each other at a message of a decode: their speeds are never equal."""
    shape = 1, SHARED * mesh.grid.size, SHARED
    taken = [sample.decode(mesh, shape, kernels)[1] for _ in range(12)][2:]
    own = statistics.median(one.waiting / one.calls for one in taken)
    return statistics.mean(mesh.transport.all_values(own))


def fit(samples: Sequence[Timed]) -> dict[str, Rates]:
    """Return the nonnegative rates that best explain each kind's samples; `OTHER` has those of passes over memory."""
    kinds: dict[str, list[tuple[Work, float]]] = defaultdict(list)
    for kind, work, seconds in samples:
        kinds[kind].append((work, seconds))
        if not work.flops and kind != "view":
            kinds[OTHER].append((work, seconds))
    return {kind: _fitted(some) for kind, some in kinds.items()}


def _fitted(samples: Sequence[tuple[Work, float]]) -> Rates:
    features = torch.tensor([[getattr(work, name) for name in FEATURES] for work, _ in samples], dtype=torch.float64)
    seconds = torch.tensor([seconds for _, seconds in samples], dtype=torch.float64).clamp_min(1e-9)
    # A compromise: absolute errors would ignore the short samples, relative errors would ignore the long ones.
    weight = seconds.rsqrt().unsqueeze(1)
    best, found = math.inf, Rates(calls=float(seconds.mean()))
    scale = features.amax(0)
    usable = [index for index in range(len(FEATURES)) if scale[index] > 0]
    for count in range(1, len(usable) + 1):
        for chosen in map(list, combinations(usable, count)):  # few enough to try every choice
            left = features[:, chosen] / scale[chosen] * weight
            solution = torch.linalg.lstsq(left, seconds.unsqueeze(1) * weight, driver="gelsd").solution
            error = float((left @ solution - seconds.unsqueeze(1) * weight).square().sum())
            if (solution >= 0).all() and error < best * (1 - 1e-6):
                values = (solution.flatten() / scale[chosen]).tolist()
                best = error
                found = Rates(**{FEATURES[index]: value for index, value in zip(chosen, values, strict=True)})
    return found


def _link(take: Callable[[int], object], device: Device) -> Link:
    """Return the link that best explains the median seconds of `take(bytes)` over several sizes."""
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


def _copy(device: Device, size: int) -> None:
    x = torch.empty(size // 2, dtype=torch.uint8, device=device.torch_device)
    x.copy_(pinned(x).copy_(x, non_blocking=True), non_blocking=True)


def measure(mesh: Mesh, dtype: torch.dtype, kernels: Kernels) -> Calibration:
    """Measure this machine.

    Collective: every rank must call it, and all get rank 0's figures. The mesh must have all its ranks along its rows.
    """
    device = mesh.device
    sample = _Sample(device, dtype)
    together = rates(sample, device, kernels)
    single, hosts = together, mesh.transport.all_values(socket.gethostname())
    if mesh.transport.world > 1:
        single = rates(sample, device, kernels) if mesh.rank == 0 else {}
        mesh.transport.all_values(None)  # the others wait for rank 0
    size = mesh.grid.size
    exchange, gather = {"host": Link(0, 0)}, {"host": Link(0, 0)}
    for pair in [(rank, rank + 1) for rank in range(size - 1)]:
        name = "host" if hosts[pair[0]] == hosts[pair[1]] else "hosts"
        if exchange.get(name, Link(0, 0)) == Link(0, 0):
            exchange[name] = mesh.transport.all_values(_link(partial(_exchange, mesh, pair), device))[pair[0]]
    if size > 1:

        def gather_from_all(count: int) -> None:
            own = torch.empty(max(1, count // (size - 1)), dtype=torch.uint8, device=mesh.device.torch_device)
            mesh.transport.all_gather("plane", own, size)

        gather = dict.fromkeys(exchange, _link(gather_from_all, device))
        meeting = _meeting(sample, mesh, kernels)
        exchange, gather = (
            {pair: replace(link, latency=max(link.latency, meeting)) for pair, link in links.items()}
            for links in (exchange, gather)
        )
    own = device.describe()["device"], device.kind, "measured", single, together, exchange, gather
    measured = Calibration(*own, *([] if device.kind in ("cpu", "mps") else [_link(partial(_copy, device), device)]))
    return mesh.transport.all_values(measured)[0]


@dataclass(frozen=True)
class _Key:
    """The conditions that a calibration on file is valid for."""

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
    """Return the key of these ranks' calibration; `eager`: whether the kernels are eager."""
    device = mesh.device
    native = device.kind != "cpu" or has_units(dtype)
    return _Key(
        device=device.describe()["device"],
        backend=device.backend,
        dtype=str(dtype).removeprefix("torch.") + ("" if native else " by fp32"),
        ranks=mesh.transport.world,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels="eager, fused norms" if eager else "C++, fused norms",  # convolutions include their norms
    )


def calibrated(
    mesh: Mesh, dtype: torch.dtype, kernels: Kernels, *, remeasure: bool = False,
    describe: Callable[[str], None] = lambda text: None,
) -> Calibration:  # fmt: skip
    """Return this machine's calibration: the one that rank 0 has on file, else a new one. Collective.

    Args:
        mesh: all ranks that share calls, along its rows.
        dtype: the dtype of computation.
        kernels: the kernels of the decodes.
        remeasure: measure even if there is a file.
        describe: called on rank 0 with what takes so long.
    """
    path = key_of(mesh, dtype, kernels is EAGER).path
    kept = stored(path) if mesh.rank == 0 and not remeasure else None
    kept = mesh.transport.all_values(kept)[0]
    if kept is not None:
        return kept
    if mesh.rank == 0:
        describe(f"measuring this machine once, for {path}")
    measured = measure(mesh, dtype, kernels)
    if mesh.rank == 0:
        _keep(path, measured)
    return measured


def stored(path: Path) -> Calibration | None:
    """Return the calibration in a file; None if the file is missing, broken, or of another version."""
    try:
        return Calibration.from_json(path.read_text())
    except (OSError, ValueError):  # measured again
        return None


def _keep(path: Path, measured: Calibration) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(measured.as_json() + "\n")
        partial.replace(path)
    except OSError:  # a read-only home: measured again next time
        partial.unlink(missing_ok=True)

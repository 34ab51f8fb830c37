"""Where the time of a decode goes: by submodule, against the device's peak FLOP/s, and as a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from halovae.device.kinds import Device
from halovae.device.regions import PREFIX

COLUMNS = ("region", "seconds", "share")
LONGEST = 20  # submodules in a table


@dataclass(frozen=True)
class Profile:
    """A profile of one rank's decode.

    Attributes:
        label: whose decode it is.
        seconds: seconds of the whole decode, which profiling slows down.
        regions: seconds of the `LONGEST` regions (submodules, gathers, conversion), and "other": Python, and all that
            is not listed.
        flops: multiplications and additions that were made, by torch's own count of operators.
        peaks: FLOP/s of a large matrix multiplication and of a large convolution, measured right after.
    """

    label: str
    seconds: float
    regions: dict[str, float]
    flops: int
    peaks: dict[str, float]

    def cells(self) -> list[list[str]]:
        """Rows of `COLUMNS`, the longest region first."""
        ordered = sorted(self.regions.items(), key=lambda region: -region[1])
        return [[name, f"{seconds:.3f}", f"{seconds / self.seconds:.1%}"] for name, seconds in ordered]

    def conclusions(self) -> list[str]:
        """Sentences about the rate against the peaks."""
        rate = self.flops / self.seconds
        against = ", ".join(f"{rate / peak:.0%} of a {name}'s {peak / 1e9:,.1f}" for name, peak in self.peaks.items())
        return [
            f"{self.label}: {len(self.regions)} regions in {self.seconds:.2f} s, {self.flops / 1e9:,.1f} GFLOP",
            f"the decode: {rate / 1e9:,.1f} GFLOP/s, {against}",
        ]


def profiled(device: Device, decode: Callable[[], Any], flops: int, label: str, trace: Path) -> Profile:
    """Profile `decode`, which makes `flops` multiplications and additions, and write a Chrome trace of it."""
    activities = [ProfilerActivity.CPU]
    if device.kind in ("cuda", "xpu"):
        activities.append(ProfilerActivity[device.kind.upper()])
    with profile(activities=activities) as watched:
        begin = time.perf_counter()
        decode()
        device.synchronize()
        seconds = time.perf_counter() - begin
    watched.export_chrome_trace(str(trace))
    field = "cpu_time_total" if device.kind in ("cpu", "npu") else "device_time_total"
    events = {event.key: getattr(event, field) / 1e6 for event in watched.key_averages()}
    found = {key.removeprefix(PREFIX): seconds for key, seconds in events.items() if key.startswith(PREFIX)}
    longest = sorted(found, key=lambda region: -found[region])[:LONGEST]
    regions = {region: found[region] for region in longest}
    regions["other"] = max(0.0, seconds - math.fsum(regions.values()))
    return Profile(label, seconds, regions, flops, {})


def peaks(device: Device, dtype: torch.dtype) -> dict[str, float]:
    """Return FLOP/s of a matrix multiplication and a convolution that are large enough to reach the device's peak."""
    size, channels = (2048, 256) if device.kind == "cpu" else (8192, 512)
    with torch.inference_mode():
        matrix = torch.randn(size, size, device=device.torch_device).to(dtype)
        maps = torch.randn(1, channels, 128, 128, device=device.torch_device).to(dtype, memory_format=device.layout(4))
        weight = torch.randn(channels, channels, 3, 3, device=device.torch_device)
        weight = weight.to(dtype, memory_format=device.layout(4))
        return {
            "matrix multiplication": 2 * size**3 / _fastest(device, lambda: matrix @ matrix),
            "convolution": 18 * channels**2 * 128**2 / _fastest(device, lambda: F.conv2d(maps, weight, padding=1)),
        }


def _fastest(device: Device, work: Callable[[], Tensor], repeat: int = 5) -> float:
    taken = []
    for _ in range(repeat + 1):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def markdown(profiles: Sequence[Profile]) -> str:
    """All profiles in Markdown."""
    from halovae.bench.report import markdown_table

    lines = ["# Where the time of rank 0 goes, in the first two latent frames", ""]
    for one in profiles:
        lines += [f"## {one.label}", "", *markdown_table(COLUMNS, one.cells()), ""]
        lines += [*(f"- {conclusion}" for conclusion in one.conclusions()), ""]
    return "\n".join(lines)

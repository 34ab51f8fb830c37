"""What the stages of `accelerator.py` measure. Each case is a function that returns plain values, kept as JSON."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerator_kernels
import accelerator_ranks
import torch
from torch import Tensor, nn

import halovae
from halovae import VAE, Grid
from halovae.bench import on_grids
from halovae.device.captures import CALLS, captures
from halovae.device.kinds import Device
from halovae.device.memory import MemoryMeter
from halovae.distributed.mesh import Mesh
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.distributed.simulated import on_threads
from halovae.models import zoo
from halovae.models.architectures import latent_shape, random_vae
from halovae.models.load import NoEncoder
from halovae.models.zoo import Direction, Entry

Record = dict[str, Any]
Case = Callable[[], Record]
ROUNDS, ENOUGH = 7, 6.0  # measured decodes, and seconds after which there are no more
SLACK = {torch.float32: (4.0, 1e-5), torch.bfloat16: (3.0, 1e-2)}
"""An error is fine within so many times the plain module's, or within so much of the largest value."""


@dataclass(frozen=True)
class Anchor:
    """A decode that others published a time of.

    Attributes:
        family: a name of `halovae.models.registry.families`.
        size: width and height in pixels.
        frames: of the clip; 1 for a picture.
        published: others' times.
        width: channels of the last level, for toys.
    """

    family: str
    size: tuple[int, int]
    frames: int = 1
    published: str = ""
    width: int | None = None

    @property
    def name(self) -> str:
        clip = f" x {self.frames}" if self.frames > 1 else ""
        return f"{self.family} {self.size[0]}x{self.size[1]}{clip}"


ANCHORS = (
    Anchor("wan2.1", (832, 480), 81, "SGLang, H200: 1.56 s; fastvae, RTX PRO 6000: 1.17 s"),
    Anchor("qwen-image", (1328, 1328)),
    Anchor("flux.2", (1024, 1024), 1, "SGLang, H200: 97.6 ms eager, 29.2 ms"),
    Anchor("wan2.1", (1280, 704), 61, "SGLang, H200: 2.80 s eager, 2.32 s exact, 1.67 s"),
    Anchor("wan2.1", (1280, 720), 81, "fastvae, RTX PRO 6000: 2.78 s at 15.2 GiB"),
    Anchor("wan2.2-5b", (1280, 704), 121, "B200: diffusers 4.02 s, 3.00 s native"),
)
TOYS = (Anchor("wan2.1", (48, 32), 5, "none", 8), Anchor("qwen-image", (48, 32), 1, "", 8))
SIZES = ((512, 512), (1024, 1024), (2048, 2048))  # of pictures whose peaks are predicted


def run(stage: str, device: Device, toys: bool, output: Path, deadline: float) -> None:
    """Run the cases of a stage until the deadline, and write all of their names and what was found to a file."""
    os.environ["HALOVAE_GRAPHS"] = "0"  # nothing from earlier runs
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = stage != "exactness"
    if device.kind == "cpu":
        torch.set_num_threads(1)  # toys
    device.enter()
    cases: dict[str, Case] = STAGES[stage](device, toys)
    records: list[Record] = []
    for name, case in cases.items():
        output.write_text(json.dumps({"cases": list(cases), "records": records}))
        if time.monotonic() > deadline:
            return
        begin = time.monotonic()
        _emptied(device)
        try:
            with torch.no_grad():
                found = case()
        except Exception as error:  # other cases may still work
            found = {"error": "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:500]}
        records.append({"case": name, **found, "took": round(time.monotonic() - begin, 2)})
        print(f"  {name}: {_brief(found)}", flush=True)
    output.write_text(json.dumps({"cases": list(cases), "records": records}))


def _brief(found: Record) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float)) or str(
        found.get("error", "done")
    )


def _emptied(device: Device) -> None:
    gc.collect()
    if device.kind != "cpu":
        device.module.empty_cache()


def _exactness(device: Device, toys: bool) -> dict[str, Case]:
    """Decodes of one entry for each class first, then the rest: encodes, variants, simulated ranks."""
    entries = [one for one in zoo.ENTRIES if not one.random]
    if toys:
        entries = [one for one in entries if one.name in ("AutoencoderKLFlux2", "AutoencoderKLQwenImage21")]
    classes: dict[str, Entry] = {}
    for one in entries:
        if one.latents is not None:
            classes.setdefault(one.class_name, one)
    first = list(classes.values())
    rest = [one for one in entries if one not in first]
    wide, half = torch.float32, torch.bfloat16
    plan: list[tuple[list[Entry], Direction, torch.dtype, str]] = [
        (first, "decode", wide, "1x1"), (first, "decode", half, "1x1"), (first, "encode", wide, "1x1"),
        (first, "decode", wide, "2x1"), (rest, "decode", wide, "1x1"), (first, "encode", half, "1x1"),
        (rest, "encode", wide, "1x1"), (first, "decode", wide, "2x2"),
    ]  # fmt: skip
    return {
        f"{entry.name}, {direction}, {accelerator_ranks.name_of(dtype)}, {grid}": partial(
            _compared, device, entry, direction, dtype, Grid.parse(grid)
        )
        for chosen, direction, dtype, grid in plan
        for entry in chosen
        if entry.shape(direction) is not None and not (entry.quantized and direction == "encode")
    }


def _compared(device: Device, entry: Entry, direction: Direction, dtype: torch.dtype, grid: Grid) -> Record:
    """The errors of halovae and of the plain module on the device, both against fp64 on the CPU.

    In fp32 one rank decodes other values until its work is captured as a graph, and then the same ones again.
    """
    call, there = zoo.CALLS[direction], device.torch_device
    truth = on_grids.plain(entry, direction, torch.float64)
    x = on_grids.example(entry, direction, dtype).to(there)
    plain = call(zoo.build(entry, dtype).to(there), x)

    def rank(mesh: Mesh) -> Tensor:
        own = zoo.build(entry, dtype).to(there)  # some classes keep caches on themselves
        sharded = halovae.shard(lambda z: call(own, z), own, multiple=entry.multiple(direction))
        with torch.no_grad():
            found = sharded(x, mesh=mesh)
            if (grid.size, dtype, direction) == (1, torch.float32, "decode"):
                for scale in (0.5,) * CALLS + (1.0,):
                    again.append(sharded(x * scale, mesh=mesh))
        assert found is not None
        return found

    again: list[Any] = []
    if os.environ.get("HALOVAE_CAPTURE") != "1":
        os.environ["HALOVAE_CAPTURE"] = "1"
        captures.cache_clear()
    pool = captures(there)
    replays = pool.replays
    results = on_threads(grid, there, rank) if grid.size > 1 else [rank(Mesh(grid, there))]
    error = on_grids.error([one.double().cpu() for one in (*results, *again[-1:])], truth)
    own = on_grids.error([plain.double().cpu()], truth)
    times, least = SLACK[dtype]
    exact = error <= max(times * own, least)
    return {"error": error, "plain": own, "exact": exact, "replays": pool.replays - replays}


def _anchors(device: Device, toys: bool) -> dict[str, Case]:
    """Halovae and eager diffusers for all, then diffusers compiled, which takes minutes to compile for clips."""
    anchors = TOYS if toys else ANCHORS
    images_first = sorted(anchors, key=lambda one: one.frames)
    order = [(one, how) for one in anchors for how in ("halovae", "diffusers")]
    order += [(one, "halovae, operator by operator") for one in anchors]
    order += [(one, "diffusers, channels last") for one in anchors]
    order += [(one, "diffusers, compiled, channels last") for one in images_first]
    return {f"{one.name}: {how}": partial(_timed_anchor, device, one, how) for one, how in order}


def module_of(anchor: Anchor, device: Device, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """An autoencoder with random weights without its encoder, on the device, and latents for it."""
    module = random_vae(anchor.family, anchor.width)
    shape = latent_shape(module, anchor.family, anchor.size, anchor.frames)
    for name in ("encoder", "quant_conv"):
        if getattr(module, name, None) is not None:
            setattr(module, name, NoEncoder())
    nn.Module.to(module, device.torch_device, dtype)
    return module, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device.torch_device, dtype)


def _timed_anchor(device: Device, anchor: Anchor, how: str) -> Record:
    module, z = module_of(anchor, device, torch.bfloat16)
    if "channels last" in how:
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous(memory_format=device.layout(parameter.ndim))
        z = z.contiguous(memory_format=device.layout(z.ndim))
    if "compiled" in how:
        module.decoder.compile(backend="inductor" if anchor.width is None else "eager")  # toys are not worth compiling
    decoder = VAE(module) if how.startswith("halovae") else None
    os.environ["HALOVAE_CAPTURE"] = str(int(how == "halovae"))
    captures.cache_clear()  # and with it the graphs of earlier cases

    def decode() -> Any:
        return zoo.decode(module, z) if decoder is None else decoder.decode(z)

    begin = time.perf_counter()
    if decoder is None:
        decode()
    else:
        decoder.warmup(z.shape)
    device.synchronize()
    first = time.perf_counter() - begin
    _emptied(device)
    meter = MemoryMeter(device)
    with meter.counting():
        decode()
    device.synchronize()
    memory = meter.read()
    times = _times(device, decode)
    weights = sum(one.nbytes for one in module.parameters())
    return {
        "anchor": anchor.name, "how": how, "published": anchor.published, "seconds": statistics.median(times),
        "fastest": min(times), "rounds": len(times), "first": first, "peak_reserved": memory.peak_reserved,
        "peak_allocated": memory.peak_allocated, "weights": weights,
        "replays": captures(decoder.device).replays if decoder is not None else 0,
    }  # fmt: skip


def _times(device: Device, function: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Seconds of several calls, each waited for."""
    times: list[float] = []
    while len(times) < rounds and (len(times) < 2 or sum(times) < ENOUGH):
        device.synchronize()
        begin = time.perf_counter()
        result = function()
        device.synchronize()
        times.append(time.perf_counter() - begin)
        del result
    return times


def _profile(device: Device, toys: bool) -> dict[str, Case]:
    main = TOYS if toys else ANCHORS[:2]
    return {f"{one.name}: halovae": partial(_profiled, device, one) for one in main}


def _profiled(device: Device, anchor: Anchor) -> Record:
    module, z = module_of(anchor, device, torch.bfloat16)
    decoder = VAE(module)
    decoder.decode(z)
    device.synchronize()
    activities = torch.profiler.supported_activities()
    if device.kind != "cpu":
        activities = activities - {torch.profiler.ProfilerActivity.CPU}
    with torch.profiler.profile(activities=activities) as profile:
        decoder.decode(z)
        device.synchronize()
    field = "self_cpu_time_total" if device.kind == "cpu" else "self_device_time_total"
    rows = sorted(((getattr(row, field), row.count, row.key) for row in profile.key_averages()), reverse=True)
    total = sum(micro for micro, *_ in rows)
    return {
        "seconds": total / 1e6,
        "operators": [
            {"name": name, "calls": calls, "ms": micro / 1e3, "share": micro / max(1, total)}
            for micro, calls, name in rows[:25]
        ],
    }


def _rates(device: Device, toys: bool) -> dict[str, Case]:
    there, cases = device.torch_device, dict[str, Case]()
    count, edge = (2**18, 64) if toys else (2**28, 8192)

    def copies() -> Record:
        x, y = torch.ones(2, count, device=there)
        seconds = statistics.median(_times(device, lambda: y.copy_(x)))
        return {"GB/s": 2 * x.nbytes / seconds / 1e9}

    def products(dtype: torch.dtype) -> Record:
        x = torch.ones(edge, edge, dtype=dtype, device=there)
        return {"TFLOP/s": 2 * edge**3 / statistics.median(_times(device, lambda: x @ x)) / 1e12}

    def launches() -> Record:
        x = torch.ones(1, device=there)
        seconds = statistics.median(_times(device, lambda: [x.add_(1) for _ in range(1000)]))
        return {"us an operator": seconds * 1e3}

    cases["copies"] = copies
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cases[f"matrix products, {accelerator_ranks.name_of(dtype)}"] = partial(products, dtype)
    shapes = {
        "Wan2.1, 96 channels": (96, 4, 480, 832), "Wan2.1, 192 channels": (192, 4, 240, 416),
        "Wan2.1, 384 channels": (384, 4, 120, 208), "pictures, 128 channels": (128, 1024, 1024),
        "pictures, 512 channels": (512, 256, 256),
    }  # fmt: skip
    for name, (channels, *plane) in shapes.items():
        if toys:
            channels, plane = 8, [min(one, 8) for one in plane]
        cases[f"convolutions, bf16, {name}"] = partial(_convolved, device, channels, plane)
    cases["launches"] = launches
    return cases


def _convolved(device: Device, channels: int, plane: list[int]) -> Record:
    dims = len(plane)
    form = device.layout(dims + 2)
    make = partial(torch.randn, device=device.torch_device, dtype=torch.bfloat16)
    x = make(1, channels, *plane).contiguous(memory_format=form)
    weight = make(channels, channels, *[3] * dims).contiguous(memory_format=form)
    convolve = torch.conv3d if dims == 3 else torch.conv2d
    seconds = statistics.median(_times(device, lambda: convolve(x, weight, padding=1)))
    return {"TFLOP/s": 2 * x.numel() * channels * 3**dims / seconds / 1e12}


def _memory(device: Device, toys: bool) -> dict[str, Case]:
    clips = [
        Anchor("wan2.1", (832, 480), 17), Anchor("hunyuan-video", (640, 480), 9), Anchor("ltx-video", (768, 512), 25),
    ]  # fmt: skip
    pictures = [Anchor(family, size) for size in SIZES for family in ("flux.2", "qwen-image", "sana")]
    chosen = list(TOYS) if toys else [*pictures[:6], *clips, *pictures[6:]]
    return {one.name: partial(_predicted, device, one) for one in chosen}


def _predicted(device: Device, anchor: Anchor) -> Record:
    """The allocated peak of a decode above rest, and the one that its recorded graph predicts."""
    module, z = module_of(anchor, device, torch.bfloat16)
    sharded = halovae.shard(lambda x: zoo.decode(module, x), module)
    sharded(z)
    _emptied(device)
    device.synchronize()
    resting = 0 if device.kind == "cpu" else device.module.memory_allocated(device.torch_device)
    meter = MemoryMeter(device)
    with meter.counting():
        result = sharded(z)
    memory, report = meter.read(), sharded.report
    assert result is not None
    assert report is not None
    predicted = report.peak + (result.nbytes if report.chunked is not None else 0)  # chunks are joined
    measured = memory.peak_allocated - resting
    return {
        "predicted": predicted, "measured": measured, "off": predicted / measured - 1,
        "reserved": memory.above_resting,
    }  # fmt: skip


def _grids(device: Device, toys: bool) -> dict[str, Case]:
    """One rank of each grid, the one with the most to do, without messages."""
    chosen = TOYS if toys else (Anchor("flux.2", (1024, 1024)), Anchor("wan2.1", (832, 480), 17))

    def rank(anchor: Anchor, grid: Grid) -> Record:
        module, z = module_of(anchor, device, torch.bfloat16)
        replay, program = accelerator_ranks.rank_of(module, z, grid)
        replay()
        record: Record = {"seconds": statistics.median(_times(device, replay)), "peak": program.peak}
        captured = accelerator_ranks.captured(device, replay)
        if captured is not None:
            record["as a CUDA graph"] = statistics.median(_times(device, captured))
        return record

    return {
        f"{one.name}, a rank of {grid}": partial(rank, one, Grid.parse(grid))
        for one in chosen
        for grid in ("1x1", "2x1", "2x2")
    }


STAGES: dict[str, Callable[[Device, bool], dict[str, Case]]] = {
    "exactness": _exactness, "anchors": _anchors, "profile": _profile, "rates": _rates, "memory": _memory,
    "grids": _grids, "kernels": lambda device, toys: accelerator_kernels.cases(device, toys, _times),
}  # fmt: skip

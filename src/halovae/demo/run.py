"""One held-out clip, decoded by diffusers, by one rank, by several ranks, and by diffusers' tiling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halovae.demo.clips import HELD_OUT, make_clip, photographs
from halovae.device.kinds import Device, threads_per_rank
from halovae.device.memory import MemoryMeter
from halovae.distributed.ranks import Ranks
from halovae.io import latents as latents_file
from halovae.io import media
from halovae.kernels.native import ready
from halovae.models.architectures import DEMO
from halovae.models.load import read_config
from halovae.runtime.vae import load

FRAMES, HEIGHT, WIDTH, FPS, SEED = 33, 192, 256, 12.0, 10_000_008
# diffusers' tiles of 96 pixels that overlap by 24: several tiles each way at this size, as 256 would be at 720p.
TILE, STRIDE = 96, 72
AMPLIFIED = 10


@dataclass(frozen=True)
class Shown:
    """The result of one way to decode.

    Attributes:
        name: the way.
        frames: `[3, T, H, W]` in [-1, 1].
        seconds: of one decode, after a decode of the first two latent frames to warm up.
        peaks: peak bytes above the resting process, by rank.
    """

    name: str
    frames: Tensor
    seconds: float
    peaks: list[int]


def run(output: Path, ranks: int, describe: Callable[[str], Any]) -> tuple[Tensor, list[Shown]]:
    """Make the clip, encode it, decode it in four ways, and write the results.

    Args:
        output: folder for `latents.safetensors`, `demo.mp4` and `frames.png`; files of an earlier run are replaced.
        ranks: how many ranks decode together.
        describe: called with a description of each step.

    Returns:
        The clip `[3, T, H, W]` in [-1, 1], and the four ways, diffusers first.
    """
    describe("making a clip over a photograph that the model never saw")
    clip = make_clip(photographs(HELD_OUT), FRAMES, HEIGHT, WIDTH, SEED, shapes=1)
    latents = output / "latents.safetensors"
    ways: list[tuple[str, int, Callable[..., Any]]] = [
        ("diffusers", 1, _with_diffusers),
        ("halovae, 1 rank", 1, _with_halovae),
        (f"halovae, {ranks} ranks", ranks, _with_halovae),
        ("diffusers, tiled", 1, _with_tiles),
    ]
    shown: list[Shown] = []
    for name, count, way in ways:
        # All ways use the same number of threads: ranks share those that one process would use.
        with Ranks(count, threads_per_rank(ranks) * ranks // count) as processes:
            if not shown:
                describe("encoding it with diffusers' encoder")
                processes.run(_encode, clip, latents)
            describe(f"decoding: {name}")
            results = processes.run(way, latents)
        shown.append(Shown(name, results[0][0], max(seconds for _, seconds, _ in results), [r[2] for r in results]))
    describe("writing the clip and the picture")
    sink = media.Sink(output / "demo.mp4", FPS)
    pair = torch.cat([clip, shown[2].frames], dim=-1)
    sink.write(((pair.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    sink.close(whole=True)
    _draw(output / "frames.png", clip, shown)
    return clip, shown


def _encode(clip: Tensor, path: Path) -> None:
    with torch.inference_mode():
        latents = _vae().encode(clip[None]).latent_dist.mode()
    latents_file.save(path, latents, read_config(DEMO).family, scaled=False, fps=FPS)


def _vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(DEMO, torch_dtype=torch.float32)


def _with_halovae(path: Path) -> tuple[Tensor | None, float, int]:
    decoder = load(DEMO, device="cpu")
    ready(decoder.device, wait=True)
    return _measured(partial(decoder.decode, mode="parallel"), path)


def _with_diffusers(path: Path) -> tuple[Tensor | None, float, int]:
    vae = _vae()
    return _measured(lambda latents: vae.decode(latents).sample, path)


def _with_tiles(path: Path) -> tuple[Tensor | None, float, int]:
    vae = _vae()
    vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    return _measured(lambda latents: vae.decode(latents).sample, path)


def _measured(decode: Callable[[Tensor], Tensor | None], path: Path) -> tuple[Tensor | None, float, int]:
    latents = latents_file.read(path)
    with torch.inference_mode():
        decode(latents[:, :, :2])
        memory, begin = MemoryMeter(Device(latents.device)), time.perf_counter()
        frames = decode(latents)
    return None if frames is None else frames[0], time.perf_counter() - begin, memory.read().above_resting


def _draw(path: Path, clip: Tensor, shown: list[Shown]) -> None:
    """Draw frames of each way, and beside them their amplified differences from diffusers' untiled decode."""
    from matplotlib.figure import Figure

    times = [0, FRAMES // 3, 2 * FRAMES // 3, FRAMES - 1]
    reference = shown[0].frames
    columns: list[tuple[str, Tensor]] = [("clip", (clip + 1) / 2)]
    columns += [(way.name, (way.frames + 1) / 2) for way in shown]
    for way in shown[1:]:
        difference = (way.frames - reference).abs() / 2 * AMPLIFIED
        columns.append((f"{way.name}:\ndifference x {AMPLIFIED}", difference))
    figure = Figure(figsize=(2.6 * len(columns), 2.1 * len(times)), layout="constrained")
    axes = figure.subplots(len(times), len(columns))
    for row, time_index in zip(axes, times, strict=True):
        for place, (title, frames) in zip(row, columns, strict=True):
            place.imshow(frames[:, time_index].clamp(0, 1).permute(1, 2, 0).numpy())
            place.set(xticks=[], yticks=[])
            if time_index == 0:
                place.set_title(title, fontsize=9)
        row[0].set_ylabel(f"frame {time_index}")
    figure.savefig(path, dpi=110)

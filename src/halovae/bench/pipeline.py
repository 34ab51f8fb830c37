"""A checkpoint's whole pipeline, from prompt to frames: with diffusers' decode, and with halovae's."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import halovae
from halovae.device.kinds import Device
from halovae.distributed.transport import join_world, world_size


@dataclass(frozen=True)
class PipelineRun:
    """What to run; see `halovae.bench.validate.Validation`."""

    source: str
    prompt: str
    steps: int
    size: tuple[int, int]
    frames: int
    dtype: torch.dtype
    device: str


def run_both(run: PipelineRun) -> tuple[Tensor, Tensor, float, float]:
    """Run the pipeline twice with one seed. Collective: every rank must call it.

    Returns:
        The frames `[T, 3, H, W]` in [0, 1] as diffusers decodes them, and as halovae does; the seconds of each run.

    Raises:
        ValueError: the pipeline needs more than a prompt and a picture.
    """
    from diffusers import DiffusionPipeline

    device = Device.default(run.device)
    join_world(device.torch_device)
    pipe = DiffusionPipeline.from_pretrained(run.source, torch_dtype=run.dtype, use_safetensors=True)
    pipe.to(device.torch_device)
    pipe.set_progress_bar_config(disable=True)
    arguments = _arguments(pipe, run)

    def generate() -> tuple[Tensor, float]:
        begin = time.perf_counter()
        made = pipe(**arguments, generator=torch.Generator().manual_seed(0))
        frames = made.frames[0] if hasattr(made, "frames") else made.images
        device.synchronize()
        return torch.as_tensor(frames).float().cpu(), time.perf_counter() - begin

    theirs, their_seconds = generate()
    halovae.parallelize(pipe, gather="all" if world_size() > 1 else "rank0")
    ours, our_seconds = generate()
    return theirs, ours, their_seconds, our_seconds


def _arguments(pipe: Any, run: PipelineRun) -> dict[str, Any]:
    """Return the arguments for a call of the pipeline, only those that it takes."""
    from PIL import Image

    width, height = run.size
    possible = {
        "prompt": run.prompt,
        "image": Image.radial_gradient("L").convert("RGB").resize((width, height)),
        "width": width,
        "height": height,
        "num_frames": run.frames,
        "num_inference_steps": run.steps,
        "output_type": "pt",
    }
    taken = inspect.signature(pipe.__call__).parameters
    if "prompt" not in taken:
        raise ValueError(f"{type(pipe).__name__} takes no prompt")
    return {name: value for name, value in possible.items() if name in taken}

"""Pipelines of diffusers that run unmodified, with properties that the signature of a call does not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Properties of a pipeline class.

    Attributes:
        name: its name in `halovae make-model`.
        size: usual width and height in pixels.
        multiple: sizes are multiples of this many pixels.
        frames: usual number of frames; 1 for a pipeline that makes pictures.
        frame_step: numbers of frames are one more than multiples of this.
        fps: frames per second that it was trained for.
        guidance: the name of the argument for guidance; empty if there is none.
        negative: whether it takes a negative prompt.
        always: arguments of every call.
        shared: whether ranks can share its transformer through diffusers' context parallelism.
    """

    name: str
    size: tuple[int, int]
    multiple: int
    frames: int = 1
    frame_step: int = 1
    fps: float = 1.0
    guidance: str = "guidance_scale"
    negative: bool = True
    always: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


# Where `negative` is False, guidance is distilled, and a negative prompt would have no effect.
FAMILIES: dict[str, Family] = {
    "FluxPipeline": Family("flux", (1024, 1024), 16, negative=False, shared=True),
    "Flux2Pipeline": Family("flux.2", (1024, 1024), 16, negative=False, shared=True),
    "Flux2KleinPipeline": Family("flux.2-klein", (1024, 1024), 16, negative=False, shared=True),
    "StableDiffusionPipeline": Family("sd1.5", (512, 512), 8),
    "StableDiffusionXLPipeline": Family("sdxl", (1024, 1024), 8),
    "StableDiffusion3Pipeline": Family("sd3.5", (1024, 1024), 16),
    "SanaPipeline": Family("sana", (1024, 1024), 32, always={"use_resolution_binning": False}),
    "HunyuanImagePipeline": Family("hunyuan-image", (2048, 2048), 32, guidance=""),
    "QwenImage21Pipeline": Family("qwen-image-2.1", (1024, 1024), 32, guidance="true_cfg_scale"),
    "HunyuanVideoPipeline": Family("hunyuan-video", (1280, 720), 16, 129, 4, 24.0, negative=False),
    "HunyuanVideo15Pipeline": Family("hunyuan-video-1.5", (832, 480), 16, 121, 4, 24.0, guidance=""),
    "LTXPipeline": Family("ltx-video", (704, 512), 32, 161, 8, 25.0),
    "LTX2Pipeline": Family("ltx-2", (768, 512), 32, 121, 8, 24.0),
    "CogVideoXPipeline": Family("cogvideox", (720, 480), 16, 49, 8, 8.0),
    "MochiPipeline": Family("mochi", (848, 480), 16, 85, 6, 30.0),
    "CosmosTextToWorldPipeline": Family("cosmos", (1280, 704), 16, 121, 8, 30.0),
    "AllegroPipeline": Family("allegro", (1280, 720), 8, 88, 4, 15.0),
    "EasyAnimatePipeline": Family("easyanimate", (672, 384), 16, 49, 4, 8.0, always={"negative_prompt": ""}),
    "Kandinsky5T2VPipeline": Family("kandinsky-5", (768, 512), 16, 121, 4, 24.0),
    "Kandinsky6TI2VAPipeline": Family("kandinsky-6", (768, 512), 16, 121, 4, 24.0, always={"sample_audio": False}),
}
"""By class. Each rank runs the pipeline's own code, and all ranks share the VAE's `decode`."""

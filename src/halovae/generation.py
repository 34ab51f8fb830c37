"""From a prompt to frames: a diffusers pipeline whose transformer all ranks share, decoded by halovae."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from halovae.decode import Decoder
from halovae.integrations.diffusers import do_without_torchvision
from halovae.lines import join_world, world_size
from halovae.models.load import from_module
from halovae.platform import Platform

# What the pipelines were trained for, where a request does not say: width, height, frames.
USUAL = {"wan2.1": (832, 480, 81), "wan2.2-5b": (1280, 704, 121), "qwen-image": (1328, 1328, 1)}


@dataclass(frozen=True)
class Prompt:
    """What is to be generated; None leaves it to the pipeline.

    Attributes:
        text: the prompt.
        size: width and height in pixels.
        frames: of a video; 1 for a picture.
        steps: of denoising.
        seed: equal seeds give equal noise, on any number of ranks.
        negative: what to avoid; with it, or with a guidance above 1, each step runs the transformer twice.
        guidance: how strongly the prompt leads: Wan's `guidance_scale`, Qwen-Image's `true_cfg_scale`.
        guidance_2: likewise for the second transformer of Wan2.2-A14B.
        images: paths of pictures to start from (the first frame of a video), or to edit.
    """

    text: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    seed: int = 0
    negative: str | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    images: tuple[Path, ...] = ()


class Generator:
    """A pipeline in diffusers layout, on all ranks of the world, which make the same calls.

    Args:
        source: its folder, or a hub id.
        dtype: of the transformer and the text encoder.
        vae_dtype: of the VAE.
        ulysses: over how many ranks attention is shared by heads; likewise `ring`, in turns. Their product is the
            world's size, or 1: every rank then denoises all by itself.

    Raises:
        ValueError: a pipeline of another kind, or degrees that do not match the world.
    """

    def __init__(
        self, source: str | Path, dtype: torch.dtype, vae_dtype: torch.dtype, ulysses: int = 1, ring: int = 1
    ) -> None:
        from diffusers import DiffusionPipeline

        if ulysses * ring not in (1, world_size()):
            raise ValueError(
                f"ulysses degree {ulysses} x ring degree {ring}: expected a product of {world_size()} (the ranks), or 1"
            )
        platform = Platform.default()
        join_world(platform.device)
        do_without_torchvision()
        _quieten()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones know only this
            self.pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype).to(platform.device)
        self.pipeline.vae.to(vae_dtype)
        self.decoder = Decoder(from_module(self.pipeline.vae))
        self._takes = set(inspect.signature(self.pipeline.__call__).parameters)
        if ulysses * ring > 1:
            for name in ("transformer", "transformer_2"):
                if getattr(self.pipeline, name, None) is not None:
                    _share_sequence(getattr(self.pipeline, name), platform.device, ulysses, ring)

    @property
    def makes_video(self) -> bool:
        """Whether a result may have more than one frame."""
        return "num_frames" in self._takes

    def fitted(self, prompt: Prompt) -> Prompt:
        """The prompt with the size and number of frames that will be made: the pipelines round both down.

        Raises:
            ValueError: pictures are missing, or not taken, or a number is out of range.
        """
        name = type(self.pipeline).__name__
        wants = "image" in self._takes
        if wants != bool(prompt.images):
            raise ValueError(f"{name} needs a picture to start from" if wants else f"{name} takes no pictures")
        width, height, frames = USUAL[self.decoder.config.family]
        width, height = prompt.size or (width, height)
        frames = prompt.frames or frames
        if not self.makes_video and frames > 1:
            raise ValueError(f"{frames} frames: {name} makes pictures, expected 1")
        if prompt.steps is not None and prompt.steps < 1:
            raise ValueError(f"{prompt.steps} steps: expected 1 or more")
        patch = self.pipeline.transformer.config.patch_size
        step = self.decoder.config.spatial_factor * (patch[-1] if isinstance(patch, (tuple, list)) else patch)
        step = step if self.makes_video else self.decoder.config.spatial_factor * 2
        if min(width, height) < step:
            raise ValueError(f"size {width}x{height}: {name} makes multiples of {step}, from {step}x{step} on")
        between = self.decoder.config.temporal_factor
        return replace(
            prompt,
            size=(width // step * step, height // step * step),
            frames=1 if frames == 1 else frames // between * between + 1,
        )

    @torch.inference_mode()
    def denoise(self, prompt: Prompt, told: Callable[[int], None] = lambda step: None) -> Tensor:
        """Run the transformer, and give the latents `[B, C, T, H, W]`, normalized, on every rank.

        Args:
            prompt: as `fitted` gave it.
            told: is called after each step with its number, from 1 on; what it raises ends the denoising.
        """
        assert prompt.size is not None
        width, height = prompt.size

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            told(step + 1)
            return {}

        wanted = {
            "prompt": prompt.text,
            "negative_prompt": prompt.negative,
            "width": width,
            "height": height,
            "num_frames": prompt.frames if self.makes_video else None,
            "num_inference_steps": prompt.steps,
            "true_cfg_scale" if "true_cfg_scale" in self._takes else "guidance_scale": prompt.guidance,
            "guidance_scale_2": prompt.guidance_2,
            "image": _pictures(prompt.images),
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        if unknown := given.keys() - self._takes:
            raise ValueError(f"{type(self.pipeline).__name__} takes no {', '.join(sorted(unknown))}")
        self.pipeline.set_progress_bar_config(disable=True)
        (latents,) = self.pipeline(
            **given,
            generator=torch.Generator().manual_seed(prompt.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=step_done,
        )
        if latents.ndim == 3:  # Qwen-Image's, two by two cells in one token
            latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        return latents.to(self.decoder.dtype)


def _quieten() -> None:
    """Let diffusers and transformers report errors only, and rank 0 alone show how loading goes."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        if dist.is_initialized() and dist.get_rank() > 0:
            logging.disable_progress_bar()


def _pictures(paths: tuple[Path, ...]) -> Any:
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return None if not pictures else pictures[0] if len(pictures) == 1 else pictures


def _share_sequence(transformer: Any, device: torch.device, ulysses: int, ring: int) -> None:
    """Let all ranks share the sequence that a diffusers transformer works on.

    By the parts of diffusers' `enable_parallelism`, which asks for an accelerator.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    # Any length of text and picture, not only multiples of the degree.
    config = ContextParallelConfig(
        ulysses_degree=ulysses, ring_degree=ring, ulysses_anything=ring == 1, ring_anything=ulysses == 1
    )
    mesh = init_device_mesh(device.type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    shared = ParallelConfig(context_parallel_config=config)
    shared.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    transformer._parallel_config = shared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers calls the feature experimental
        for module in transformer.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = shared
        apply_context_parallel(transformer, config, transformer._cp_plan)

"""From a prompt to frames: a diffusers pipeline whose transformer all ranks share, decoded by halovae."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from halovae.device.kinds import Device
from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import join_world, world_size
from halovae.grid import Grid
from halovae.pipelines.diffusers import do_without_torchvision, gather_uneven_parts
from halovae.pipelines.specs import Pipeline, Prompt
from halovae.pipelines.within import SharedDecode, share_encode
from halovae.report import DecodeReport
from halovae.runtime.sharing import Mode, Sharing
from halovae.runtime.vae import VAE

_CHECKER = "halovae.pipelines.tiny.safety"
StepEnd = Callable[[Any, int, Any, dict[str, Any]], Any]  # diffusers' callback_on_step_end


@dataclass(frozen=True)
class Made:
    """What a whole call of a pipeline made.

    Attributes:
        frames: `[B, 3, T, H, W]`, on rank 0; None on the others.
        report: what the VAE's decode took.
    """

    frames: Tensor | None
    report: DecodeReport


class Generator:
    """A pipeline in diffusers layout, on all ranks of the world, which make the same calls.

    Wan's and Qwen-Image's latents are decoded apart: `denoise` gives them, `decoder` decodes them. Other pipelines
    (`kind.whole`) decode within their own call: `make` gives their frames, and there is no decoder.

    Args:
        folder: where it is.
        dtype: of the transformer and the text encoder.
        vae_dtype: of the VAE.
        ulysses, ring: over how many ranks attention is shared by heads, and in turns. Their product is the
            world's size, or 1: every rank then denoises all by itself, as it does where diffusers cannot share the
            transformer.
        offload: keep all but the VAE in the host's memory, each part but for the time it is used.
        encode: how ranks share the pictures that a pipeline starts from, as a mode of `VAE.encode`.

    Raises:
        ValueError: a pipeline of another kind, degrees that do not match the world, or nowhere to offload from.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype, ulysses: int = 1, ring: int = 1,
        offload: bool = False, encode: Mode = "auto",
    ) -> None:  # fmt: skip
        from diffusers import DiffusionPipeline

        if ulysses * ring not in (1, world_size()):
            raise ValueError(
                f"ulysses degree {ulysses} x ring degree {ring}: expected a product of {world_size()} (the ranks), or 1"
            )
        device = Device.default()
        if offload and device.kind == "cpu":
            raise ValueError("offload: all is in the host's memory already, there is no accelerator")
        self.kind = Pipeline.read(folder)
        join_world(device.torch_device)
        do_without_torchvision()
        if _CHECKER in (folder / "model_index.json").read_text():  # diffusers imports no module that a folder names
            importlib.import_module(_CHECKER)
        _quieten()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones know only this
            self.pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.to(vae_dtype)
        if offload:
            self.pipeline._exclude_from_cpu_offload = ["vae"]  # halovae reads its weights past diffusers' hooks
            self.pipeline.enable_model_cpu_offload(device=device.torch_device)
        else:
            self.pipeline.to(device.torch_device)
        self.device = device.torch_device
        if self.kind.whole:
            self._within = SharedDecode(self.pipeline.vae)
        else:
            self.decoder = VAE(self.pipeline.vae)
        if self.kind.pictures.stop > 1:
            # Of its own: the decode of what was generated before may be under way in another thread.
            mesh = Mesh(Grid(rows=world_size()), device.torch_device)
            sharing = Sharing(encode, gather="all")
            share_encode(self.pipeline.vae, sharing, mesh)
        self._takes = set(inspect.signature(self.pipeline.__call__).parameters)
        if ulysses * ring > 1 and self.kind.family.shared:
            for name in ("transformer", "transformer_2"):
                if getattr(self.pipeline, name, None) is not None:
                    _share_sequence(getattr(self.pipeline, name), device.torch_device, ulysses, ring)

    @torch.inference_mode()
    def denoise(
        self, prompt: Prompt, told: Callable[[int], None] = lambda step: None, watch: StepEnd | None = None
    ) -> Tensor:
        """Run the transformer, and give the latents `[B, C, T, H, W]`, normalized, on every rank.

        Args:
            prompt: as `Pipeline.fitted` gave it.
            told: is called after each step with its number, from 1 on; what it raises ends the denoising.
            watch: a pipeline's `callback_on_step_end`, called after each step; what it returns has no effect. Not
                called by pipelines that take none.
        """
        (latents,) = self._call(prompt, told, watch, "latent")
        if latents.ndim == 3:  # Qwen-Image's, two by two cells in one token
            assert prompt.size is not None
            width, height = prompt.size
            latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        return latents.to(self.decoder.dtype)

    @torch.inference_mode()
    def make(
        self, prompt: Prompt, told: Callable[[int], None] = lambda step: None, watch: StepEnd | None = None,
        dtype: torch.dtype = torch.uint8, **options: Any,
    ) -> Made:  # fmt: skip
        """Run a whole pipeline, its decode on all ranks.

        Args:
            prompt: as `Pipeline.fitted` gave it.
            told: as for `denoise`.
            watch: as for `denoise`.
            dtype: uint8 for frames in 0..255, or a floating one for [0, 1].
            options: `mode`, `grid` and `memory_budget` of the decode, as `VAE.stream` has them.
        """
        self._within.options = options
        frames = self._call(prompt, told, watch, "pt")[0]  # after it may come sound, or what a safety checker found
        report = self._within.report
        assert report is not None
        frames = frames.movedim(1, 2) if frames.ndim == 5 else frames.unsqueeze(2)
        report = replace(report, frames=(len(frames), 3, *frames.shape[2:]))
        if dist.is_initialized() and dist.get_rank() > 0:
            return Made(None, report)
        frames = _on_white(frames.float())
        return Made((frames.mul(255).round_() if dtype == torch.uint8 else frames).to(dtype).contiguous(), report)

    def _call(self, prompt: Prompt, told: Callable[[int], None], watch: StepEnd | None, output_type: str) -> Any:
        assert prompt.size is not None
        width, height = prompt.size
        family = self.kind.family

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            told(min(step + 1, prompt.steps))  # some schedulers take one more
            if watch is not None:
                watch(pipeline, step, timestep, tensors)
            return {}

        needed = {
            "prompt": prompt.text,
            "negative_prompt": prompt.negative,
            "width": width,
            "height": height,
            "num_frames": prompt.frames if self.kind.makes_video else None,
            "num_inference_steps": prompt.steps,
            family.guidance: prompt.guidance,
            "guidance_scale_2": prompt.guidance_2,
            "image": _pictures(prompt.images),
        }
        given = {**family.always, **{name: value for name, value in needed.items() if value is not None}}
        if unknown := given.keys() - self._takes:
            raise ValueError(f"{type(self.pipeline).__name__} takes no {', '.join(sorted(unknown))}")
        given |= {
            "generator": torch.Generator().manual_seed(prompt.seed), "output_type": output_type, "return_dict": False,
        }  # fmt: skip
        if "callback_on_step_end" in self._takes:
            return self.pipeline(**given, callback_on_step_end=step_done)
        with _steps_told(self.pipeline.scheduler, told):
            return self.pipeline(**given)


@contextmanager
def _steps_told(scheduler: Any, told: Callable[[int], None]) -> Iterator[None]:
    """Tell of each step of a scheduler, for a pipeline that does not."""
    own, done = scheduler.step, 0

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = own(*args, **kwargs)
        done += 1
        told(done)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _on_white(frames: Tensor) -> Tensor:
    """Frames `[B, C, T, H, W]` in [0, 1] without their alpha channel, if they have one."""
    if frames.shape[1] < 4:
        return frames
    alpha = frames[:, 3:4]
    return frames[:, :3] * alpha + 1 - alpha


def _quieten() -> None:
    """Let diffusers and transformers report errors only, and rank 0 alone show how loading goes."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        if dist.is_initialized() and dist.get_rank() > 0:
            logging.disable_progress_bar()


def _pictures(files: tuple[bytes, ...]) -> Any:
    pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    return None if not pictures else pictures[0] if len(pictures) == 1 else pictures


def _share_sequence(transformer: Any, device: torch.device, ulysses: int, ring: int) -> None:
    """Let all ranks share the sequence that a diffusers transformer works on.

    By the parts of diffusers' `enable_parallelism`, which asks for an accelerator.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    if Device(device).backend == "gloo":
        gather_uneven_parts()
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

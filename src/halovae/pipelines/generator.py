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
from halovae.models.load import check_indices
from halovae.pipelines.diffusers import do_without_torchvision, gather_uneven_shards
from halovae.pipelines.specs import Pipeline, Prompt
from halovae.pipelines.within import SharedDecode, share_encode
from halovae.report import DecodeReport
from halovae.runtime.options import DecodeOptions, Mode, Sharing
from halovae.runtime.vae import VAE

_CHECKER = "halovae.pipelines.tiny.safety"
StepEnd = Callable[[Any, int, Any, dict[str, Any]], Any]  # diffusers' callback_on_step_end


@dataclass(frozen=True)
class Made:
    """The result of a whole call of a pipeline.

    Attributes:
        frames: `[B, 3, T, H, W]`, on rank 0; None on the others.
        report: what the VAE's decode took.
    """

    frames: Tensor | None
    report: DecodeReport


class Generator:
    """A pipeline in diffusers layout on all ranks of the world. Every rank makes the same calls.

    Latents of Wan and Qwen-Image are decoded separately: `denoise` returns them, `decoder` decodes them. Other
    pipelines (`kind.whole`) decode within their own call: `make` returns their frames, and there is no decoder.

    Args:
        folder: the pipeline's folder.
        dtype: of the transformer and the text encoder.
        vae_dtype: of the VAE.
        ulysses, ring: numbers of ranks that share attention by heads, and around a ring. Their product is the world
            size, or 1. With 1, and if diffusers cannot share the transformer, every rank runs all of it.
        offload: keep components other than the VAE in the host's memory while they are not used.
        encode: how ranks share the pictures that a pipeline starts from, as a mode of `VAE.encode`.

    Raises:
        ValueError: the pipeline is not supported, the degrees do not match the world, or there is no accelerator to
            offload from.
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
            raise ValueError("offload: there is no accelerator, so everything is in the host's memory already")
        self.kind = Pipeline.read(folder)
        join_world(device.torch_device)
        do_without_torchvision()
        if _CHECKER in (folder / "model_index.json").read_text():  # diffusers imports no module that a folder names
            importlib.import_module(_CHECKER)
        check_indices(folder)
        _quieten()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones only this
            self.pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.to(vae_dtype)
        if offload:
            self.pipeline._exclude_from_cpu_offload = ["vae"]  # halovae reads its weights without diffusers' hooks
            self.pipeline.enable_model_cpu_offload(device=device.torch_device)
        else:
            self.pipeline.to(device.torch_device)
        self.device = device.torch_device
        if self.kind.whole:
            self._within = SharedDecode(self.pipeline.vae)
        else:
            self.decoder = VAE(self.pipeline.vae)
        if self.kind.pictures.stop > 1:
            # It has its own mesh: another thread may still decode an earlier result.
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
        self, prompt: Prompt, on_step: Callable[[int], None] = lambda step: None, watch: StepEnd | None = None
    ) -> Tensor:
        """Run the transformer, and return normalized latents `[B, C, T, H, W]` on every rank.

        Args:
            prompt: as returned by `Pipeline.fitted`.
            on_step: called after each step with its number, from 1 on. An exception in it ends the denoising.
            watch: a `callback_on_step_end`, called after each step if the pipeline takes one. Its return value has no
                effect.
        """
        (latents,) = self._call(prompt, on_step, watch, "latent")
        if latents.ndim == 3:  # Qwen-Image packs two by two cells in a token
            assert prompt.size is not None
            width, height = prompt.size
            latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        return latents.to(self.decoder.dtype)

    @torch.inference_mode()
    def make(
        self, prompt: Prompt, on_step: Callable[[int], None] = lambda step: None, watch: StepEnd | None = None,
        dtype: torch.dtype = torch.uint8, options: DecodeOptions | None = None,
    ) -> Made:  # fmt: skip
        """Run a whole pipeline, with the decode on all ranks.

        Args:
            prompt: as returned by `Pipeline.fitted`.
            on_step: as for `denoise`.
            watch: as for `denoise`.
            dtype: uint8 for frames in 0..255, or a floating dtype for [0, 1].
            options: keyword arguments of `VAE.stream` for the decode, but for `gather` and `dtype`.
        """
        self._within.options = options or {}
        frames = self._call(prompt, on_step, watch, "pt")[0]  # sound, or a safety checker's result, may follow
        report = self._within.report
        assert report is not None
        frames = frames.movedim(1, 2) if frames.ndim == 5 else frames.unsqueeze(2)
        report = replace(report, frames=(len(frames), 3, *frames.shape[2:]))
        if dist.is_initialized() and dist.get_rank() > 0:
            return Made(None, report)
        frames = _on_white(frames.float())
        return Made((frames.mul(255).round_() if dtype == torch.uint8 else frames).to(dtype).contiguous(), report)

    def _call(self, prompt: Prompt, on_step: Callable[[int], None], watch: StepEnd | None, output_type: str) -> Any:
        assert prompt.size is not None
        width, height = prompt.size
        family = self.kind.family

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(min(step + 1, prompt.steps))  # some schedulers take one step more
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
        arguments = {**family.always, **{name: value for name, value in needed.items() if value is not None}}
        if unknown := arguments.keys() - self._takes:
            raise ValueError(f"{type(self.pipeline).__name__} takes no {', '.join(sorted(unknown))}")
        arguments |= {
            "generator": torch.Generator().manual_seed(prompt.seed), "output_type": output_type, "return_dict": False,
        }  # fmt: skip
        if "callback_on_step_end" in self._takes:
            return self.pipeline(**arguments, callback_on_step_end=step_done)
        with _reporting_steps(self.pipeline.scheduler, on_step):
            return self.pipeline(**arguments)


@contextmanager
def _reporting_steps(scheduler: Any, on_step: Callable[[int], None]) -> Iterator[None]:
    """Call `on_step` after each step of the scheduler, for a pipeline that takes no callback."""
    original, done = scheduler.step, 0

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = original(*args, **kwargs)
        done += 1
        on_step(done)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _on_white(frames: Tensor) -> Tensor:
    """Blend frames `[B, C, T, H, W]` in [0, 1] with white, and drop their alpha channel, if they have one."""
    if frames.shape[1] < 4:
        return frames
    alpha = frames[:, 3:4]
    return frames[:, :3] * alpha + 1 - alpha


def _quieten() -> None:
    """Let diffusers and transformers only report errors, and only rank 0 show the progress of loading."""
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
    """Let all ranks share the sequence of a diffusers transformer.

    This uses the building blocks of diffusers' `enable_parallelism`, which itself requires an accelerator.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    if Device(device).backend == "gloo":
        gather_uneven_shards()
    # Text and pictures may have any length, not only multiples of the degree.
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

"""`halovae encode`: encode a clip or a picture to a latents file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer

from halovae.cli.common import (
    MODEL_HELP,
    Dtype,
    GridText,
    Interface,
    Mode,
    NumGpus,
    SharedBy,
    check_installed,
    console,
    errors_shown,
    parse_bytes,
    parse_size,
    parsed,
    ranks_of,
)
from halovae.cli.planes import PlaneModel
from halovae.device.kinds import Device
from halovae.distributed.launch import launch
from halovae.grid import Grid
from halovae.io import latents as latents_file
from halovae.io import media
from halovae.models.classes import FIELDS
from halovae.models.load import CLASSES, NoEncoder, diffusers_module, find_model, read_class, read_config
from halovae.runtime.options import DecodeOptions
from halovae.runtime.vae import replace_call


def encode(
    clip: Annotated[Path, typer.Argument(help="A video or a picture.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT to scale to.", show_default="the clip's, cropped to what the model takes"),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Number of frames to take.", show_default="all")] = None,
    num_gpus: NumGpus = None,
    mode: SharedBy = Mode.auto,
    grid: GridText = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of computation.")] = Dtype.fp32,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Memory that a rank may use to encode, such as 8GiB.", show_default="what is free"),
    ] = None,
    interface: Interface = None,
) -> None:
    """Encode a clip or a picture to raw latents (the posterior's mode), on one device or on several at once.

    Sides must be multiples of the model's spatial factor, and most models of clips take 1, 5, 9, ... frames. The rest
    is cropped, and the command says so. With --num-gpus N, the command starts N ranks on this host. Under torchrun, it
    uses the world that torchrun started.
    """
    with errors_shown():
        chosen = None if size is None else parsed("--size", size, parse_size)
        ranks, shared = ranks_of(num_gpus, mode, grid)
        budget = parsed("--memory-budget", memory_budget, parse_bytes) if memory_budget else None
        path = find_model(model)
        sizes = _sizes(path)
        check_installed("encode", "diffusers", extra="diffusers")
        if output.suffix != ".safetensors":
            raise ValueError(f"output {output}: expected a name that ends in .safetensors")
        media.check_writable(output)
        pixels, fps = media.read_clip(clip, frames)
        video = _fitted(pixels, sizes, chosen)
        if video.shape[1:] != pixels.shape[1:]:
            (t, h, w), (frames_in, height, width) = video.shape[1:], pixels.shape[1:]
            console.print(f"taking {t} frames of {w}x{h} from {frames_in} of {width}x{height}")
        with console.status("encoding"):
            job = _Job(path, video, sizes.clips, dtype.torch, mode.value, shared, budget)
            latents = launch(ranks, _run, job)[0]
        if latents is None:
            return  # under torchrun, another rank than the first
        latents_file.save(output, latents, sizes.family, scaled=False, fps=fps)
        shape = "x".join(map(str, latents.shape))
        console.print(f"{output}: latents {shape} of {sizes.family}, {fps:g} frames per second", soft_wrap=True)


@dataclass(frozen=True)
class _Job:
    """Everything that a rank needs to know."""

    model: Path
    video: torch.Tensor  # [3, T, H, W], from -1 to 1
    clips: bool
    dtype: torch.dtype
    mode: Any
    grid: Grid | None
    memory_budget: int | None


def _run(job: _Job) -> torch.Tensor | None:
    """Encode on one rank. Rank 0 returns the latents."""
    vae = _encoder(job.model, job.dtype).to(Device.default().torch_device)
    sharing: DecodeOptions = {"mode": job.mode, "grid": job.grid, "memory_budget": job.memory_budget}
    replace_call(vae, "encode", sharing, lambda _: None)
    pictures = job.video[None].to(vae.device, job.dtype)
    with torch.inference_mode():
        latents = _mode(vae.encode(pictures if job.clips else pictures[:, :, 0])).cpu()
    return latents if not dist.is_initialized() or dist.get_rank() == 0 else None


@dataclass(frozen=True)
class _Sizes:
    """The inputs that an encoder takes: sides are multiples of `spatial_factor`, frames `first` plus a multiple of
    `temporal_factor`.
    """

    family: str
    spatial_factor: int
    temporal_factor: int
    first: int
    clips: bool


def _sizes(path: Path) -> _Sizes:
    if read_class(path) in CLASSES:
        config = read_config(path)
        return _Sizes(config.family, config.spatial_factor, config.temporal_factor, 1, True)
    model = PlaneModel.read(path, torch.float32)
    from halovae.models.architectures import temporal_ratio
    from halovae.models.classes import makes_clips, spatial_ratio

    ratio = spatial_ratio(model.module)
    if ratio is None:
        raise ValueError(f"{path}: the config of {model.name} does not say how latents relate to pictures")
    if not hasattr(type(model.module), "encode"):
        raise ValueError(f"{path}: {model.name} has no encoder")
    if not makes_clips(model.module):
        return _Sizes(model.name, ratio, 1, 1, False)
    return _Sizes(model.name, ratio, *temporal_ratio(model.module), True)


def _encoder(path: Path, dtype: torch.dtype) -> Any:
    vae: Any = diffusers_module(path, dtype)
    if isinstance(getattr(vae, "encoder", None), NoEncoder):
        raise ValueError(f"{path}: the file of this {type(vae).__name__} has no encoder")
    return vae


def _mode(encoded: Any) -> torch.Tensor:
    """Return the most likely latents, whatever the class of the encoder's result."""
    result = next(value for name in FIELDS if (value := getattr(encoded, name, None)) is not None)
    latents: torch.Tensor = result if isinstance(result, torch.Tensor) else result.mode()
    return latents


def _fitted(pixels: torch.Tensor, sizes: _Sizes, size: tuple[int, int] | None) -> torch.Tensor:
    """Convert uint8 `[3, T, H, W]` to [-1, 1]; scale it to `size` if given, else crop it to what the model takes."""
    factor, step, first = sizes.spatial_factor, sizes.temporal_factor, sizes.first
    if size is not None and (size[0] % factor or size[1] % factor):
        raise ValueError(f"--size {size[0]}x{size[1]}: {sizes.family} takes multiples of {factor} pixels")
    count, height, width = pixels.shape[1:]
    if min(height, width) < factor and size is None:
        raise ValueError(f"a clip of {width}x{height} is too small: {sizes.family} takes multiples of {factor} pixels")
    taken = first + (count - first) // step * step if sizes.clips else 1
    if taken < 1:
        raise ValueError(f"a clip of {count} frames is too short: {sizes.family} takes multiples of {step} frames")
    video = pixels[:, :taken].float() / 127.5 - 1
    if size is None:
        top, left = height % factor // 2, width % factor // 2
        return video[:, :, top : top + height - height % factor, left : left + width - width % factor]
    planes = F.interpolate(video.transpose(0, 1), (size[1], size[0]), mode="bicubic", antialias=True)
    return planes.transpose(0, 1).clamp(-1, 1)

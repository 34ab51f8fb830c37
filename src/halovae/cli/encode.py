"""`halovae encode`: a clip or a picture to a latents file, through diffusers' encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from halovae import latents as latents_file
from halovae import media
from halovae.cli.common import Dtype, console, errors_shown, parse_size, parsed
from halovae.models.load import find_folder, read_class, read_config
from halovae.models.wan import WanConfig
from halovae.platform import Platform


def encode(
    clip: Annotated[Path, typer.Argument(help="A video, or a picture.")],
    model: Annotated[str, typer.Option(help="Folder in diffusers layout (a VAE's or a pipeline's), or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT to scale to. [default: the clip's, cut to what the model takes]")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="How many frames to take. [default: all]")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What to compute in.")] = Dtype.fp32,
) -> None:
    """Encode a clip to raw latents (the posterior's mode), one process, with diffusers' encoder.

    The model takes 1, 5, 9, ... frames whose sides are multiples of its spatial factor: what is over is cut, and said.
    """
    with errors_shown():
        wanted = None if size is None else parsed("--size", size, parse_size)
        folder = find_folder(model)
        config = read_config(folder)
        if output.suffix != ".safetensors":
            raise ValueError(f"output {output}: expected a name that ends in .safetensors")
        media.check_writable(output)
        pixels, fps = media.read_clip(clip, frames)
        video = _fitted(pixels, config, wanted)
        if video.shape[1:] != pixels.shape[1:]:
            (t, h, w), (frames_in, height, width) = video.shape[1:], pixels.shape[1:]
            console.print(f"taking {t} frames of {w}x{h} from {frames_in} of {width}x{height}")
        with console.status("encoding"), torch.inference_mode():
            device = Platform.default().device
            vae = _encoder(folder, dtype.torch).to(device)
            latents = vae.encode(video[None].to(device, dtype.torch)).latent_dist.mode().cpu()
        latents_file.save(output, latents, config.family, scaled=False, fps=fps)
        shape = "x".join(map(str, latents.shape))
        console.print(f"{output}: latents {shape} of {config.family}, {fps:g} frames per second", soft_wrap=True)


def _encoder(folder: Path, dtype: torch.dtype) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("encoding goes through diffusers: pip install 'halovae[diffusers]'") from error
    return getattr(diffusers, read_class(folder)).from_pretrained(folder, torch_dtype=dtype)


def _fitted(pixels: torch.Tensor, config: WanConfig, size: tuple[int, int] | None) -> torch.Tensor:
    """uint8 `[3, T, H, W]` to [-1, 1] in sizes that the model takes: scaled if a size is given, then cut."""
    factor, step = config.spatial_factor, config.temporal_factor
    if size is not None and (size[0] % factor or size[1] % factor):
        raise ValueError(f"--size {size[0]}x{size[1]}: {config.family} takes multiples of {factor} pixels")
    count, height, width = pixels.shape[1:]
    if min(height, width) < factor and size is None:
        raise ValueError(f"a clip of {width}x{height} is too small: {config.family} takes multiples of {factor} pixels")
    video = pixels[:, : 1 + (count - 1) // step * step].float() / 127.5 - 1
    if size is None:
        top, left = height % factor // 2, width % factor // 2
        return video[:, :, top : top + height - height % factor, left : left + width - width % factor]
    planes = F.interpolate(video.transpose(0, 1), (size[1], size[0]), mode="bicubic", antialias=True)
    return planes.transpose(0, 1).clamp(-1, 1)

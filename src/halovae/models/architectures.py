"""Models of the true architectures: with random weights for measurements, on meta tensors for planning."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halovae.models.classes import latent_channels, makes_clips, sizes_of, spatial_ratio, takes_frames, tiles_only
from halovae.models.load import NoEncoder
from halovae.models.registry import class_named, families, traits_of

DEMO = Path(str(files("halovae.models"))) / "demo"  # a small VAE of Wan2.1's class, trained by scripts/train_demo.py

# Models that `halovae validate` knows by name, the family of their VAE, and whether they make clips.
TARGETS = {
    "Wan2.1": ("wan2.1", True),
    "Wan2.2-A14B": ("wan2.1", True),
    "Wan2.2-TI2V-5B": ("wan2.2-5b", True),
    "Qwen-Image": ("qwen-image", False),
    "Qwen-Image-Edit": ("qwen-image", False),
}


def random_vae(family: str, width: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a diffusers VAE with seeded random weights. Initial values of norms would hide errors, so norms differ.

    Args:
        family: a name in `families()`.
        width: channels of the last level instead of the true ones, for a small model of the same architecture;
            only for families with `widths`.
        seed: equal seeds give equal weights.
        dtype: the dtype of the weights.

    Raises:
        ValueError: an unknown family, or one whose width is fixed.
    """
    if family not in families():
        raise ValueError(f"family {family!r}: expected one of {', '.join(families())}")
    has_widths = families()[family].widths is not None
    if width is not None and not has_widths:
        raise ValueError(f"width={width}: {family} only comes in its true width; expected None")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae = _made(family, width).eval().requires_grad_(False)
        for key, weight in vae.named_parameters():
            if key.endswith("gamma") if has_widths else weight.ndim == 1:
                weight.add_(0.2 * torch.randn(weight.shape))
    return vae if dtype == torch.float32 else nn.Module.to(vae, dtype)


def sample_vae(device: torch.device, dtype: torch.dtype) -> Any:
    """Build the VAE that calibrations decode with: Wan2.1's with the fewest blocks, and equal weights on all ranks."""
    from diffusers import AutoencoderKLWan

    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae: Any = AutoencoderKLWan(num_res_blocks=0)
        vae.encoder = vae.quant_conv = NoEncoder()
        nn.Module.to(vae.eval().requires_grad_(False), device, dtype)  # the model's own `to` warns about half precision
    return vae


def meta_vae(family: str, dtype: torch.dtype) -> nn.Module:
    """Build the autoencoder of a name in `families()` on meta tensors."""
    families()[family].cls  # noqa: B018 - imported first: tensors that its modules create need data
    with torch.device("meta"):
        return _prepared(_made(family), dtype)


def meta_vae_of(config: Mapping[str, Any], source: str, dtype: torch.dtype) -> nn.Module:
    """Build the autoencoder that a diffusers `config.json` describes, on meta tensors.

    Args:
        config: the content of the file.
        source: the origin of the config, for errors.
        dtype: the dtype to compute in.

    Raises:
        ValueError: the config names no autoencoder of diffusers that can be planned; the message says why.
    """
    from halovae.models.zoo import LEFT_OUT

    name = str(config.get("_class_name"))
    if name in LEFT_OUT:
        raise ValueError(f"{source}: {name} cannot be planned: {LEFT_OUT[name]}")
    found = class_named(name)
    if found is None:
        raise ValueError(f"{source}: {name!r} is neither a class of the installed diffusers nor a registered one")
    try:
        with torch.device("meta"):
            return _prepared(found.from_config(dict(config)), dtype)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{source}: {name} cannot be built from this config ({error})") from error


def latent_shape(module: nn.Module, name: str, size: tuple[int, int], frames: int) -> tuple[int, ...]:
    """Return the shape of the latents that decode to one picture or clip of a size.

    Args:
        module: a diffusers autoencoder.
        name: its name in errors.
        size: `(width, height)` in pixels.
        frames: the number of frames of a clip; 1 for pictures.

    Raises:
        ValueError: no latents decode to that size; the message gives the nearest sizes or numbers of frames.
    """
    if (sizes := sizes_of(module)) is not None:
        return sizes.latents(size, frames)
    channels, space = latent_channels(module), spatial_ratio(module)
    if channels is None or space is None:
        raise ValueError(f"{name}: the config of {type(module).__name__} does not say how latents relate to pictures")
    if any(extent % space for extent in size):
        nearest = "x".join(str(max(1, round(extent / space)) * space) for extent in size)
        raise ValueError(f"size {size[0]}x{size[1]}: {name} makes multiples of {space}, such as {nearest}")
    plane = size[1] // space, size[0] // space
    if traits_of(type(module)).batched:
        return frames, channels, *plane
    if not makes_clips(module):
        if frames != 1:
            raise ValueError(f"{frames} frames: {name} makes pictures: --frames 1")
        return (1, channels, 1, *plane) if takes_frames(module) else (1, channels, *plane)
    ratio, first = temporal_ratio(module)
    if (frames - first) % ratio:
        below = first + (frames - first) // ratio * ratio
        near = " or ".join(str(count) for count in (below, below + ratio) if count > 0)
        rule = "multiples" if first == 0 else "1 + a multiple"
        raise ValueError(f"{frames} frames: {name} makes {rule} of {ratio}: {near}")
    return 1, channels, (frames - first) // ratio + first, *plane


def temporal_ratio(module: nn.Module) -> tuple[int, int]:
    """Return frames per latent frame, and 1 if the first latent frame makes one frame (causal models), else 0."""
    traits, config = traits_of(type(module)), getattr(module, "config", {})
    if (sizes := sizes_of(module)) is not None:
        return sizes.temporal_factor, 1
    first = 0 if traits.whole_frames else 1
    if traits.temporal is not None:
        return traits.temporal, first
    ratio = 1
    for key in ("temporal_compression_ratio", "scale_factor_temporal", "time_compression_ratio"):
        found = config.get(key) or vars(module).get(key)
        if isinstance(found, int):
            ratio = found
            break
    return ratio, first


def usual_frames(module: nn.Module, clip: int) -> int:
    """Return the usual number of frames: `clip` for models of clips, 1 for models of pictures, even if 5-D."""
    sizes = sizes_of(module)
    return clip if makes_clips(module) and (sizes is None or sizes.family != "qwen-image") else 1


def _made(family: str, width: int | None = None) -> Any:
    known = families()[family]
    config = dict(known.config)
    if known.widths:
        encoder, decoder = known.widths
        config["base_dim"] = width or encoder
        if encoder != decoder:
            config["decoder_base_dim"] = width or decoder
    cls: Any = known.cls
    return _tiled(cls(**config))


def _prepared(module: Any, dtype: torch.dtype) -> nn.Module:
    # Not the model's own `to`, which warns about weights that are meant to stay fp32.
    return nn.Module.to(_tiled(module).eval().requires_grad_(False), dtype)


def _tiled(module: Any) -> Any:
    if tiles_only(module):
        module.enable_tiling()
    return module

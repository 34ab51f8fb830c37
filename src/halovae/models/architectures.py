"""Models of the true architectures: with random weights for measurements, on meta tensors for planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halovae.models.classes import BATCHED, latent_channels, makes_clips, sizes_of, spatial_ratio, takes_frames
from halovae.models.load import NoEncoder

DEMO = Path(str(files("halovae.models"))) / "demo"  # a small VAE of Wan2.1's class, trained by scripts/train_demo.py

# Models that `halovae validate` knows by name, the family of their VAE, and whether they make clips.
TARGETS = {
    "Wan2.1": ("wan2.1", True),
    "Wan2.2-A14B": ("wan2.1", True),
    "Wan2.2-TI2V-5B": ("wan2.2-5b", True),
    "Qwen-Image": ("qwen-image", False),
    "Qwen-Image-Edit": ("qwen-image", False),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a published autoencoder.

    Attributes:
        class_name: the diffusers class.
        config: values that differ from the class's defaults.
        widths: channels of the first encoder block and the last decoder block, for classes that are also built small.
        note: what is unknown about the published sizes.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, int] | None = None
    note: str = ""


_WAN22 = {
    "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
}  # fmt: skip
_NO_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_SANA = {
    "encoder_block_types": _DC_BLOCKS, "decoder_block_types": _DC_BLOCKS, "downsample_block_type": "conv",
    "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
}  # fmt: skip
_HUNYUAN_IMAGE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 64, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512, 1024, 1024), "spatial_compression_ratio": 32, "sample_size": 384,
}  # fmt: skip
_UNCHECKED = "the class's defaults: no published config was at hand"

MODELS: dict[str, Sizes] = {
    "wan2.1": Sizes("AutoencoderKLWan", widths=(96, 96)),
    "wan2.2-5b": Sizes("AutoencoderKLWan", _WAN22, (160, 256)),
    "qwen-image": Sizes("AutoencoderKLQwenImage", widths=(96, 96)),
    "flux": Sizes("AutoencoderKL", {**_KL, **_NO_QUANT_CONV, "latent_channels": 16}),
    "flux.2": Sizes("AutoencoderKLFlux2"),
    "sd": Sizes("AutoencoderKL", _KL),
    "sdxl": Sizes("AutoencoderKL", {**_KL, "sample_size": 1024, "scaling_factor": 0.13025}),
    "sd3.5": Sizes("AutoencoderKL", {**_KL, **_NO_QUANT_CONV, "latent_channels": 16, "sample_size": 1024}),
    "sana": Sizes("AutoencoderDC", _SANA),
    "hunyuan-video": Sizes("AutoencoderKLHunyuanVideo"),
    "hunyuan-video-1.5": Sizes("AutoencoderKLHunyuanVideo15"),
    "kandinsky-5": Sizes("AutoencoderKLHunyuanVideo"),  # its pipelines use HunyuanVideo's
    "hunyuan-image": Sizes("AutoencoderKLHunyuanImage", _HUNYUAN_IMAGE),
    "ltx-video": Sizes("AutoencoderKLLTXVideo"),  # 0.9.0
    "ltx-2": Sizes(
        "AutoencoderKLLTX2Video",
        {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    ),
    "cogvideox": Sizes("AutoencoderKLCogVideoX"),
    "mochi": Sizes("AutoencoderKLMochi"),
    "cosmos": Sizes("AutoencoderKLCosmos"),  # 1.0, CV8x8x8
    "allegro": Sizes("AutoencoderKLAllegro", note=_UNCHECKED),
    "easyanimate": Sizes("AutoencoderKLMagvit", note=_UNCHECKED),
    "qwen-image-2.1": Sizes("AutoencoderKLQwenImage21", note=_UNCHECKED),
}
"""The autoencoders whose true sizes are known, by name."""

# Families that are also built small: the diffusers class, values that differ from its defaults, and the true widths.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    name: (sizes.class_name, dict(sizes.config), sizes.widths) for name, sizes in MODELS.items() if sizes.widths
}


def random_vae(family: str, width: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a diffusers VAE with seeded random weights. Initial values of norms would hide errors, so norms differ.

    Args:
        family: a name in `MODELS`.
        width: channels of the last level instead of the true ones, for a small model of the same architecture;
            only for names in `FAMILIES`.
        seed: equal seeds give equal weights.
        dtype: the dtype of the weights.

    Raises:
        ValueError: an unknown family, or one whose width is fixed.
    """
    if family not in MODELS:
        raise ValueError(f"family {family!r}: expected one of {', '.join(MODELS)}")
    if width is not None and family not in FAMILIES:
        raise ValueError(f"width={width}: {family} only comes in its true width; expected None")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vae = _made(family, width).eval().requires_grad_(False)
        for key, weight in vae.named_parameters():
            if key.endswith("gamma") if family in FAMILIES else weight.ndim == 1:
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
    """Build the autoencoder of a name in `MODELS` on meta tensors."""
    import diffusers

    getattr(diffusers, MODELS[family].class_name)  # imported first: tensors that its modules create need data
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
    import diffusers

    from halovae.models.zoo import LEFT_OUT

    name = str(config.get("_class_name"))
    if name in LEFT_OUT:
        raise ValueError(f"{source}: {name} cannot be planned: {LEFT_OUT[name]}")
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "decode")):
        raise ValueError(f"{source}: {name!r} is no autoencoder class of the installed diffusers")
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
    if type(module).__name__ in BATCHED:
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
    name, config = type(module).__name__, getattr(module, "config", {})
    if (sizes := sizes_of(module)) is not None:
        return sizes.temporal_factor, 1
    if name in _SAME_FRAMES:
        return 1, 1
    ratio = 1
    for key in ("temporal_compression_ratio", "scale_factor_temporal", "time_compression_ratio"):
        found = config.get(key) or vars(module).get(key)
        if isinstance(found, int):
            ratio = found
            break
    return ratio, 0 if name in _WHOLE_FRAMES else 1


def usual_frames(module: nn.Module, clip: int) -> int:
    """Return the usual number of frames: `clip` for models of clips, 1 for models of pictures, even if 5-D."""
    sizes = sizes_of(module)
    return clip if makes_clips(module) and (sizes is None or sizes.family != "qwen-image") else 1


_SAME_FRAMES = ("AutoencoderKLHunyuanImageRefiner",)
_WHOLE_FRAMES = ("AutoencoderKLAllegro", "AutoencoderVidTok")  # all latent frames make the same number of frames


def _made(family: str, width: int | None = None) -> Any:
    import diffusers

    sizes = MODELS[family]
    config = dict(sizes.config)
    if sizes.widths:
        encoder, decoder = sizes.widths
        config["base_dim"] = width or encoder
        if encoder != decoder:
            config["decoder_base_dim"] = width or decoder
    vae = getattr(diffusers, sizes.class_name)(**config)
    if sizes.class_name == "AutoencoderKLAllegro":
        vae.enable_tiling()  # the class only decodes in tiles
    return vae


def _prepared(module: Any, dtype: torch.dtype) -> nn.Module:
    if type(module).__name__ == "AutoencoderKLAllegro":
        module.enable_tiling()
    # Not the model's own `to`, which warns about weights that are meant to stay fp32.
    return nn.Module.to(module.eval().requires_grad_(False), dtype)

"""Families of autoencoders by name: published ones, and those that other packages register."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from halovae.models.layouts import LAYOUTS, Layout

GROUP = "halovae.families"  # of the entry points by which packages register a `Family`, or several


@dataclass(frozen=True)
class Traits:
    """What neither the config of a class nor the signature of its calls says.

    Attributes:
        batched: the batch is the frames of one clip.
        one_frame: latents are `[B, C, 1, H, W]`, though the class makes pictures.
        whole_frames: all latent frames make the same number of frames; else the first one makes one.
        tiles_only: it only works with diffusers' tiling.
        spatial: picture rows per latent row; None for what the config says.
        temporal: frames per latent frame; None for what the config says.
        channels: of latents; None for what the config says.
    """

    batched: bool = False
    one_frame: bool = False
    whole_frames: bool = False
    tiles_only: bool = False
    spatial: int | None = None
    temporal: int | None = None
    channels: int | None = None


@dataclass(frozen=True)
class Family:
    """A published autoencoder, in its true size.

    Attributes:
        name: by which commands know it.
        class_name: the diffusers class; or `package.module:Class`, a class with diffusers' `ModelMixin` and
            `ConfigMixin`.
        config: values that differ from the class's defaults.
        widths: channels of the first encoder block and the last decoder block, for classes that are also built small;
            they become `base_dim` and `decoder_base_dim` in the config.
        note: what is unknown about the published sizes.
        traits: of the class, where it is not one of diffusers.
        layouts: how single files hold its weights, besides the layouts that halovae knows.
    """

    name: str
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, int] | None = None
    note: str = ""
    traits: Traits = Traits()
    layouts: tuple[Layout, ...] = ()

    @property
    def cls(self) -> type[nn.Module]:
        """The class.

        Raises:
            ImportError: its package is not installed.
            AttributeError: the package has no such class.
        """
        module, _, name = self.class_name.rpartition(":")
        found: type[nn.Module] = getattr(importlib.import_module(module or "diffusers"), name)
        return found


TRAITS = {
    "AutoencoderKLTemporalDecoder": Traits(batched=True),
    "AutoencoderKLQwenImage21": Traits(one_frame=True),
    "AutoencoderKLHunyuanImageRefiner": Traits(temporal=1),
    "AutoencoderKLAllegro": Traits(whole_frames=True, tiles_only=True),
    "AutoencoderVidTok": Traits(whole_frames=True),
}
"""Traits of diffusers' classes."""

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

_PUBLISHED = (
    Family("wan2.1", "AutoencoderKLWan", widths=(96, 96)),
    Family("wan2.2-5b", "AutoencoderKLWan", _WAN22, (160, 256)),
    Family("qwen-image", "AutoencoderKLQwenImage", widths=(96, 96)),
    Family("flux", "AutoencoderKL", {**_KL, **_NO_QUANT_CONV, "latent_channels": 16, "sample_size": 1024}),
    Family("flux.2", "AutoencoderKLFlux2"),
    Family("sd", "AutoencoderKL", {**_KL, "sample_size": 512}),
    Family("sdxl", "AutoencoderKL", {**_KL, "sample_size": 1024, "scaling_factor": 0.13025}),
    Family("sd3.5", "AutoencoderKL", {**_KL, **_NO_QUANT_CONV, "latent_channels": 16, "sample_size": 1024}),
    Family("sana", "AutoencoderDC", _SANA),
    Family("hunyuan-video", "AutoencoderKLHunyuanVideo"),
    Family("hunyuan-video-1.5", "AutoencoderKLHunyuanVideo15"),
    Family("kandinsky-5", "AutoencoderKLHunyuanVideo"),  # its pipelines use HunyuanVideo's
    Family("hunyuan-image", "AutoencoderKLHunyuanImage", _HUNYUAN_IMAGE),
    Family("ltx-video", "AutoencoderKLLTXVideo"),  # 0.9.0
    Family(
        "ltx-2",
        "AutoencoderKLLTX2Video",
        {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    ),
    Family("cogvideox", "AutoencoderKLCogVideoX"),
    Family("mochi", "AutoencoderKLMochi"),
    Family("cosmos", "AutoencoderKLCosmos"),  # 1.0, CV8x8x8
    Family("allegro", "AutoencoderKLAllegro", note=_UNCHECKED),
    Family("easyanimate", "AutoencoderKLMagvit", note=_UNCHECKED),
    Family("qwen-image-2.1", "AutoencoderKLQwenImage21", note=_UNCHECKED),
)


@functools.cache
def families() -> dict[str, Family]:
    """Return all families by name: the published ones first, then those of installed packages.

    Warns:
        UserWarning: a package registers something else, or a name that is taken; it is left out.
    """
    found = {family.name: family for family in _PUBLISHED}
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:  # another package's fault is no reason to fail
            _warn(point.value, f"cannot be imported ({type(error).__name__}: {error})")
            continue
        for family in loaded if isinstance(loaded, (tuple, list)) else [loaded]:
            if not isinstance(family, Family):
                _warn(point.value, f"is {type(family).__name__}, expected halovae.Family or several")
            elif family.name in found:
                _warn(point.value, f"registers {family.name!r}, which is taken")
            else:
                found[family.name] = family
    return found


def _warn(source: str, reason: str) -> None:
    warnings.warn(f"entry point {source} of {GROUP} is left out: it {reason}", UserWarning, stacklevel=3)


def _registered() -> list[tuple[str, Family]]:
    """Return the families whose class is not in diffusers, each with the name of the class."""
    return [(one.class_name.rpartition(":")[2], one) for one in families().values() if ":" in one.class_name]


def class_named(name: str) -> type[nn.Module] | None:
    """Return an autoencoder's class by its name in configs: diffusers', or a registered one; None if there is none.

    Raises:
        ImportError: diffusers is not installed, or the registered class's package.
        AttributeError: the registered class's package lacks it.
    """
    found = getattr(importlib.import_module("diffusers"), name, None)
    if not _is_autoencoder(found):
        found = next((family.cls for known, family in _registered() if known == name), None)
    return found if _is_autoencoder(found) else None


def _is_autoencoder(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "decode")


def traits_of(cls: type) -> Traits:
    """Return the traits of a class, or of the first of its bases that has any."""
    for base in cls.__mro__:
        for name, family in _registered():
            module = sys.modules.get(family.class_name.rpartition(":")[0])
            if name == base.__name__ and getattr(module, name, None) is base:
                return family.traits
        if base.__name__ in TRAITS:
            return TRAITS[base.__name__]
    return Traits()


def layouts() -> tuple[Layout, ...]:
    """Return the layouts of single files: those that halovae knows, and those of registered families."""
    return (*LAYOUTS, *(layout for family in families().values() for layout in family.layouts))

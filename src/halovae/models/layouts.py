"""Layouts of VAE files as data: signature keys, map of names, diffusers class, and how to read the config.

A config is read from shapes. Other values are diffusers' defaults for the class, or constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from halovae.models import key_maps
from halovae.models.key_maps import Tensors

Config = dict[str, Any]

# Latent statistics of Wan2.1 and Qwen-Image, per channel, from wan/modules/vae.py of Wan-AI's Wan2.1. They are also
# diffusers' defaults.
_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# Latent statistics of Wan2.2-5B, from wan/modules/vae2_2.py of Wan-AI's Wan2.2.
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
_WAN_STATISTICS = {16: (_WAN_MEAN, _WAN_STD), 48: (_WAN22_MEAN, _WAN22_STD)}


@dataclass(frozen=True)
class Scaling:
    """How a model with an `AutoencoderKL` scales latents: `(latents - shift_factor) * scaling_factor`.

    Attributes:
        model: the model.
        factors: `scaling_factor`, and `shift_factor` if there is one.
        beside: prefixes of other keys in a full checkpoint of that model. A file with no such keys of any model is
            taken for the first model's.
    """

    model: str
    factors: Mapping[str, float]
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model}'s " + ", ".join(f"{name} {value}" for name, value in self.factors.items())


# By latent channels. The values are those of CompVis' v1-inference.yaml, Stability AI's sdxl-vae and SD3LatentFormat
# (sd3_impls.py), and Black Forest Labs' flux/util.py.
SCALINGS: dict[int, tuple[Scaling, ...]] = {
    4: (
        Scaling("Stable Diffusion 1 and 2", {"scaling_factor": 0.18215}, ("cond_stage_model.",)),
        Scaling("SDXL", {"scaling_factor": 0.13025}, ("conditioner.embedders.", "model.diffusion_model.label_emb.")),
    ),
    16: (
        Scaling(
            "FLUX.1",
            {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            ("model.diffusion_model.double_blocks.", "double_blocks."),
        ),
        Scaling(
            "Stable Diffusion 3",
            {"scaling_factor": 1.5305, "shift_factor": 0.0609},
            ("model.diffusion_model.joint_blocks.", "joint_blocks."),
        ),
    ),
}


@dataclass(frozen=True)
class Layout:
    """One way to store one family's weights.

    Attributes:
        family: one family, or several whose files cannot be distinguished.
        names_of: whose parameter names these are.
        class_name: the diffusers class of the model.
        signature: keys that every file of this layout has, and that distinguish it from other layouts.
        names: maps tensors to diffusers' names.
        config: reads the config from tensors by diffusers' names; it may name another class.
        alike: families whose files cannot be distinguished from this one's, as latents files name them.
    """

    family: str
    names_of: str
    class_name: str
    signature: tuple[str, ...]
    names: Callable[[Tensors], dict[str, Tensor]]
    config: Callable[[Tensors], Config]
    alike: tuple[str, ...] = ()


def _count(tensors: Tensors, start: str, end: str) -> int:
    """Count the consecutive numbers from 0 on that keys have between `start` and `end`."""
    count = 0
    while f"{start}{count}{end}" in tensors:
        count += 1
    return count


def _wan_config(tensors: Tensors) -> Config:
    size = {key: tensor.shape for key, tensor in tensors.items()}
    levels = _count(tensors, "decoder.up_blocks.", ".resnets.0.conv1.weight")
    out_channels, base = size["decoder.conv_out.weight"][:2]
    widths = [size[f"decoder.up_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    residual = "decoder.up_blocks.0.upsampler.resample.1.weight" in tensors
    upsampler = "upsampler" if residual else "upsamplers.0"
    temporal = [f"decoder.up_blocks.{level}.{upsampler}.time_conv.weight" in tensors for level in range(levels - 1)]
    patch = isqrt(out_channels // 3) if residual else 1
    z_dim = size["decoder.conv_in.weight"][1]
    mean, std = _WAN_STATISTICS.get(z_dim, ((), ()))
    encoder_base, in_channels = size.get("encoder.conv_in.weight", (base, out_channels))[:2]
    return {
        "base_dim": encoder_base,
        "decoder_base_dim": base,
        "z_dim": z_dim,
        "dim_mult": [width // base for width in reversed(widths)],
        "num_res_blocks": _count(tensors, "decoder.up_blocks.0.resnets.", ".conv1.weight") - 1,
        "temperal_downsample": temporal[::-1],
        "latents_mean": list(mean),
        "latents_std": list(std),
        "is_residual": residual,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": 2 ** (levels - 1) * patch,
        "scale_factor_temporal": 2 ** sum(temporal),
    }


def _kl_config(tensors: Tensors, conv: str = "") -> Config:
    """Read the config of a latent diffusion class. `conv` is the suffix of a convolution's name."""
    size = {key: tensor.shape for key, tensor in tensors.items()}
    levels = _count(tensors, "encoder.down_blocks.", f".resnets.0.conv1{conv}.weight")
    return {
        "in_channels": size[f"encoder.conv_in{conv}.weight"][1],
        "out_channels": size[f"decoder.conv_out{conv}.weight"][0],
        "latent_channels": size[f"decoder.conv_in{conv}.weight"][1],
        "block_out_channels": [
            size[f"encoder.down_blocks.{level}.resnets.0.conv1{conv}.weight"][0] for level in range(levels)
        ],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets.", f".conv1{conv}.weight"),
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def _image_config(tensors: Tensors) -> Config:
    config = _kl_config(tensors)
    levels = len(config["block_out_channels"])
    return config | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _autoencoder_kl_config(tensors: Tensors) -> Config:
    config = _image_config(tensors)
    scaling, *_ = SCALINGS.get(config["latent_channels"], SCALINGS[4])
    return config | {"sample_size": 512, **scaling.factors}  # sample_size only matters for diffusers' tiling


def _flux2_config(tensors: Tensors) -> Config:
    config = _image_config(tensors)
    levels = _count(tensors, "decoder.up_blocks.", ".resnets.0.conv1.weight")
    widths = [tensors[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in reversed(range(levels))]
    patch = isqrt(tensors["bn.running_mean"].shape[0] // config["latent_channels"])
    narrow = {"decoder_block_out_channels": widths} if widths != config["block_out_channels"] else {}
    return config | narrow | {"patch_size": [patch, patch]}


def _hunyuan_video_config(tensors: Tensors) -> Config:
    config = _kl_config(tensors, ".conv")
    levels = len(config["block_out_channels"])
    return config | {
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
    }


def _ltx_config(tensors: Tensors) -> Config:
    size = {key: tensor.shape for key, tensor in tensors.items()}
    latent_channels = size["decoder.conv_in.conv.weight"][1]
    patch = isqrt(size["decoder.conv_out.conv.weight"][0] // 3)
    ups = range(_count(tensors, "decoder.up_blocks.", ".resnets.0.conv1.conv.weight"))
    widths = [size[f"decoder.up_blocks.{i}.resnets.0.conv1.conv.weight"][0] for i in ups]
    wide = [size.get(f"decoder.up_blocks.{i}.upsamplers.0.conv.conv.weight") for i in ups]
    factors = [1 if shape is None else max(1, shape[1] // width) for shape, width in zip(wide, widths, strict=True)]
    blocks = ["decoder.mid_block.", *(f"decoder.up_blocks.{i}." for i in ups)]
    layers = [_count(tensors, f"{block}resnets.", ".conv1.conv.weight") for block in blocks]
    return {
        "in_channels": size["encoder.conv_in.conv.weight"][1] // patch**2,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "decoder_block_out_channels": [w * f for w, f in zip(widths, factors, strict=True)][::-1],
        "decoder_layers_per_block": layers[::-1],
        "decoder_spatio_temporal_scaling": [shape is not None for shape in wide][::-1],
        "decoder_inject_noise": [f"{block}resnets.0.per_channel_scale1" in tensors for block in blocks][::-1],
        "upsample_factor": factors[::-1],
        # No parameter shows the residual path. By diffusers' scripts/convert_ltx_to_diffusers.py, decoders that divide
        # channels have it (0.9.1), and others do not (0.9.0).
        "upsample_residual": [factor > 1 for factor in factors][::-1],
        "timestep_conditioning": "decoder.scale_shift_table" in tensors,
        "patch_size": patch,
        **_ltx_encoder_config(tensors, patch),
    }


def _ltx_encoder_config(tensors: Tensors, patch: int) -> Config:
    size = {key: tensor.shape for key, tensor in tensors.items()}
    downs = range(_count(tensors, "encoder.down_blocks.", ".resnets.0.conv1.conv.weight"))
    widths = [size[f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight"][0] for i in downs]
    layers = [_count(tensors, f"encoder.down_blocks.{i}.resnets.", ".conv1.conv.weight") for i in downs]
    middle = _count(tensors, "encoder.mid_block.resnets.", ".conv1.conv.weight")
    config: Config = {"layers_per_block": [*layers, middle]}
    packed = [size.get(f"encoder.down_blocks.{i}.downsamplers.0.conv.conv.weight") for i in downs]
    if None in packed or not packed:  # until 0.9.1, convolutions of stride 2
        plain = [f"encoder.down_blocks.{i}.downsamplers.0.conv.weight" in tensors for i in downs]
        return config | {
            "block_out_channels": widths,
            "spatio_temporal_scaling": plain,
            "down_block_types": ["LTXVideoDownBlock3D"] * len(downs),
        }
    widths.append(size["encoder.mid_block.resnets.0.conv1.conv.weight"][0])  # from 0.9.5 on, cells become channels
    cells = [width // shape[0] for width, shape in zip(widths[1:], packed, strict=True) if shape is not None]
    kinds = [{2: "temporal", 4: "spatial"}.get(count, "spatiotemporal") for count in cells]
    return config | {
        "block_out_channels": widths,
        "spatio_temporal_scaling": [True] * len(kinds),
        "down_block_types": ["LTXVideo095DownBlock3D"] * len(kinds),
        "downsample_type": kinds,
        "spatial_compression_ratio": patch * 2 ** sum(kind != "temporal" for kind in kinds),
        "temporal_compression_ratio": 2 ** sum(kind != "spatial" for kind in kinds),
    }


def _ltx_or_ltx2_config(tensors: Tensors) -> Config:
    """Read the config of LTX-Video or LTX-2.

    LTX-2's decoder divides channels, as LTX-Video's does from 0.9.1 on, but takes no timestep. It is not causal: see
    scripts/convert_ltx2_to_diffusers.py of diffusers.
    """
    config = _ltx_config(tensors)
    if config["timestep_conditioning"] or max(config["upsample_factor"]) == 1:
        return config
    return config | {
        "_class_name": "AutoencoderKLLTX2Video",
        "block_out_channels": config["block_out_channels"][1:],  # the first are the latents' channels
        "down_block_types": ["LTX2VideoDownBlock3D"] * len(config["down_block_types"]),
        "decoder_causal": False,
    }


_QWEN = ("qwen-image",)
_FLUX2 = ("bn.running_mean", "bn.running_var")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "Wan2.1 or Qwen-Image", "Wan-AI's and ComfyUI's", "AutoencoderKLWan",
        ("decoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "decoder.upsamples.0.residual.0.gamma",
         "decoder.head.0.gamma", "conv2.weight"),
        key_maps.wan, _wan_config, _QWEN,
    ),
    Layout(
        "Wan2.1 or Qwen-Image", "diffusers'", "AutoencoderKLWan",
        ("decoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.gamma",
         "decoder.up_blocks.0.upsamplers.0.resample.1.weight", "decoder.norm_out.gamma", "post_quant_conv.weight"),
        key_maps.diffusers_names, _wan_config, _QWEN,
    ),
    Layout(
        "Wan2.2-5B", "Wan-AI's and ComfyUI's", "AutoencoderKLWan",
        ("decoder.conv1.weight", "decoder.middle.0.residual.0.gamma",
         "decoder.upsamples.0.upsamples.0.residual.0.gamma", "decoder.head.0.gamma", "conv2.weight"),
        key_maps.wan22, _wan_config,
    ),
    Layout(
        "Wan2.2-5B", "diffusers'", "AutoencoderKLWan",
        ("decoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.gamma",
         "decoder.up_blocks.0.upsampler.resample.1.weight", "decoder.norm_out.gamma", "post_quant_conv.weight"),
        key_maps.diffusers_names, _wan_config,
    ),
    Layout(
        "Stable Diffusion, SDXL, SD3 or FLUX.1", "latent diffusion's", "AutoencoderKL",
        ("encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight",
         "decoder.mid.block_1.norm1.weight", "decoder.up.0.block.0.norm1.weight", "decoder.norm_out.weight"),
        key_maps.latent_diffusion, _autoencoder_kl_config,
    ),
    Layout(
        "Stable Diffusion, SDXL, SD3 or FLUX.1", "diffusers'", "AutoencoderKL",
        ("encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight",
         "decoder.mid_block.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight",
         "decoder.conv_norm_out.weight"),
        key_maps.diffusers_names, _autoencoder_kl_config,
    ),
    Layout(
        "FLUX.2", "Black Forest Labs'", "AutoencoderKLFlux2",
        (*_FLUX2, "encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight",
         "decoder.mid.block_1.norm1.weight", "decoder.up.0.block.0.norm1.weight", "decoder.norm_out.weight"),
        key_maps.flux2, _flux2_config,
    ),
    Layout(
        "FLUX.2", "diffusers'", "AutoencoderKLFlux2",
        (*_FLUX2, "encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight",
         "decoder.mid_block.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight",
         "decoder.conv_norm_out.weight"),
        key_maps.diffusers_names, _flux2_config,
    ),
    Layout(
        "HunyuanVideo", "Tencent's and diffusers'", "AutoencoderKLHunyuanVideo",
        ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.mid_block.resnets.0.conv1.conv.weight",
         "decoder.up_blocks.0.resnets.0.conv1.conv.weight", "decoder.conv_norm_out.weight", "post_quant_conv.weight"),
        key_maps.diffusers_names, _hunyuan_video_config,
    ),
    Layout(
        "LTX-Video or LTX-2", "Lightricks'", "AutoencoderKLLTXVideo",
        ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight",
         "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "per_channel_statistics.mean-of-means",
         "per_channel_statistics.std-of-means"),
        key_maps.ltx, _ltx_or_ltx2_config,
    ),
    Layout(
        "LTX-Video or LTX-2", "diffusers'", "AutoencoderKLLTXVideo",
        ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight",
         "decoder.up_blocks.0.resnets.0.conv1.conv.weight", "latents_mean", "latents_std"),
        key_maps.diffusers_names, _ltx_or_ltx2_config,
    ),
)  # fmt: skip
"""All recognized layouts. If a file has the signatures of several, the longest signature decides."""

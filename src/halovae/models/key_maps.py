"""Maps from a file's parameter names to diffusers' names.

Each function takes the tensors of a file by name and returns the same tensors, or views of them, by diffusers' names.
Meta tensors suffice, so a file is recognized before it is read. For latent diffusion's names, diffusers' converter is
used. Its converters for Wan and LTX-Video only support the published numbers of blocks and widths, so those maps are
halovae's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby

from torch import Tensor

Tensors = Mapping[str, Tensor]

# For Wan-AI's wan/modules/vae.py and vae2_2.py: patterns and replacements, applied in order.
_WAN = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
# For Wan2.2-5B, which has nested blocks: each level but the last ends with a resampling.
_WAN22 = (
    *_WAN,
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.(resample|time_conv)\.", r".up_blocks.\1.upsampler.\3."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.(resample|time_conv)\.", r".down_blocks.\1.downsampler.\3."),
    (r"\.upsamples\.(\d+)\.upsamples\.", r".up_blocks.\1.resnets."),
    (r"\.downsamples\.(\d+)\.downsamples\.", r".down_blocks.\1.resnets."),
)
# For Lightricks' causal_video_autoencoder.py, without the numbers of blocks.
_LTX = (
    (r"\.res_blocks\.", ".resnets."),
    (r"\.conv_shortcut\.", ".conv_shortcut.conv."),
    (r"\.norm3\.norm\.", ".norm3."),
    (r"\.last_time_embedder\.", ".time_embedder."),
    (r"\.last_scale_shift_table$", ".scale_shift_table"),
    (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
    (r"^per_channel_statistics\.std-of-means$", "latents_std"),
)
_FLUX2 = ((r"^encoder\.quant_conv\.", "quant_conv."), (r"^decoder\.post_quant_conv\.", "post_quant_conv."))
# For attention projections in AutoencoderKL before diffusers 0.17.
_OLD_ATTENTION = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
# Statistics of latents that no decode uses.
_LTX_UNUSED = ("per_channel_statistics.channel", "per_channel_statistics.mean-of-stds")


def diffusers_names(tensors: Tensors) -> dict[str, Tensor]:
    """For files with current or older names of diffusers, and for HunyuanVideo, which has the same names."""
    return {_substituted(key, _OLD_ATTENTION): tensor for key, tensor in tensors.items()}


def wan(tensors: Tensors) -> dict[str, Tensor]:
    """For Wan2.1 and Qwen-Image: one list of residual blocks and resamplings; diffusers' decoder groups it by level."""
    levels: dict[str, str] = {}
    level = resnet = 0
    for index in _indices(tensors, "decoder.upsamples."):
        start = f"decoder.upsamples.{index}."
        if f"{start}resample.1.weight" in tensors:
            levels[start] = f"decoder.up_blocks.{level}.upsamplers.0."
            level, resnet = level + 1, 0
        else:
            levels[start] = f"decoder.up_blocks.{level}.resnets.{resnet}."
            resnet += 1
    for index in _indices(tensors, "encoder.downsamples."):
        levels[f"encoder.downsamples.{index}."] = f"encoder.down_blocks.{index}."
    return {_substituted(_moved(key, levels), _WAN): tensor for key, tensor in tensors.items()}


def wan22(tensors: Tensors) -> dict[str, Tensor]:
    """For Wan2.2-5B."""
    return {_substituted(key, _WAN22): tensor for key, tensor in tensors.items()}


def latent_diffusion(tensors: Tensors) -> dict[str, Tensor]:
    """For latent diffusion (CompVis), whose names Stable Diffusion and FLUX.1 kept, by diffusers' converter.

    Attention projections are 1x1 convolutions in the files, and matrices in diffusers. Parameters that the converter
    does not know keep their names.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = 1 + max([*_indices(tensors, "decoder.up."), *_indices(tensors, "encoder.down.")], default=0)
    blocks = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(tensors), blocks)
    used = {id(one if one._base is None else one._base) for one in converted.values()}
    return converted | {key: tensor for key, tensor in tensors.items() if id(tensor) not in used}


def flux2(tensors: Tensors) -> dict[str, Tensor]:
    """For FLUX.2: latent diffusion's names, with the outer convolutions inside the encoder and the decoder."""
    return latent_diffusion({_substituted(key, _FLUX2): tensor for key, tensor in tensors.items()})


def ltx(tensors: Tensors) -> dict[str, Tensor]:
    """For LTX-Video and LTX-2: one list of blocks of three kinds, which diffusers groups.

    A block of `res_blocks` ends a level of the decoder and begins one of the encoder; the decoder's first and the
    encoder's last are the middle blocks. Between them are resamplings (`conv`) and changes of width (`conv1`, `conv2`).
    """
    levels: dict[str, str] = {}
    level = -1
    for index in _indices(tensors, "decoder.up_blocks."):
        start = f"decoder.up_blocks.{index}."
        kind = _ltx_kind(tensors, start)
        if level < 0 and kind == "resnets":
            levels[start] = "decoder.mid_block."
            level = 0
        elif kind == "resnets":
            levels[start] = f"decoder.up_blocks.{level}."
            level += 1
        else:
            levels[start] = f"decoder.up_blocks.{level}.{'upsamplers.0' if kind == 'resampling' else 'conv_in'}."
    level = -1
    downs = _indices(tensors, "encoder.down_blocks.")
    for index in downs:
        start = f"encoder.down_blocks.{index}."
        kind = _ltx_kind(tensors, start)
        if kind == "resnets":
            level += 1
            levels[start] = "encoder.mid_block." if index == downs[-1] else f"encoder.down_blocks.{level}."
        else:
            levels[start] = f"encoder.down_blocks.{level}.{'downsamplers.0' if kind == 'resampling' else 'conv_out'}."
    return {
        _substituted(_moved(key, levels), _LTX): tensor
        for key, tensor in tensors.items()
        if not key.startswith(_LTX_UNUSED)
    }


def _ltx_kind(tensors: Tensors, start: str) -> str:
    if f"{start}res_blocks.0.conv1.conv.weight" in tensors:
        return "resnets"
    return "width" if f"{start}conv1.conv.weight" in tensors else "resampling"


def _indices(tensors: Tensors, start: str) -> list[int]:
    """The numbers that follow `start`, in order."""
    heads = (key[len(start) :].split(".", 1)[0] for key in tensors if key.startswith(start))
    return sorted({int(head) for head, _ in groupby(heads) if head.isdigit()})


def _moved(key: str, levels: Mapping[str, str]) -> str:
    """Replace the first three words of `key`, which end with the number of its block."""
    start = ".".join(key.split(".")[:3]) + "."
    return levels.get(start, start) + key[len(start) :] if key.startswith(start) else key


def _substituted(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, words in rules:
        key = re.sub(pattern, words, key)
    return key

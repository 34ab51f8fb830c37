"""Tiny pipelines of Wan and Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halovae.models.architectures import random_vae
from halovae.pipelines.tiny.text import TEXT_DIM, bpe, processor, qwen25vl, t5_tokenizer

_VAE_WIDTH = 8


def transformer(family: str, in_channels: int = 16, out_channels: int = 16) -> Any:
    """Build a transformer of two layers, "wan" or "qwen-image", with seeded random weights."""
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    torch.manual_seed(0)
    if family == "qwen-image":
        return QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(4, 6, 6),
        ).eval()
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()


def _wan(family: str, image_to_video: bool = False, **options: Any) -> Any:
    """Build a `WanPipeline` or `WanImageToVideoPipeline` with a tokenizer of single characters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    channels = 48 if family == "wan2.2-5b" else 16
    # Input channels for the first frame's latents and a mask of the given frames, besides the noise.
    extra = channels + 4 if image_to_video else 0
    return (WanImageToVideoPipeline if image_to_video else WanPipeline)(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=random_vae(family, _VAE_WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer("wan", channels + extra, channels),
        **options,
    )


def _qwen(name: str, edit: bool) -> Any:
    """Build the Qwen-Image pipeline called `name` in diffusers."""
    import diffusers

    components = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": random_vae("qwen-image", _VAE_WIDTH),
        "transformer": transformer("qwen-image"),
    }
    pipeline = getattr(diffusers, name)
    unset = {"text_encoder": None, "tokenizer": None, **({"processor": None} if edit else {})}
    template = pipeline(**components, **unset).prompt_template_encode
    tokenizer = bpe(template)
    if edit:
        components["processor"] = processor(tokenizer)
    return pipeline(**components, text_encoder=qwen25vl(tokenizer), tokenizer=tokenizer)


# By name of the VAE's family, except for Wan2.2-A14B, which has two transformers and Wan2.1's VAE.
MODELS: dict[str, Callable[[], Any]] = {
    "wan2.1": lambda: _wan("wan2.1"),
    "wan2.1-i2v": lambda: _wan("wan2.1", image_to_video=True),
    "wan2.2": lambda: _wan("wan2.1", transformer_2=transformer("wan"), boundary_ratio=0.875),
    "wan2.2-5b": lambda: _wan("wan2.2-5b", expand_timesteps=True),
    "qwen-image": lambda: _qwen("QwenImagePipeline", edit=False),
    "qwen-image-edit": lambda: _qwen("QwenImageEditPipeline", edit=True),
    "qwen-image-edit-plus": lambda: _qwen("QwenImageEditPlusPipeline", edit=True),
}

"""Tiny diffusers pipelines that are given their prompts as embeddings."""

from typing import Any

import torch
from samples import vae

from halovae.pipelines.tiny import TEXT_DIM, transformer


def wan_image_to_video() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae("wan2.1"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer("wan", in_channels=36),
    )


def qwen_image_edit() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline

    return QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae("qwen-image"),
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=transformer("qwen-image"),
    )


def embeddings(tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Made-up prompt embeddings `[1, tokens, TEXT_DIM]`."""
    return torch.randn(1, tokens, TEXT_DIM, generator=torch.Generator().manual_seed(seed))

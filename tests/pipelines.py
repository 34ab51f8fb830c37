"""Tiny but complete diffusers pipelines on random weights, made without a hub."""

from pathlib import Path
from typing import Any

import torch
from models import vae

TEXT_DIM = 32


def _wan_transformer(in_channels: int) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()


def _qwen_transformer() -> Any:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def make_wan(folder: Path) -> None:
    """Save a `WanPipeline` with a tokenizer of single characters."""
    from diffusers import WanPipeline
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=vae("wan2.1"),
        scheduler=_scheduler(),
        transformer=_wan_transformer(16),
    )
    pipe.save_pretrained(folder)


def make_qwen_image(folder: Path) -> None:
    """Save a `QwenImagePipeline` with a tokenizer of single bytes."""
    from diffusers import QwenImagePipeline
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: index for index, piece in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    text = {
        "vocab_size": 300, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_DIM,
    }  # fmt: skip
    special_ids = {
        "image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special_ids)
    pipe = QwenImagePipeline(
        scheduler=_scheduler(),
        vae=vae("qwen-image"),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=_qwen_transformer(),
    )
    pipe.save_pretrained(folder)


def wan_image_to_video() -> Any:
    """A `WanImageToVideoPipeline` that is given its prompts as embeddings."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae("wan2.1"),
        scheduler=_scheduler(),
        transformer=_wan_transformer(36),
    )


def qwen_image_edit() -> Any:
    """A `QwenImageEditPipeline` that is given its prompts as embeddings."""
    from diffusers import QwenImageEditPipeline

    return QwenImageEditPipeline(
        scheduler=_scheduler(),
        vae=vae("qwen-image"),
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=_qwen_transformer(),
    )


def embeddings(tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Made-up prompt embeddings `[1, tokens, TEXT_DIM]`."""
    return torch.randn(1, tokens, TEXT_DIM, generator=torch.Generator().manual_seed(seed))

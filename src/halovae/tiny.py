"""Complete pipelines on random weights, a few megabytes each: for trying things without a checkpoint.

Diffusers layout and the true architectures, with fewer layers and channels. What comes out is noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halovae.bench.models import random_vae
from halovae.integrations.diffusers import do_without_torchvision

TEXT_DIM = 32
_VAE_WIDTH = 8
# Tokens that Qwen's templates hold whole.
_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
_QWEN_VOCABULARY = 1000


def transformer(family: str, in_channels: int = 16, out_channels: int = 16) -> Any:
    """A transformer of two layers, "wan" or "qwen-image", on seeded random weights."""
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
    """A `WanPipeline` or `WanImageToVideoPipeline` with a tokenizer of single characters."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    channels = 48 if family == "wan2.2-5b" else 16
    # The first frame's latents, and which frames are given, come beside the noise.
    given = channels + 4 if image_to_video else 0
    return (WanImageToVideoPipeline if image_to_video else WanPipeline)(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=random_vae(family, _VAE_WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer("wan", channels + given, channels),
        **options,
    )


def _qwen(name: str, edit: bool) -> Any:
    """The Qwen-Image pipeline called `name` in diffusers."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": random_vae("qwen-image", _VAE_WIDTH),
        "transformer": transformer("qwen-image"),
    }
    pipeline = getattr(diffusers, name)
    unset = {"text_encoder": None, "tokenizer": None, **({"processor": None} if edit else {})}
    template = pipeline(**parts, **unset).prompt_template_encode
    tokenizer = _bpe(template)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end", "image_pad")}
    common = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    text = {
        "vocab_size": _QWEN_VOCABULARY, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, **common,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_DIM,
    }  # fmt: skip
    named = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named, **common)
    ).eval()
    processor = {"processor": _processor(tokenizer)} if edit else {}
    return pipeline(**parts, text_encoder=encoder, tokenizer=tokenizer, **processor)


def _bpe(template: str) -> Any:
    """A tokenizer that knows the words of a prompt template.

    The pipelines cut the template's first tokens off by their number, which is the true vocabulary's: a word must
    be one token here as it is there.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    words = template
    for token in _SPECIAL:
        words = words.replace(token, "")
    trainer = trainers.BpeTrainer(
        vocab_size=_QWEN_VOCABULARY - len(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([words.replace("{}", "")], trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = {**model["vocab"], **{token: len(model["vocab"]) + index for index, token in enumerate(_SPECIAL)}}
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=_SPECIAL)


def _processor(tokenizer: Any) -> Any:
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    do_without_torchvision()
    return Qwen2VLProcessor(image_processor=Qwen2VLImageProcessorPil(), tokenizer=tokenizer)


# By name: as the VAE's families are called, but for Wan2.2-A14B, which has two transformers and Wan2.1's VAE.
MODELS: dict[str, Callable[[], Any]] = {
    "wan2.1": lambda: _wan("wan2.1"),
    "wan2.1-i2v": lambda: _wan("wan2.1", image_to_video=True),
    "wan2.2": lambda: _wan("wan2.1", transformer_2=transformer("wan"), boundary_ratio=0.875),
    "wan2.2-5b": lambda: _wan("wan2.2-5b", expand_timesteps=True),
    "qwen-image": lambda: _qwen("QwenImagePipeline", edit=False),
    "qwen-image-edit": lambda: _qwen("QwenImageEditPipeline", edit=True),
    "qwen-image-edit-plus": lambda: _qwen("QwenImageEditPlusPipeline", edit=True),
}


def make_model(name: str, folder: Path) -> None:
    """Save a pipeline in diffusers layout.

    Args:
        name: one of `MODELS`.
        folder: where to; made if it is not there.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    MODELS[name]().save_pretrained(folder)

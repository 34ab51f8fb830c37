"""Tokenizers and small text encoders that tiny pipelines share, made without a download."""

from __future__ import annotations

import json
from typing import Any

import torch

from halovae.pipelines.diffusers import do_without_torchvision

TEXT_DIM = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz,."
# Special tokens in Qwen's templates.
_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
_VOCABULARY = 1000
# Messages of a chat, whether their content is a string or a list of parts.
_CHAT = (
    "{%- for message in messages %}{{ start }}{{ message['role'] }}{{ middle }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{ part['text'] }}{%- endfor %}{%- endif %}"
    "{{ end }}{%- endfor %}{%- if add_generation_prompt %}{{ start }}assistant{{ middle }}{%- endif %}"
)


def t5_tokenizer() -> Any:
    """A T5 tokenizer of single characters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def t5(dim: int = TEXT_DIM, vocabulary: int = 64) -> Any:
    """A T5 encoder of one layer."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, d_model=dim, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def byt5() -> tuple[Any, Any]:
    """ByT5's tokenizer of bytes, and an encoder."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(), t5(vocabulary=384)


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single characters."""
    from transformers import CLIPTokenizer

    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(projected: bool = False) -> Any:
    """A CLIP text encoder of two layers; `projected`: with a projection, as the second one of SDXL has."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(int(projected))
    end = 2 * len(_LETTERS) + 1
    config = CLIPTextConfig(
        vocab_size=end + 1, hidden_size=TEXT_DIM, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=TEXT_DIM, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def bpe(template: str, cls: str = "Qwen2Tokenizer", chat: bool = False) -> Any:
    """A tokenizer that knows the words of a prompt template.

    Pipelines cut off a fixed number of the template's first tokens. The number belongs to the true vocabulary, so each
    word must be one token here, as it is there.

    Args:
        template: the text with the words.
        cls: "Qwen2Tokenizer", or "PreTrainedTokenizerFast" with Llama's special tokens.
        chat: whether to add a chat template.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    qwen = cls == "Qwen2Tokenizer"
    special = _QWEN_TOKENS if qwen else _LLAMA_TOKENS
    splitter = transformers.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    words = template
    for token in special:
        words = words.replace(token, "")
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([words.replace("{}", "")], trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = {**model["vocab"], **{token: len(model["vocab"]) + index for index, token in enumerate(special)}}
    merges = [tuple(merge) for merge in model["merges"]]
    if qwen:
        tokenizer = transformers.Qwen2Tokenizer(
            vocab=vocabulary, merges=merges, additional_special_tokens=list(special)
        )
        marks = {"start": "<|im_start|>", "middle": "\n", "end": "<|im_end|>\n"}
    else:
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=special[0], eos_token=special[3], pad_token=special[4],
            additional_special_tokens=list(special[1:3]),
        )  # fmt: skip
        marks = {"start": "<|start_header_id|>", "middle": "<|end_header_id|>\n\n", "end": "<|eot_id|>"}
    if chat:
        tokenizer.chat_template = chat_template(**marks)
    return tokenizer


def chat_template(**marks: str) -> str:
    """A Jinja chat template, with `marks` at the `start`, in the `middle`, and at the `end` of a message."""
    template = _CHAT
    for name, text in marks.items():
        template = template.replace("{{ " + name + " }}", text)
    return template


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer of single characters."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS]
    return GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])


def decoder_config(layers: int = 1, vocabulary: int = _VOCABULARY, **more: Any) -> dict[str, Any]:
    """The config that all decoder-only text encoders share."""
    return {
        "vocab_size": vocabulary, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, **more,
    }  # fmt: skip


def qwen25vl(tokenizer: Any, layers: int = 1, cls: str = "Qwen2_5_VL") -> Any:
    """Build Qwen2.5-VL, or Qwen2-VL for `cls="Qwen2VL"`."""
    import transformers

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    common = {"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = decoder_config(layers, **common, rope_parameters=rope)
    vision: dict[str, Any] = {"depth": 1, "num_heads": 2}
    if cls == "Qwen2_5_VL":
        vision |= {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": TEXT_DIM}
    else:
        vision |= {"embed_dim": 32, "hidden_size": TEXT_DIM}
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
    config = getattr(transformers, f"{cls}Config")(text_config=text, vision_config=vision, **named, **common)
    return getattr(transformers, f"{cls}ForConditionalGeneration")(config).eval()


def processor(tokenizer: Any, cls: str = "Qwen2VLProcessor") -> Any:
    """Build Qwen's processor of pictures and text."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    do_without_torchvision()
    made = getattr(transformers, cls)
    return made(image_processor=Qwen2VLImageProcessorPil(), tokenizer=tokenizer, chat_template=tokenizer.chat_template)

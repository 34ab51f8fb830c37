"""Tiny pipelines for videos: HunyuanVideo, LTX, CogVideoX, Mochi, Cosmos, Allegro, EasyAnimate, Kandinsky."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halovae.pipelines.tiny import text
from halovae.pipelines.tiny.components import flow, made, vae, vae_of
from halovae.pipelines.tiny.text import TEXT_DIM

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_T5: dict[str, Callable[[], Any]] = {"text_encoder": text.t5, "tokenizer": text.t5_tokenizer}


def _of_t5(pipeline: str, vae: Any, transformer: Any, scheduler: Any, **more: Any) -> Any:
    """Build a pipeline whose only text encoder is a T5."""
    import diffusers

    encoders = {name: make() for name, make in _T5.items()}
    return getattr(diffusers, pipeline)(vae=vae, transformer=transformer, scheduler=scheduler, **encoders, **more)


def _hunyuan_video() -> Any:
    import diffusers
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    tokenizer = text.bpe(DEFAULT_PROMPT_TEMPLATE["template"], "PreTrainedTokenizerFast")
    torch.manual_seed(0)
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**text.decoder_config(3))).eval(),
        tokenizer=tokenizer,
        transformer=made(
            "HunyuanVideoTransformer3DModel", **_HEADS, in_channels=4, out_channels=4, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=vae("AutoencoderKLHunyuanVideo", scaling_factor=0.476986),
        scheduler=flow(shift=7.0),
        text_encoder_2=text.clip(),
        tokenizer_2=text.clip_tokenizer(),
    )  # fmt: skip


def _hunyuan_video_15() -> Any:
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    byt5_tokenizer, byt5 = text.byt5()
    pipeline = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=made(
            "HunyuanVideo15Transformer3DModel", **_HEADS, in_channels=9, out_channels=4, num_layers=1,
            num_refiner_layers=1, text_embed_dim=TEXT_DIM, text_embed_2_dim=TEXT_DIM, image_embed_dim=16,
            rope_axes_dim=(4, 6, 6), target_size=64, task_type="t2v",
        ),
        vae=vae("AutoencoderKLHunyuanVideo15", scaling_factor=1.03682),
        scheduler=flow(shift=5.0),
        text_encoder_2=byt5,
        tokenizer_2=byt5_tokenizer,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    tokenizer = text.bpe(pipeline.system_message, chat=True)
    encoder = text.qwen25vl(tokenizer, layers=3).model.language_model
    pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def _ltx() -> Any:
    return _of_t5(
        "LTXPipeline",
        vae("AutoencoderKLLTXVideo (0.9.5)"),
        made(
            "LTXVideoTransformer3DModel", **_HEADS, in_channels=8, out_channels=8, num_layers=2,
            cross_attention_dim=32, caption_channels=TEXT_DIM,
        ),
        flow(),
    )  # fmt: skip


def _ltx2() -> Any:
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = text.gemma_tokenizer()
    layers = 1
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text.decoder_config(layers, len(tokenizer), head_dim=8), vision_config=vision,
        mm_tokens_per_image=4, image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = Gemma3ForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM, text_proj_in_factor=layers + 1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_type="split",
        rope_double_precision=False, causal_temporal_positioning=False, rope_theta=10000.0,
    ).eval()  # fmt: skip
    mel_bins, channels = 8, 2
    audio_vae = made(
        "AutoencoderKLLTX2Audio", base_channels=4, output_channels=channels, ch_mult=(1,), num_res_blocks=1,
        in_channels=channels, resolution=32, latent_channels=2, mel_bins=mel_bins,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=channels * mel_bins, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=flow(),
        vae=vae("AutoencoderKLLTX2Video"),
        audio_vae=audio_vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=made(
            "LTX2VideoTransformer3DModel", **_HEADS, in_channels=8, out_channels=8, num_layers=2,
            cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
            audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=TEXT_DIM, rope_type="split",
            rope_double_precision=False,
        ),
        vocoder=vocoder.eval(),
    )  # fmt: skip


def _cogvideox() -> Any:
    import diffusers

    return _of_t5(
        "CogVideoXPipeline",
        vae("AutoencoderKLCogVideoX", scaling_factor=0.7),
        made(
            "CogVideoXTransformer3DModel", **_HEADS, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=32,
            text_embed_dim=TEXT_DIM, sample_width=12, sample_height=8, sample_frames=9,
            use_rotary_positional_embeddings=True,
        ),
        diffusers.CogVideoXDPMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    )  # fmt: skip


def _mochi() -> Any:
    return _of_t5(
        "MochiPipeline",
        vae_of(
            "AutoencoderKLMochi", encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        ),
        made(
            "MochiTransformer3DModel", **_HEADS, in_channels=12, num_layers=2, pooled_projection_dim=16,
            text_embed_dim=TEXT_DIM, time_embed_dim=16,
        ),
        flow(),
    )  # fmt: skip


def _cosmos() -> Any:
    import diffusers

    from halovae.pipelines.tiny.safety import NoGuardrail

    return _of_t5(
        "CosmosTextToWorldPipeline",
        vae("AutoencoderKLCosmos (haar)"),
        made(
            "CosmosTransformer3DModel", **_HEADS, in_channels=4, out_channels=4, num_layers=2, mlp_ratio=2.0,
            text_embed_dim=TEXT_DIM, adaln_lora_dim=4, max_size=(16, 32, 32),
            concat_padding_mask=False,  # diffusers resizes the mask with torchvision, which may be missing
        ),
        diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon", final_sigmas_type="sigma_min"
        ),
        safety_checker=NoGuardrail(),
    )  # fmt: skip


def _allegro() -> Any:
    import diffusers

    return _of_t5(
        "AllegroPipeline",
        vae_of(
            "AutoencoderKLAllegro", block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
            sample_size=128, scaling_factor=0.13,
        ),
        made(
            "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=24, num_layers=1,
            cross_attention_dim=48, caption_channels=TEXT_DIM, sample_width=16, sample_height=16, sample_frames=6,
        ),
        diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="epsilon"),
    )  # fmt: skip


def _easyanimate() -> Any:
    import diffusers

    tokenizer = text.bpe("user assistant", chat=True)
    return diffusers.EasyAnimatePipeline(
        vae=vae("AutoencoderKLMagvit"),
        text_encoder=text.qwen25vl(tokenizer, layers=2, cls="Qwen2VL"),
        tokenizer=tokenizer,
        transformer=made(
            "EasyAnimateTransformer3DModel", **_HEADS, in_channels=4, out_channels=4, num_layers=2, mmdit_layers=2,
            time_embed_dim=16, text_embed_dim=TEXT_DIM, patch_size=2, sample_width=12, sample_height=8,
        ),
        scheduler=flow(),
    )  # fmt: skip


_KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_DIM, "in_text_dim2": TEXT_DIM, "time_dim": 16,
    "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}  # fmt: skip


def _kandinsky(pipeline: str, vae: Any, transformer: Any, template: str = "") -> Any:
    import diffusers

    made = getattr(diffusers, pipeline)(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=text.clip(),
        tokenizer_2=text.clip_tokenizer(),
        transformer=transformer,
        scheduler=flow(shift=5.0),
    )
    # The true vocabulary splits this word, too.
    tokenizer = text.bpe((template or made.prompt_template).replace("postprocessing", ""), chat=True)
    made.register_modules(text_encoder=text.qwen25vl(tokenizer), tokenizer=text.processor(tokenizer))
    return made


def _kandinsky5() -> Any:
    return _kandinsky(
        "Kandinsky5T2VPipeline",
        vae("AutoencoderKLHunyuanVideo", scaling_factor=0.476986),
        made("Kandinsky5Transformer3DModel", **_KANDINSKY, visual_cond=True),
    )


def _kandinsky6() -> Any:
    from diffusers.pipelines.kandinsky6 import pipeline_kandinsky6_ti2va

    return _kandinsky(
        "Kandinsky6TI2VAPipeline",
        vae("AutoencoderKLHunyuanVideo", scaling_factor=0.476986),
        made("Kandinsky6Transformer3DModel", **_KANDINSKY, visual_cond=True),
        pipeline_kandinsky6_ti2va._PROMPT_TEMPLATE,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "hunyuan-video": _hunyuan_video,
    "hunyuan-video-1.5": _hunyuan_video_15,
    "ltx-video": _ltx,
    "ltx-2": _ltx2,
    "cogvideox": _cogvideox,
    "mochi": _mochi,
    "cosmos": _cosmos,
    "allegro": _allegro,
    "easyanimate": _easyanimate,
    "kandinsky-5": _kandinsky5,
    "kandinsky-6": _kandinsky6,
}

"""Tiny pipelines for pictures: FLUX, Stable Diffusion, Sana, HunyuanImage, Qwen-Image-2.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halovae.pipelines.tiny import text
from halovae.pipelines.tiny.components import flow, made, vae, vae_of
from halovae.pipelines.tiny.text import TEXT_DIM

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _flux() -> Any:
    import diffusers

    return diffusers.FluxPipeline(
        scheduler=flow(),
        vae=vae("AutoencoderKL (no quant_conv)", scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.clip(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.t5(),
        tokenizer_2=text.t5_tokenizer(),
        transformer=made(
            "FluxTransformer2DModel", **_HEADS, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
        ),
    )  # fmt: skip


def _flux2_transformer(guided: bool) -> Any:
    return made(
        "Flux2Transformer2DModel", **_HEADS, in_channels=32, num_layers=1, num_single_layers=1,
        joint_attention_dim=3 * TEXT_DIM, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guided,
    )  # fmt: skip


def _flux2() -> Any:
    import diffusers
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = text.bpe(SYSTEM_MESSAGE, "PreTrainedTokenizerFast", chat=True)
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    # Thirty layers: the pipeline takes the outputs of the tenth, the twentieth, and the last.
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text.decoder_config(30, head_dim=8)}, vision_config=vision
    )
    return diffusers.Flux2Pipeline(
        scheduler=flow(),
        vae=vae("AutoencoderKLFlux2"),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(guided=True),
    )


def _flux2_klein() -> Any:
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(),
        vae=vae("AutoencoderKLFlux2"),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text.decoder_config(28, head_dim=8))).eval(),
        tokenizer=text.bpe("user assistant", chat=True),
        transformer=_flux2_transformer(guided=False),
    )


def _unet(**config: Any) -> Any:
    return made(
        "UNet2DConditionModel", block_out_channels=(8, 16), layers_per_block=1, sample_size=32, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )  # fmt: skip


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _sd15() -> Any:
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**side, "image_size": 32, "patch_size": 16}, projection_dim=16)
    )
    # No picture of noise comes near a concept.
    checker.concept_embeds_weights.fill_(1.0)
    checker.special_care_embeds_weights.fill_(1.0)
    return diffusers.StableDiffusionPipeline(
        vae=vae("AutoencoderKL"),
        text_encoder=text.clip(),
        tokenizer=text.clip_tokenizer(),
        unet=_unet(cross_attention_dim=TEXT_DIM, attention_head_dim=2),
        scheduler=diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=checker.eval(),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def _sdxl() -> Any:
    import diffusers

    return diffusers.StableDiffusionXLPipeline(
        vae=vae("AutoencoderKL", scaling_factor=0.13025),
        text_encoder=text.clip(),
        text_encoder_2=text.clip(projected=True),
        tokenizer=text.clip_tokenizer(),
        tokenizer_2=text.clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * TEXT_DIM, attention_head_dim=(2, 4), use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_DIM,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )  # fmt: skip


def _sd35() -> Any:
    import diffusers

    return diffusers.StableDiffusion3Pipeline(
        transformer=made(
            "SD3Transformer2DModel", **_HEADS, sample_size=32, patch_size=2, num_layers=2, in_channels=16,
            out_channels=16, joint_attention_dim=2 * TEXT_DIM, caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_DIM, pos_embed_max_size=96, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=flow(shift=3.0),
        vae=vae("AutoencoderKL (no quant_conv)", scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text.clip(projected=True),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.clip(projected=True),
        tokenizer_2=text.clip_tokenizer(),
        text_encoder_3=text.t5(2 * TEXT_DIM),
        tokenizer_3=text.t5_tokenizer(),
    )  # fmt: skip


def _sana() -> Any:
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = text.gemma_tokenizer()
    torch.manual_seed(0)
    config = Gemma2Config(**text.decoder_config(1, len(tokenizer), head_dim=8))
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config).eval(),
        vae=vae("AutoencoderDC (pixel shuffle)", scaling_factor=0.41407),
        transformer=made(
            "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=TEXT_DIM, sample_size=32, patch_size=1,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def _hunyuan_image() -> Any:
    import diffusers
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    byt5_tokenizer, byt5 = text.byt5()
    pipeline = diffusers.HunyuanImagePipeline(
        scheduler=flow(shift=5.0),
        vae=vae("AutoencoderKLHunyuanImage", scaling_factor=0.75289),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=byt5,
        tokenizer_2=byt5_tokenizer,
        transformer=made(
            "HunyuanImageTransformer2DModel", **_HEADS, in_channels=8, out_channels=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT_DIM, text_embed_2_dim=TEXT_DIM,
            rope_axes_dim=(8, 8),
        ),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )  # fmt: skip
    tokenizer = text.bpe(pipeline.prompt_template_encode)
    pipeline.register_modules(text_encoder=text.qwen25vl(tokenizer, layers=3), tokenizer=tokenizer)
    return pipeline


def _qwen_image_21() -> Any:
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = text.bpe("system user assistant", chat=True)
    named = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_DIM,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=text.decoder_config(1, head_dim=8, rope_parameters=rope), vision_config=vision, **named
    )
    return diffusers.QwenImage21Pipeline(
        scheduler=flow(),
        vae=vae_of(
            "AutoencoderKLQwenImage21", base_dim=4, decoder_base_dim=6, z_dim=8, dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1, temperal_downsample=[False, True, True, False], latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
        ),
        text_encoder=Qwen3VLForConditionalGeneration(config).eval(),
        processor=text.processor(tokenizer, "Qwen3VLProcessor"),
        transformer=made(
            "QwenImage21Transformer2DModel", **_HEADS, in_channels=8, out_channels=8, num_layers=1,
            context_in_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "flux.2": _flux2,
    "flux.2-klein": _flux2_klein,
    "sd1.5": _sd15,
    "sdxl": _sdxl,
    "sd3.5": _sd35,
    "sana": _sana,
    "hunyuan-image": _hunyuan_image,
    "qwen-image-2.1": _qwen_image_21,
}

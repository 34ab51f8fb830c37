"""Every autoencoder class of diffusers in a tiny configuration, for checks that must hold for all of them.

Architectures are the true ones (attention, temporal layers, every kind of block). Sizes are near those of diffusers'
own tests. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halovae.models.tiny_configs import (
    ASYMMETRIC,
    ATTENTION_2D,
    BLOCKS_2D,
    CONSISTENCY,
    COSMOS,
    DC,
    DC_CONV,
    DC_SHUFFLE,
    HUNYUAN_DCAE,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    KANDINSKY,
    LTX,
    LTX091,
    LTX095,
    LTX2,
    MINIMAX,
    MOCHI,
    QWEN21,
    RAE,
    SPATIAL,
    VIDTOK_FSQ,
    WAN,
    WAN22,
)

Direction = Literal["decode", "encode"]

LEFT_OUT: dict[str, str] = {
    "AutoencoderKLKVAEAudio": "audio",
    "AutoencoderKLLTX2Audio": "audio",
    "AutoencoderKLMiniMaxH3Audio": "audio",
    "AutoencoderOobleck": "audio",
    "AutoencoderSAME": "audio",
    "Cosmos3AVAEAudioTokenizer": "audio",
    "LongCatAudioDiTVae": "audio",
    "MMAudioVAE": "audio",
    "MMAudioVocoder": "audio",
    "MiniMaxMusic3Vocoder": "audio",
    "LTX2VideoDiffusionDecoderModel": "built on flex_attention, which a tensor subclass cannot intercept",
    "RFD4ProteinaAutoencoder": "proteins: no plane",
}
"""Classes in diffusers' folder of autoencoders that have no entry, and why."""

FALLBACKS: dict[tuple[str, Direction], dict[str, str]] = {
    ("AutoencoderRAE (mae)", "encode"): {"aten.gather.default": "tokens are shuffled by an index"},
}
"""Operators that no rule covers, by name of the entry and direction, and why they are called."""


@dataclass(frozen=True)
class Entry:
    """One tiny autoencoder, with the shapes of an example latent and an example picture or clip.

    Args:
        name: unique; the class, and the variant in parentheses if there are several.
        make: builds the module in eval mode and fp32, with random unseeded weights. It needs diffusers.
        latents: shape of a latent, its plane last; None if another entry covers the decode.
        pictures: shape of a picture or clip for `encode`, its plane last; None if there is nothing to encode.
        ratio: picture rows and cols per latent row and col.
        factor_fp32: the module computes sums, norms, or products in fp32, so fp64 is only exact to 1e-6.
        random: `decode` draws random numbers, from the same seed each time.
        quantized: `encode` or `decode` rounds to codes, so a value at the border of two codes may change.
    """

    name: str
    make: Callable[[], nn.Module]
    latents: tuple[int, ...] | None
    pictures: tuple[int, ...] | None
    ratio: int
    factor_fp32: bool = False
    random: bool = False
    quantized: bool = False

    @property
    def class_name(self) -> str:
        """The class, without the variant."""
        return self.name.split(" ")[0]

    @property
    def bound(self) -> float:
        """The largest error in fp64 that rounding explains, as `bench.on_grids.error` measures it."""
        return 1e-6 if self.factor_fp32 else 1e-12

    def shape(self, direction: Direction) -> tuple[int, ...] | None:
        """The shape of the input; None if that direction is not tried."""
        return self.latents if direction == "decode" else self.pictures

    def multiple(self, direction: Direction) -> int:
        """The number that divides the bounds of the input's shards."""
        return 1 if direction == "decode" else self.ratio


def _class(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config).eval()

    return make


def _allegro(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Callable[[], nn.Module]:
    """Allegro only runs in tiles: of `kernel` frames, rows, and cols of the clip, one every `stride`."""

    def make() -> nn.Module:
        import diffusers

        vae = diffusers.AutoencoderKLAllegro(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
        vae.use_tiling, vae.kernel, vae.stride = True, kernel, stride
        return vae.eval()

    return make


def _paella() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    return PaellaVQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=64).eval()


def _vidtok_chunks() -> nn.Module:
    """VidTok with frames in chunks, so that its causal caches carry over. A tile is larger than the plane."""
    import diffusers

    vae = diffusers.AutoencoderVidTok(ch=8, ch_mult=[1, 2, 2], num_res_blocks=1)
    vae.enable_tiling()
    vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 4, 1
    return vae.eval()


ENTRIES: tuple[Entry, ...] = (
    Entry("AutoencoderKL", _class("AutoencoderKL", **BLOCKS_2D), (1, 4, 5, 7), (1, 3, 20, 28), 4),
    Entry(
        "AutoencoderKL (no quant_conv)",  # as in SD3 and FLUX.1
        _class("AutoencoderKL", **BLOCKS_2D, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        (1, 16, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKL (attention blocks)",
        _class("AutoencoderKL", **ATTENTION_2D),
        (1, 4, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLFlux2",
        _class("AutoencoderKLFlux2", **BLOCKS_2D, decoder_block_out_channels=(8, 12, 16), latent_channels=8),
        (1, 8, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "AsymmetricAutoencoderKL", _class("AsymmetricAutoencoderKL", **ASYMMETRIC), (1, 4, 5, 7), (1, 3, 20, 28), 4
    ),
    Entry(
        "AutoencoderKLTemporalDecoder",  # the batch is the frames of one clip
        _class(
            "AutoencoderKLTemporalDecoder", down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 64),
            layers_per_block=2,  # with one, the attention of the decoder is never called
        ),
        (3, 4, 5, 7), (3, 3, 10, 14), 2,
    ),
    Entry(
        "AutoencoderTiny",
        _class(
            "AutoencoderTiny", encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 2), num_decoder_blocks=(2, 2, 1),
        ),
        (1, 4, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "VQModel",
        _class("VQModel", **BLOCKS_2D, num_vq_embeddings=64),
        (1, 3, 5, 7), (1, 3, 20, 28), 4, quantized=True,
    ),
    Entry(
        "VQModel (spatial norm)",  # as in Kandinsky 2, whose pipelines don't quantize
        _class("VQModel", **SPATIAL, latent_channels=4, num_vq_embeddings=64, norm_type="spatial"),
        (1, 4, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry("PaellaVQModel", _paella, (1, 4, 5, 7), (1, 3, 20, 28), 4),
    Entry(
        "AutoencoderDC (conv)", _class("AutoencoderDC", **DC, **DC_CONV), (1, 4, 5, 7), (1, 3, 20, 28), 4,
        factor_fp32=True,
    ),
    Entry(
        "AutoencoderDC (pixel shuffle)",
        _class("AutoencoderDC", **DC, **DC_SHUFFLE),
        (1, 4, 5, 7), (1, 3, 20, 28), 4, factor_fp32=True,
    ),
    Entry(
        "AutoencoderKLKVAE",
        _class("AutoencoderKLKVAE", channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 2)),
        (1, 4, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLHunyuanImage",
        _class("AutoencoderKLHunyuanImage", **HUNYUAN_IMAGE),
        (1, 8, 5, 7), (1, 3, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLHunyuanImageRefiner",  # keeps the number of frames
        _class("AutoencoderKLHunyuanImageRefiner", **HUNYUAN_DCAE),
        (1, 4, 3, 5, 7), (1, 3, 3, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLHunyuanVideo",
        _class("AutoencoderKLHunyuanVideo", **HUNYUAN_VIDEO),
        (1, 4, 3, 5, 7), (1, 3, 9, 40, 56), 8,
    ),
    Entry(
        "AutoencoderKLHunyuanVideo15",
        _class("AutoencoderKLHunyuanVideo15", **HUNYUAN_DCAE),
        (1, 4, 3, 5, 7), (1, 3, 5, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLQwenImage", _class("AutoencoderKLQwenImage", **WAN), (1, 4, 3, 5, 7), (1, 3, 9, 40, 56), 8
    ),
    Entry(
        "AutoencoderKLQwenImage21",  # one frame, and four channels
        _class("AutoencoderKLQwenImage21", **QWEN21),
        (1, 8, 1, 5, 7), (1, 4, 1, 20, 28), 4,
    ),
    Entry(
        "AutoencoderKLWan (2.1)", _class("AutoencoderKLWan", **WAN), (1, 4, 3, 5, 7), (1, 3, 9, 40, 56), 8
    ),
    Entry(
        "AutoencoderKLWan (2.2)", _class("AutoencoderKLWan", **WAN22), (1, 4, 3, 5, 7), (1, 3, 9, 80, 112), 16
    ),
    Entry(
        "AutoencoderKLLTXVideo (0.9.0)",
        _class("AutoencoderKLLTXVideo", **LTX),
        (1, 8, 3, 5, 7), (1, 3, 9, 40, 56), 8, factor_fp32=True,
    ),
    Entry(
        "AutoencoderKLLTXVideo (timestep)",
        _class("AutoencoderKLLTXVideo", **LTX091),
        (1, 8, 2, 5, 7), (1, 3, 9, 40, 56), 8, factor_fp32=True,
    ),
    Entry(
        "AutoencoderKLLTXVideo (0.9.1, noise)",
        _class("AutoencoderKLLTXVideo", **{**LTX091, "decoder_inject_noise": (True, True, True, False)}),
        (1, 8, 2, 5, 7), (1, 3, 9, 40, 56), 8, factor_fp32=True, random=True,
    ),
    Entry(
        "AutoencoderKLLTXVideo (0.9.5)",
        _class("AutoencoderKLLTXVideo", **LTX095),
        (1, 8, 2, 5, 7), (1, 3, 9, 40, 56), 8, factor_fp32=True,
    ),
    Entry(
        "AutoencoderKLLTX2Video",
        _class("AutoencoderKLLTX2Video", **LTX2),
        (1, 8, 2, 5, 7), (1, 3, 9, 40, 56), 8,
    ),
    Entry(
        "AutoencoderKLCogVideoX",  # chunks of three and two latent frames, so caches carry over
        _class(
            "AutoencoderKLCogVideoX", block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
            norm_num_groups=2,
        ),
        (1, 4, 5, 5, 7), (1, 3, 17, 40, 56), 8,
    ),
    Entry("AutoencoderKLMochi", _class("AutoencoderKLMochi", **MOCHI), (1, 4, 2, 5, 7), (1, 3, 7, 20, 28), 4),
    Entry(
        "AutoencoderKLCosmos (haar)", _class("AutoencoderKLCosmos", **COSMOS), (1, 4, 2, 5, 7), (1, 3, 9, 40, 56), 8
    ),
    Entry(
        "AutoencoderKLCosmos (rearrange)",
        _class("AutoencoderKLCosmos", **COSMOS, patch_type="rearrange"),
        (1, 4, 2, 5, 7), (1, 3, 9, 40, 56), 8,
    ),
    Entry(
        "AutoencoderKLMagvit",
        _class(
            "AutoencoderKLMagvit", block_out_channels=[8, 8, 8, 8], latent_channels=4, layers_per_block=1,
            norm_num_groups=4,
        ),
        (1, 4, 3, 5, 7), (1, 3, 9, 40, 56), 8,
    ),
    Entry(
        "AutoencoderKLAllegro (one tile)",  # gives frames before channels, takes channels before frames
        _allegro((8, 40, 56), (8, 40, 56)),
        (1, 4, 2, 5, 7), (1, 3, 8, 40, 56), 8,
    ),
    Entry(
        "AutoencoderKLAllegro (tiles)",
        _allegro((8, 24, 40), (4, 16, 16)),
        (1, 4, 3, 5, 7), (1, 3, 12, 40, 56), 8,
    ),
    Entry(
        "AutoencoderVidTok (causal)",  # `encode` takes the 9 frames of the decoded clip after 3 copies of the first
        _class("AutoencoderVidTok", ch=8, ch_mult=[1, 2, 2], num_res_blocks=1),
        (1, 4, 3, 5, 7), (1, 3, 12, 20, 28), 4,
    ),
    Entry("AutoencoderVidTok (causal, chunks)", _vidtok_chunks, (1, 4, 3, 5, 7), (1, 3, 12, 20, 28), 4),
    Entry(
        "AutoencoderVidTok (fsq)",  # not causal: whole chunks of four latent frames
        _class("AutoencoderVidTok", **VIDTOK_FSQ),
        (1, 6, 4, 5, 7), (1, 3, 16, 20, 28), 4, quantized=True,
    ),
    Entry(
        "AutoencoderKLKVAEVideo",  # segments of five and two latent frames, so caches carry over
        _class("AutoencoderKLKVAEVideo", ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4),
        (1, 4, 7, 5, 7), (1, 3, 25, 20, 28), 4,
    ),
    Entry(
        "Kandinsky6SRVAE",  # segments of five and one latent frames, so caches carry over
        _class("Kandinsky6SRVAE", **KANDINSKY),
        (1, 4, 6, 5, 7), (1, 3, 21, 40, 56), 8, factor_fp32=True,
    ),
    Entry(
        "ConsistencyDecoderVAE", _class("ConsistencyDecoderVAE", **CONSISTENCY), (1, 4, 5, 7), (1, 3, 20, 28), 4,
        random=True,
    ),
    Entry("AutoencoderRAE (dinov2)", _class("AutoencoderRAE", **RAE), (1, 64, 5, 5), (1, 3, 80, 80), 16),
    Entry("AutoencoderRAE (mae)", _class("AutoencoderRAE", **RAE, encoder_type="mae"), None, (1, 3, 80, 80), 16),
    Entry(
        "AutoencoderKLMiniMaxH3",  # the fewest latent frames that it takes; tiling is on, and a tile exceeds the plane
        _class("AutoencoderKLMiniMaxH3", **MINIMAX),
        (1, 4, 7, 5, 7), (1, 3, 22, 20, 28), 4, factor_fp32=True,
    ),
)  # fmt: skip


def _perturb(module: nn.Module) -> None:
    """Add noise to every weight, in place: a gain of one or a projection of zero would hide errors."""
    for name, weight in module.named_parameters():
        inputs = weight[0].numel() if weight.dim() > 1 else 1
        scale = 0.5 * inputs**-0.5 if inputs > 1 else 0.1
        if "quantize" in name:  # a codebook as wide as the latents
            scale = 1.0
        weight.add_(scale * torch.randn(weight.shape))
    for name, buffer in module.named_buffers():  # statistics, which a checkpoint holds; the others are constants
        if name.endswith(("mean", "means")):
            buffer.add_(0.1 * torch.randn(buffer.shape))
        elif name.endswith(("var", "std", "stds")):
            buffer.mul_(torch.rand(buffer.shape) + 0.5)


def build(entry: Entry, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Build the autoencoder of `entry` in eval mode, without gradients, every weight away from its initial value.

    Args:
        entry: one of `ENTRIES`.
        dtype: the weights are drawn in fp32, then cast, so equal seeds give equal weights up to rounding.
        seed: equal seeds give equal weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = entry.make().eval().requires_grad_(False)
        _perturb(module)
    return nn.Module.to(module, dtype)  # not the model's own `to`, which warns about weights meant to stay fp32


def decode(module: nn.Module, latents: Tensor) -> Tensor:
    """Decode latents by the module's own `decode`. If it draws noise, the noise is seeded."""
    vae: Any = module
    name = type(module).__name__
    if name == "AutoencoderKLTemporalDecoder":
        return vae.decode(latents, num_frames=latents.shape[0]).sample
    if name == "VQModel":
        return vae.decode(latents, force_not_quantize=vae.config.norm_type == "spatial").sample
    if name == "ConsistencyDecoderVAE":
        return vae.decode(latents, generator=torch.Generator().manual_seed(0)).sample
    if name == "AutoencoderKLLTXVideo" and vae.config.timestep_conditioning:
        timestep = torch.full((latents.shape[0],), 0.05, dtype=latents.dtype, device=latents.device)
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):  # `decode` takes no generator
            torch.manual_seed(0)
            return vae.decode(latents, temb=timestep).sample
    pictures = vae.decode(latents)
    return pictures if isinstance(pictures, Tensor) else pictures.sample


def encode(module: nn.Module, pictures: Tensor) -> Tensor:
    """Encode pictures or a clip by the module's own `encode`: return latents, or the moments of their distribution."""
    vae: Any = module
    out = vae.encode(pictures)
    if isinstance(out, tuple):  # quantized latents, and indices
        return out[0]
    for name in ("latents", "latent"):
        if hasattr(out, name):
            return getattr(out, name)
    return out.latent_dist.parameters


CALLS: dict[Direction, Callable[[nn.Module, Tensor], Tensor]] = {"decode": decode, "encode": encode}

"""Models of the true architecture on random weights, for measuring where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch

from halovae.models.wan import WanConfig

_WAN22 = {
    "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
# Per family: diffusers' class, the sizes that are not its defaults, and the true widths (encoder, decoder).
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "wan2.1": ("AutoencoderKLWan", {}, (96, 96)),
    "wan2.2-5b": ("AutoencoderKLWan", _WAN22, (160, 256)),
    "qwen-image": ("AutoencoderKLQwenImage", {}, (96, 96)),
}


def random_vae(family: str, width: int | None = None, seed: int = 0) -> Any:
    """A diffusers VAE with seeded random weights, its norms away from their initial ones, where errors would hide.

    Args:
        family: a name in `FAMILIES`.
        width: channels of the last level instead of the true ones, for a small model of the same architecture.
        seed: equal seeds make equal weights.

    Raises:
        ValueError: an unknown family.
    """
    import diffusers

    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    name, sizes, (encoder, decoder) = FAMILIES[family]
    sizes = {**sizes, "base_dim": width or encoder}
    if encoder != decoder:
        sizes["decoder_base_dim"] = width or decoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = getattr(diffusers, name)(**sizes).eval().requires_grad_(False)
        for key, weight in vae.named_parameters():
            if key.endswith("gamma"):
                weight.add_(0.2 * torch.randn(weight.shape))
    return vae


def named_config(family: str) -> WanConfig:
    """The true sizes of a family in `FAMILIES`."""
    import diffusers

    name, sizes, (encoder, decoder) = FAMILIES[family]
    widths = {"base_dim": encoder, **({"decoder_base_dim": decoder} if encoder != decoder else {})}
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**sizes, **widths)
    return WanConfig.from_diffusers({**vae.config, "_class_name": name})

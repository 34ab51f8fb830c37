"""Properties of diffusers' autoencoder classes that their signatures do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halovae.models.load import CLASSES, config_of
from halovae.models.registry import traits_of
from halovae.models.wan import WanConfig
from halovae.plane.keys import hooked

_CHANNELS = ("latent_channels", "z_dim", "z_channels", "vq_embed_dim", "encoder_hidden_size")
FIELDS = ("sample", "latent_dist", "latent", "latents")  # fields of what diffusers' autoencoders return


def sizes_of(vae: nn.Module) -> WanConfig | None:
    """Return the sizes of a Wan or Qwen-Image autoencoder; None for other classes.

    Raises:
        CheckpointError: the config lacks a size.
    """
    name = type(vae).__name__
    return config_of({**getattr(vae, "config", {}), "_class_name": name}, name) if name in CLASSES else None


def _config(vae: nn.Module) -> Mapping[str, Any]:
    config = getattr(vae, "config", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def latent_channels(vae: nn.Module) -> int | None:
    """The number of latent channels; None if the config does not give it."""
    config = _config(vae)
    if (channels := traits_of(type(vae)).channels) is not None:
        return channels
    return next((int(config[key]) for key in _CHANNELS if config.get(key)), None)


def spatial_ratio(vae: nn.Module) -> int | None:
    """Picture rows per latent row; None if the config does not give it."""
    config = _config(vae)
    if (sizes := sizes_of(vae)) is not None:
        return sizes.spatial_factor
    if (spatial := traits_of(type(vae)).spatial) is not None:
        return spatial
    for key in ("spatial_compression_ratio", "scale_factor_spatial"):
        for values in (config, vars(vae)):
            if isinstance(values.get(key), int):
                return int(values[key])
    for key in ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels", "ch_mult"):
        if config.get(key):
            return int(2 ** (len(config[key]) - 1))
    return None


def makes_clips(vae: nn.Module) -> bool:
    """Whether latents have frames."""
    decoder = getattr(vae, "decoder", vae)
    return any(isinstance(module, nn.Conv3d) for module in decoder.modules()) or traits_of(type(vae)).batched


def takes_frames(vae: nn.Module) -> bool:
    """Whether latents are `[B, C, T, H, W]`, also where they always have one frame."""
    traits = traits_of(type(vae))
    return not traits.batched and (makes_clips(vae) or traits.one_frame)


def moved(vae: nn.Module, x: Tensor) -> Tensor:
    """Move a tensor to an autoencoder's device and dtype, unless hooks move or cast the weights."""
    weight = next(vae.parameters())
    return x if weight.is_meta or next(hooked(vae), None) is not None else x.to(weight.device, weight.dtype)


def decode_options(vae: Any, latents: Tensor) -> dict[str, Any]:
    """Return what an autoencoder's `decode` needs besides latents: LTX-Video's timestep, 0 as in its pipelines."""
    if getattr(vae.config, "timestep_conditioning", False):
        return {"temb": next(vae.parameters()).new_zeros(latents.shape[0])}
    return {}


def denormalized(latents: Tensor, config: Any, name: str) -> Tensor:
    """Convert a pipeline's latents to latents that its VAE takes, in fp32 at least.

    If the config has a `latents_mean` and no `scaling_factor` (Wan, Qwen-Image), pipelines multiply by `latents_std`
    and add `latents_mean`. Others divide by `scaling_factor` and add `shift_factor`.

    Args:
        latents: `[B, C, H, W]` or `[B, C, T, H, W]`.
        config: the autoencoder's config.
        name: the autoencoder's class.

    Raises:
        ValueError: the class has another rule, or the config lacks a value.
    """
    wide, multiplier, divisor, shift = _rule(latents, config, name)
    return wide * multiplier / divisor + shift


def normalized(latents: Tensor, config: Any, name: str, *, spread: bool = False) -> Tensor:
    """Convert latents that a VAE makes to those of its pipeline: the inverse of `denormalized`, with its errors.

    Args:
        latents: `[B, C, H, W]` or `[B, C, T, H, W]`.
        config: the autoencoder's config.
        name: the autoencoder's class.
        spread: whether these are standard deviations of latents, which are scaled but not shifted.
    """
    wide, multiplier, divisor, shift = _rule(latents, config, name)
    return (wide if spread else wide - shift) * divisor / multiplier


def _rule(latents: Tensor, config: Any, name: str) -> tuple[Tensor, Any, Any, Any]:
    """Latents in fp32 at least, and by what a pipeline multiplies them, then divides them, then shifts them."""
    values = dict(config)
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    known = [values.get("latents_mean"), values.get("latents_std")]
    if name in CLASSES and not all(known):
        raise ValueError(f"no latents_mean and latents_std are known for this {name}: pass unnormalized latents")
    if all(known) and values.get("scaling_factor") is None:
        mean, std = (wide.new_tensor(values).view(1, -1, *[1] * (wide.ndim - 2)) for values in known)
        return wide, std, 1.0, mean
    if values.get("latents_mean") is not None or values.get("scaling_factor") is None:
        raise ValueError(
            f"{name} is not normalized by a scaling_factor alone: pass latents as its pipeline passes them to the VAE"
        )
    return wide, 1.0, values["scaling_factor"], values.get("shift_factor") or 0.0


def tiles_only(vae: nn.Module) -> bool:
    """Whether an autoencoder only works with diffusers' tiling, as Allegro does."""
    return traits_of(type(vae)).tiles_only


@contextmanager
def whole(vae: nn.Module) -> Iterator[None]:
    """Turn off an autoencoder's tiling and slicing, since ranks share the memory. Tiling stays on if `tiles_only`."""
    flags = {name: vars(vae)[name] for name in ("use_tiling", "use_slicing") if vars(vae).get(name) is True}
    if tiles_only(vae):
        flags.pop("use_tiling", None)
    vars(vae).update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        vars(vae).update(flags)

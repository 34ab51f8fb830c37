"""Plan a pipeline's decode before it denoises, so that a decode that cannot fit fails at once and not at its end."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halovae.models.classes import latent_channels, spatial_ratio, takes_frames
from halovae.planning.decision import Decision
from halovae.runtime.options import Choice

log = logging.getLogger("halovae")


def plan_before_denoising(pipe: Any, choose: Callable[[Tensor], Choice]) -> None:
    """Let a pipeline plan its decode when it has made its noise.

    A decode that is planned is logged: as a warning if it needs strips. Pipelines without `prepare_latents`, and those
    whose noise does not show the shape of latents, plan when they decode.

    Args:
        pipe: the pipeline. Its instance gets a `prepare_latents` of its own.
        choose: chooses how ranks share the decode of latents. What it raises ends the pipeline's call.
    """
    own = getattr(type(pipe), "prepare_latents", None)
    if own is None:
        return
    signature = inspect.signature(own)

    @functools.wraps(own)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = own(pipe, *args, **kwargs)
        noise = made[0] if isinstance(made, tuple) else made
        shape = _latents_of(pipe.vae, noise, signature.bind(pipe, *args, **kwargs).arguments)
        if shape is not None:
            weight = next(pipe.vae.parameters())
            _tell(shape, choose(torch.zeros(shape, dtype=weight.dtype, device=weight.device)))
        return made

    vars(pipe)["prepare_latents"] = prepare_latents


def _latents_of(vae: nn.Module, noise: Any, arguments: dict[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the latents that will be decoded; None if noise does not show it."""
    channels, ratio, clips = latent_channels(vae), spatial_ratio(vae), takes_frames(vae)
    if not isinstance(noise, Tensor) or channels is None or ratio is None:
        return None
    if noise.ndim == (5 if clips else 4) and noise.shape[1] == channels:
        return tuple(noise.shape)
    height, width = arguments.get("height"), arguments.get("width")
    if noise.ndim != 3 or "num_frames" in arguments or not isinstance(height, int) or not isinstance(width, int):
        return None
    # FLUX and Qwen-Image pack two by two cells into a token.
    rows, cols = (2 * (size // (2 * ratio)) for size in (height, width))
    if 4 * noise.shape[1] != rows * cols or noise.shape[2] != 4 * channels:
        return None
    return (noise.shape[0], channels, 1, rows, cols) if clips else (noise.shape[0], channels, rows, cols)


def _tell(shape: tuple[int, ...], choice: Choice) -> None:
    found: Decision | None = choice.decision
    if found is None or found.chosen.peak is None:
        return
    how = "at once" if choice.strips is None else f"in {choice.strips}"
    log.log(
        logging.INFO if choice.strips is None else logging.WARNING,
        "latents of shape %s will be decoded on a grid of %s, %s: %.1f GiB and %.2g s are predicted",
        list(shape), choice.grid, how, found.chosen.peak / 2**30, found.chosen.seconds,
    )  # fmt: skip

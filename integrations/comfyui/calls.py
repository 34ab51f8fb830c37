"""Decodes and encodes of ComfyUI's `VAE` by halovae. They return what its own `decode` and `encode` return."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import comfy.model_management as management
import comfy.utils
from torch import Tensor, nn

import halovae

log = logging.getLogger(__name__)

Name = Literal["decode", "encode"]


def decoded(vae: Any, latents: Tensor, budget: int | None) -> Tensor:
    """Decode latents as `VAE.decode` does, without its tiles.

    Args:
        vae: ComfyUI's.
        latents: `[B, C, H, W]` or `[B, C, T, H, W]`.
        budget: bytes that may be taken besides weights; None for what is free.

    Returns:
        Pictures in 0..1, `[B, H', W', 3]` or `[B, T', H', W', 3]`, fp32, on the VAE's output device.
    """
    vae.throw_exception_if_invalid()
    if vae.latent_dim == 2 and latents.ndim == 5:
        latents = latents[:, :, 0]
    estimate = vae.memory_used_decode(latents.shape, vae.vae_dtype)

    def run(autoencoder: halovae.VAE, **how: Any) -> Tensor:
        stream = autoencoder.stream(latents.to(vae.vae_dtype), **how)
        # Frames leave the device as soon as they are there.
        images = stream.join(lambda chunk: vae.process_output(chunk.to(vae.output_device).float()))
        assert images is not None
        chosen = (stream.report.decision or {}).get("chosen", {})
        way = f"in {chosen['strips']}" if chosen.get("strips") else "at once"
        log.info("halovae decoded latents of shape %s %s.", list(latents.shape), way)
        return images

    found = _by_halovae("decode", vae, latents, budget, estimate, run)
    result: Tensor = vae.decode(latents) if found is None else found.movedim(1, -1)
    return result


def encoded(vae: Any, pixels: Tensor, budget: int | None) -> Tensor:
    """Encode pictures as `VAE.encode` does, without its tiles.

    Args:
        vae: ComfyUI's.
        pixels: in 0..1, `[B, H, W, 3]`; the frames of one clip if the VAE is one for clips.
        budget: bytes that may be taken besides weights; None for no limit.

    Returns:
        Latents, `[B, C, H', W']` or `[B, C, T', H', W']`, fp32, on the VAE's output device.
    """
    vae.throw_exception_if_invalid()
    x = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    if vae.latent_dim == 3 and x.ndim < 5:
        x = x.unsqueeze(2) if getattr(vae, "not_video", False) else x.movedim(1, 0).unsqueeze(0)
    estimate = vae.memory_used_encode(x.shape, vae.vae_dtype)

    def run(autoencoder: halovae.VAE, **how: Any) -> Tensor:
        pictures = vae.process_input(x).to(autoencoder.device, vae.vae_dtype)
        found = autoencoder.encode(pictures, **how)
        assert found is not None
        return found.to(vae.output_device).float()

    found = _by_halovae("encode", vae, x, budget, estimate, run)
    result: Tensor = vae.encode(pixels) if found is None else found
    return result


def _by_halovae(
    name: Name, vae: Any, x: Tensor, budget: int | None, estimate: int, run: Callable[..., Tensor]
) -> Tensor | None:
    """Run a call; return None if halovae cannot, and say why in the log."""
    # Within a budget, other models may stay where they are. All of the VAE has to be on the device.
    needed = estimate if budget is None else min(budget, estimate)
    management.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=True)
    with _plain_attention(vae.first_stage_model), halovae.on_each_step(_Progress()):
        try:
            reason = _why_not(name, vae, x)
            if not reason:
                return _within(budget, _autoencoder(vae), run)
        except (ValueError, TypeError) as error:  # such as a result that has no rows and cols
            reason = f"{type(error).__name__}: {error}"
    log.warning(
        "halovae cannot run the %s of %s: %s. ComfyUI runs it instead, in tiles if memory runs out.",
        name, type(vae.first_stage_model).__name__, reason.strip().splitlines()[0],
    )  # fmt: skip
    return None


def _within(budget: int | None, autoencoder: halovae.VAE, run: Callable[..., Tensor]) -> Tensor:
    try:
        return run(autoencoder, memory_budget=budget)
    except halovae.MemoryBudgetError as error:
        log.warning("halovae: %s. It runs at once.", error)
        return run(autoencoder, mode="single")


def _why_not(name: Name, vae: Any, x: Tensor) -> str:
    """Why halovae cannot run a call; empty if it can."""
    if x.ndim not in (4, 5):
        return f"tensors of shape {list(x.shape)} have no rows and cols"
    devices = sorted({str(one.device) for one in vae.first_stage_model.parameters()})
    if len(devices) > 1 or not devices[0].startswith(vae.device.type):
        return f"its weights are on {', '.join(devices)}, expected all of them on {vae.device}"
    try:
        return _autoencoder(vae).why_eager(x.shape, name)
    except (RuntimeError, AttributeError) as error:  # modules may fail in any way on tensors that have no values
        return f"{type(error).__name__}: {error}"


class _Progress:
    """Shows how far a call is, and ends it if the user interrupts it."""

    def __init__(self) -> None:
        self._bar, self._shown = comfy.utils.ProgressBar(100), -1

    def __call__(self, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        if (share := 100 * done // total) != self._shown:
            self._shown = share
            self._bar.update_absolute(share)


def _autoencoder(vae: Any) -> halovae.VAE:
    """The autoencoder of ComfyUI's VAE, which keeps it, with the graphs that were recorded, as long as it lives."""
    found = getattr(vae, "halovae", None)
    if found is None or found.module is not vae.first_stage_model:
        found = vae.halovae = halovae.VAE(vae.first_stage_model)
    return found


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Let attention be PyTorch's: ComfyUI's slices of it write in place, and xformers' cannot be recorded."""
    try:
        from comfy.ldm.modules.diffusionmodules import model as layers

        plain = layers.pytorch_attention
    except (ImportError, AttributeError):
        yield
        return
    before = {one: vars(one)["optimized_attention"] for one in model.modules() if "optimized_attention" in vars(one)}
    for one in before:
        one.optimized_attention = plain
    try:
        yield
    finally:
        for one, attention in before.items():
            one.optimized_attention = attention

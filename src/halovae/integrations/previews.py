"""Small pictures of what a diffusers pipeline makes, while its steps run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from halovae.geometry import Grid
from halovae.integrations.autoencoder import Autoencoder
from halovae.integrations.classes import decode_options, denormalized, latent_channels, spatial_ratio, tiles_only
from halovae.mesh import Mesh
from halovae.out_of_memory import is_out_of_memory


@dataclass(frozen=True)
class Preview:
    """What a pipeline is about to make, as far as a step can tell.

    Attributes:
        step: how many steps are done, from 1 on.
        steps: how many there will be.
        picture: RGB; the first frame of a video.
    """

    step: int
    steps: int
    picture: Image.Image


class Previews:
    """A pipeline's `callback_on_step_end` that draws previews; see `previews`."""

    def __init__(
        self, every: int, show: Callable[[Preview], None], side: int, size: tuple[int, int] | None,
        decoder: Autoencoder,
    ) -> None:  # fmt: skip
        self._every, self._show, self._side, self._size = every, show, side, size
        self._autoencoder, self._vae = decoder, decoder.module
        self._earlier: tuple[float, Tensor] | None = None
        self._works = True

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Draw, if it is time to. Changes nothing of what the pipeline makes."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        if step == 0:
            self._earlier, self._works = None, True
        is_due = (step + 1) % self._every == 0
        if not self._works or not (is_due or step == 0):
            return {}
        if "latents" not in tensors:
            raise ValueError("previews need the latents: expected 'latents' in callback_on_step_end_tensor_inputs")
        z = self._as_decoded(pipe, self._denoised(pipe.scheduler, tensors["latents"].float()))
        if is_due:  # in the first step, what cannot be drawn is refused
            try:
                self._show(Preview(step + 1, pipe.num_timesteps, self._drawn(z)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._works = False
                warnings.warn(f"no more previews: memory ran out ({error})", RuntimeWarning, stacklevel=2)
        return {}

    def _denoised(self, scheduler: Any, latents: Tensor) -> Tensor:
        """Where the line through the latents of an earlier step and these ends, if they lie on one."""
        sigma, earlier = _sigma(scheduler), self._earlier
        self._earlier = None if sigma is None else (sigma, latents)
        if sigma is None or earlier is None or earlier[0] == sigma:
            return latents
        return latents - sigma / (sigma - earlier[0]) * (latents - earlier[1])

    def _as_decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        """The first item's latents as the VAE takes them, without those of later frames."""
        given, latents = list(latents.shape), latents[:1]
        normalized = True
        if latents.ndim == 3:
            latents, normalized = _unpacked(pipe, latents, self._size)
        channels = latent_channels(self._vae)
        if latents.ndim not in (4, 5) or latents.shape[1] != channels:
            raise ValueError(
                f"previews of {type(pipe).__name__}: its latents are {given}, and how they become "
                f"[B, {channels}, H, W] or [B, {channels}, T, H, W] for {type(self._vae).__name__} is not known"
            )
        if latents.ndim == 5:
            latents = latents[:, :, :1]
        if latents.ndim == 5 and type(self._vae).__name__ == "AutoencoderTiny":  # it knows pictures only
            latents = latents[:, :, 0]
        return denormalized(latents, self._vae.config, type(self._vae).__name__) if normalized else latents

    @torch.no_grad()
    def _drawn(self, z: Tensor) -> Image.Image:
        height, width = z.shape[-2:]
        shrink = min(1.0, self._side / ((spatial_ratio(self._vae) or 1) * max(height, width)))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        flat = z.flatten(1, -3) if z.ndim == 5 else z
        small = F.adaptive_avg_pool2d(flat, size).view(*z.shape[:-2], *size)
        alone = Mesh(Grid(), small.device)  # the other ranks go on
        frames = self._autoencoder.decode(small, mesh=alone, dtype=torch.uint8, **decode_options(self._vae, small))
        assert frames is not None
        frame = frames[0, :3, 0] if frames.ndim == 5 else frames[0, :3]
        return Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())


def previews(
    pipe: Any,
    *,
    every: int = 5,
    show: Callable[[Preview], None],
    side: int = 256,
    size: tuple[int, int] | None = None,
    decoder: nn.Module | Autoencoder | None = None,
) -> Previews:
    """Make a `callback_on_step_end` that draws small pictures of what a pipeline makes, while its steps run.

    The latents of a step are averaged to a small plane and decoded there, as one device decodes them. With flow
    matching and with Euler's method, what remains of the noise is taken off first: the line through the latents of two
    steps is followed to its end without noise. Rank 0 draws; the pipeline's own result is not changed.

        pipe("a cat", callback_on_step_end=halovae.previews(pipe, show=lambda p: p.picture.save(f"{p.step}.jpg")))

    Args:
        pipe: a diffusers pipeline with a `vae`, parallelized or not. Its callback's latents are 4-D or 5-D, or packed
            as those of FLUX, FLUX.2, and Qwen-Image are.
        every: steps from one picture to the next.
        show: is called on rank 0 with each.
        side: of the longer side in pixels, at most.
        size: width and height in pixels of what is made, for packed latents; None for the pipeline's usual.
        decoder: what decodes instead of `pipe.vae`, such as diffusers' `AutoencoderTiny` for the same latents, or an
            `Autoencoder` that keeps its graphs from one call to the next.

    Raises:
        TypeError: the pipeline has no VAE, or takes no callback, or its VAE decodes nothing small.
        ValueError: `every` or `side` is below 1; or, in the first step, it is not known how the pipeline's latents
            become its VAE's.

    Warns:
        RuntimeWarning: memory ran out while a picture was drawn; the pipeline goes on without.
    """
    if not isinstance(getattr(pipe, "vae", None), nn.Module):
        raise TypeError(f"expected a diffusers pipeline with a vae; got {type(pipe).__name__}")
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        raise TypeError(f"{type(pipe).__name__} takes no callback_on_step_end: it cannot be watched")
    if decoder is None and tiles_only(pipe.vae):
        raise TypeError(f"{type(pipe.vae).__name__} decodes tiles of one size, no small pictures: expected a decoder")
    for name, value in (("every", every), ("side", side)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")
    if not isinstance(decoder, Autoencoder):
        decoder = Autoencoder(pipe.vae if decoder is None else decoder)
    return Previews(every, show, side, size, decoder)


def _sigma(scheduler: Any) -> float | None:
    """The latents' sigma after a step, where they lie on a line from noise to picture in it; else None."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    straight = flow or name.startswith("FlowMatch") or name == "EulerDiscreteScheduler"
    random = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    index, sigmas = getattr(scheduler, "step_index", None), getattr(scheduler, "sigmas", None)
    if not straight or random or index is None or sigmas is None:
        return None
    return float(sigmas[min(index, len(sigmas) - 1)])


def _unpacked(pipe: Any, latents: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, bool]:
    """Packed latents `[B, tokens, C]` as `[B, C, H, W]` or `[B, C, 1, H, W]`, and whether they are normalized still."""
    name = type(pipe).__name__
    unpack: Any = getattr(pipe, "_unpack_latents", None)
    is_flux2 = name.startswith("Flux2") and hasattr(pipe, "_unpatchify_latents")
    wanted = ["latents", "height", "width", "vae_scale_factor"]
    if not is_flux2 and (unpack is None or list(inspect.signature(unpack).parameters) != wanted):
        raise ValueError(f"previews of {name}: how its latents {list(latents.shape)} are unpacked is not known")
    ratio = pipe.vae_scale_factor
    usual = getattr(pipe, "default_sample_size", 0) * ratio
    width, height = size or (usual, usual)
    try:
        if not is_flux2:
            return unpack(latents, height, width, ratio), True
        wide = latents.transpose(1, 2).reshape(1, -1, height // (2 * ratio), width // (2 * ratio))
        norm = pipe.vae.bn
        std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        return pipe._unpatchify_latents(wide * std + norm.running_mean.view(1, -1, 1, 1)), False
    except RuntimeError as error:  # of a view
        raise ValueError(
            f"previews of {name}: latents of {latents.shape[1]} tokens are not those of {width}x{height} pixels: "
            "expected size=(width, height) of what is made"
        ) from error

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

from halovae.distributed.mesh import Mesh
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.grid import Grid
from halovae.models.classes import (
    decode_options,
    denormalized,
    latent_channels,
    moved,
    spatial_ratio,
    takes_frames,
    tiles_only,
)
from halovae.runtime.vae import VAE


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
        decoder: VAE,
    ) -> None:  # fmt: skip
        self._every, self._show, self._side, self._size = every, show, side, size
        self._autoencoder, self._vae = decoder, decoder.module
        self._earlier: tuple[float, Tensor] | None = None
        self._works = True

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Draw, if it is time to. Changes nothing of what the pipeline makes."""
        if step == 0:
            self._earlier, self._works = None, True
            if "latents" not in tensors:
                raise ValueError("previews need the latents: expected 'latents' in callback_on_step_end_tensor_inputs")
            self._decodable(pipe, self._first(pipe, tensors["latents"]))  # all ranks refuse alike
        steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        is_last = step + 1 >= steps
        is_due = (step + 1) % self._every == 0 or is_last
        if (dist.is_initialized() and dist.get_rank() > 0) or not self._works or not (is_due or step == 0):
            return {}
        try:
            latents = self._denoised(pipe.scheduler, self._first(pipe, tensors["latents"]).float().clone())
            if is_due:
                self._show(Preview(step + 1, steps, self._drawn(self._decodable(pipe, latents))))
        except Exception as error:  # on this rank alone: the pipeline goes on on all of them
            self._works = False
            reason = "memory ran out" if is_out_of_memory(error) else type(error).__name__
            warnings.warn(f"no more previews: {reason} ({error})", RuntimeWarning, stacklevel=2)
        if is_last or not self._works:
            self._earlier = None
        return {}

    def _first(self, pipe: Any, latents: Tensor) -> Tensor:
        """The first item's latents, of a clip the first frame's."""
        given, name, vae, channels = list(latents.shape), type(pipe).__name__, self._vae, latent_channels(self._vae)
        if latents.ndim == 3:
            return latents[:1]
        transposed = type(vae).__name__ in _TRANSPOSED or name.startswith(_TRANSPOSED)
        if latents.ndim not in (4, 5) or latents.shape[1] != channels or (latents.ndim == 5 and transposed):
            raise ValueError(
                f"previews of {name}: its latents are {given}, and how they become [B, {channels}, H, W] or "
                f"[B, {channels}, T, H, W] for {type(vae).__name__} is not known"
            )
        if "ImageToVideo" in name and getattr(pipe.config, "expand_timesteps", False):
            raise ValueError(f"previews of {name} with expand_timesteps: the first frame is not among its latents")
        return latents[:1, :, :1] if latents.ndim == 5 else latents[:1]

    def _decodable(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them."""
        normalized = True
        if latents.ndim == 3:
            latents, normalized = _unpacked(pipe, latents, self._size)
        if latents.ndim == 5 and not takes_frames(self._vae):
            latents = latents[:, :, 0]
        return denormalized(latents, self._vae.config, type(self._vae).__name__) if normalized else latents

    def _denoised(self, scheduler: Any, latents: Tensor) -> Tensor:
        """Where the line through the latents of the preview before and these ends, if they are on one."""
        sigma, earlier = _sigma(scheduler), self._earlier
        if sigma is None or earlier is None:
            self._earlier = None if sigma is None else (sigma, latents)
            return latents
        if earlier[0] == sigma:
            return latents
        self._earlier = sigma, latents
        return latents - sigma / (sigma - earlier[0]) * (latents - earlier[1])

    @torch.no_grad()
    def _drawn(self, z: Tensor) -> Image.Image:
        height, width = z.shape[-2:]
        shrink = min(1.0, self._side / ((spatial_ratio(self._vae) or 1) * max(height, width)))
        size = max(1, int(height * shrink)), max(1, int(width * shrink))
        flat = z.flatten(1, -3) if z.ndim == 5 else z
        small = moved(self._vae, F.adaptive_avg_pool2d(flat, size).view(*z.shape[:-2], *size))
        own = Mesh(Grid(), small.device)  # the other ranks go on
        frames = self._autoencoder.decode(small, mesh=own, dtype=torch.uint8, **decode_options(self._vae, small))
        assert frames is not None
        frame = (frames[0, :, 0] if frames.ndim == 5 else frames[0]).permute(1, 2, 0)
        picture = Image.fromarray(frame.cpu().numpy())
        if picture.mode != "RGBA":
            return picture
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        return white.convert("RGB")


def previews(
    pipe: Any,
    *,
    every: int = 5,
    show: Callable[[Preview], None],
    side: int = 256,
    size: tuple[int, int] | None = None,
    decoder: nn.Module | VAE | None = None,
) -> Previews:
    """Make a `callback_on_step_end` that draws small pictures of what a pipeline makes, while its steps run.

    The latents of a step are averaged to a small plane and decoded there, as one device decodes them. For flow matching
    and Euler's method, noise is removed first: the line through the latents of this preview and the one before (or the
    first step's) is followed to its end without noise. Rank 0 draws; the pipeline's own result does not change.

        pipe("a cat", callback_on_step_end=halovae.previews(pipe, show=lambda p: p.picture.save(f"{p.step}.jpg")))

    Args:
        pipe: a diffusers pipeline with a `vae`, parallelized or not. Its callback's latents are 4-D or 5-D, or packed
            as those of FLUX, FLUX.2, and Qwen-Image are.
        every: steps from one preview to the next. The last step always has one.
        show: is called with each, on rank 0.
        side: of the longer side in pixels, at most, but for one latent.
        size: width and height in pixels of what is made; needed for packed latents.
        decoder: what decodes instead of `pipe.vae`, such as diffusers' `AutoencoderTiny` for the same latents, or an
            `VAE` that keeps its graphs from one call to the next.

    Raises:
        TypeError: the pipeline has no VAE, or takes no callback; `show` is no function; or what decodes only knows
            tiles of one size.
        ValueError: `every` or `side` is below 1; `size` is no width and height; or, in the first step and on all ranks,
            it is not known how the pipeline's latents become its VAE's.

    Warns:
        RuntimeWarning: a picture could not be drawn or shown; the pipeline goes on without previews.
    """
    if not isinstance(getattr(pipe, "vae", None), nn.Module):
        raise TypeError(f"expected a diffusers pipeline with a vae; got {type(pipe).__name__}")
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        raise TypeError(f"{type(pipe).__name__} takes no callback_on_step_end: it has no previews")
    for name, value in (("every", every), ("side", side)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")
    if not callable(show):
        raise TypeError(f"show={show!r}: expected a function of a Preview")
    if size is not None and not (len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size)):
        raise ValueError(f"size={size!r}: expected width and height in pixels, such as (1024, 768)")
    if not isinstance(decoder, VAE):
        decoder = VAE(pipe.vae if decoder is None else decoder)
    if tiles_only(decoder.module):
        raise TypeError(f"{type(decoder.module).__name__} decodes tiles of one size: expected another decoder")
    return Previews(every, show, side, size, decoder)


# VAEs, and beginnings of pipelines' names, whose latents are `[B, T, C, H, W]` or `[B, T, H, W, C]`.
_TRANSPOSED = ("AutoencoderKLCogVideoX", "AutoencoderKLTemporalDecoder", "Kandinsky5", "Kandinsky6")
_FLOW = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")  # straight only with the sigmas of flow matching


def _sigma(scheduler: Any) -> float | None:
    """The latents' sigma after a step, where they lie on a line from noise to picture in it; else None."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    straight = name in ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler") or (flow and name in _FLOW)
    random = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    if config.get("invert_sigmas"):
        return None
    index, sigmas = getattr(scheduler, "step_index", None), getattr(scheduler, "sigmas", None)
    if not straight or random or index is None or sigmas is None:
        return None
    return float(sigmas[min(index, len(sigmas) - 1)])


def _unpacked(pipe: Any, latents: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, bool]:
    """Packed latents `[B, tokens, C]` as `[B, C, H, W]` or `[B, C, 1, H, W]`, and whether they are normalized still."""
    name = type(pipe).__name__
    unpack: Any = getattr(pipe, "_unpack_latents", None)
    is_flux2 = name.startswith("Flux2") and hasattr(pipe, "_unpatchify_latents")
    needed = ["latents", "height", "width", "vae_scale_factor"]
    if not is_flux2 and (unpack is None or list(inspect.signature(unpack).parameters) != needed):
        raise ValueError(f"previews of {name}: how its latents {list(latents.shape)} are unpacked is not known")
    if size is None:
        raise ValueError(f"previews of {name}: its latents are packed, expected size=(width, height) of what is made")
    (width, height), ratio = size, pipe.vae_scale_factor
    try:
        if not is_flux2:
            return unpack(latents, height, width, ratio), True
        wide = latents.transpose(1, 2).reshape(1, -1, height // (2 * ratio), width // (2 * ratio))
        mean, variance = (  # an offloaded VAE's are elsewhere
            one.to(wide).view(1, -1, 1, 1) for one in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var)
        )
        return pipe._unpatchify_latents(wide * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean), False
    except RuntimeError as error:  # of a view
        raise ValueError(
            f"previews of {name}: size {width}x{height} does not make latents of {latents.shape[1]} tokens: expected "
            "the width and height of what is made"
        ) from error

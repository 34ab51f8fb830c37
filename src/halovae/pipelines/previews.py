"""Small pictures of a diffusers pipeline's result, while its steps run."""

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
    """A preview of a pipeline's result after a step.

    Attributes:
        step: the number of finished steps, from 1 on.
        steps: the number of all steps.
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
        """Draw a preview if one is due. The pipeline's result does not change."""
        if step == 0:
            self._earlier, self._works = None, True
            if "latents" not in tensors:
                raise ValueError("previews need the latents: expected 'latents' in callback_on_step_end_tensor_inputs")
            self._decodable(pipe, self._first(pipe, tensors["latents"]))  # raises on all ranks
        steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        is_last = step + 1 >= steps
        is_due = (step + 1) % self._every == 0 or is_last
        if (dist.is_initialized() and dist.get_rank() > 0) or not self._works or not (is_due or step == 0):
            return {}
        try:
            latents = self._denoised(pipe.scheduler, self._first(pipe, tensors["latents"]).float().clone())
            if is_due:
                self._show(Preview(step + 1, steps, self._drawn(self._decodable(pipe, latents))))
        except Exception as error:  # on this rank only: the pipeline continues on all ranks
            self._works = False
            reason = "out of memory" if is_out_of_memory(error) else type(error).__name__
            warnings.warn(f"no more previews: {reason} ({error})", RuntimeWarning, stacklevel=2)
        if is_last or not self._works:
            self._earlier = None
        return {}

    def _first(self, pipe: Any, latents: Tensor) -> Tensor:
        """Return the first item's latents; for a clip, the first frame's."""
        shape, name, vae, channels = list(latents.shape), type(pipe).__name__, self._vae, latent_channels(self._vae)
        if latents.ndim == 3:
            return latents[:1]
        transposed = type(vae).__name__ in _TRANSPOSED or name.startswith(_TRANSPOSED)
        if latents.ndim not in (4, 5) or latents.shape[1] != channels or (latents.ndim == 5 and transposed):
            raise ValueError(
                f"previews of {name}: its latents are {shape}, and how they become [B, {channels}, H, W] or "
                f"[B, {channels}, T, H, W] for {type(vae).__name__} is not known"
            )
        if "ImageToVideo" in name and getattr(pipe.config, "expand_timesteps", False):
            raise ValueError(f"previews of {name} with expand_timesteps: the first frame is not among its latents")
        return latents[:1, :, :1] if latents.ndim == 5 else latents[:1]

    def _decodable(self, pipe: Any, latents: Tensor) -> Tensor:
        """Return latents as the VAE takes them."""
        normalized = True
        if latents.ndim == 3:
            latents, normalized = _unpacked(pipe, latents, self._size)
        if latents.ndim == 5 and not takes_frames(self._vae):
            latents = latents[:, :, 0]
        return denormalized(latents, self._vae.config, type(self._vae).__name__) if normalized else latents

    def _denoised(self, scheduler: Any, latents: Tensor) -> Tensor:
        """Extrapolate the line through these latents and the previous preview's to no noise, if they lie on a line."""
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
        one_rank = Mesh(Grid(), small.device)  # the other ranks continue with the pipeline
        frames = self._autoencoder.decode(
            small, mesh=one_rank, dtype=torch.uint8, module_kwargs=decode_options(self._vae, small)
        )
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
    """Make a `callback_on_step_end` that draws small pictures of a pipeline's result while its steps run.

    The latents of a step are averaged to a small plane, which is decoded as on one device. For flow matching and
    Euler's method, noise is removed first: the line through the latents of this preview and the previous one (or the
    first step's) is extrapolated to no noise. Rank 0 draws; the pipeline's own result does not change.

        pipe("a cat", callback_on_step_end=halovae.previews(pipe, show=lambda p: p.picture.save(f"{p.step}.jpg")))

    Args:
        pipe: a diffusers pipeline with a `vae`, parallelized or not. Its callback's latents are 4-D or 5-D, or packed
            as those of FLUX, FLUX.2, and Qwen-Image are.
        every: steps from one preview to the next. The last step always has a preview.
        show: called with each preview, on rank 0.
        side: the longest side in pixels; a preview has at least one latent cell.
        size: width and height in pixels of the pipeline's result; needed for packed latents.
        decoder: the decoder to use instead of `pipe.vae`, such as diffusers' `AutoencoderTiny` for the same latents, or
            a `VAE` that keeps its graphs from one call to the next.

    Raises:
        TypeError: the pipeline has no VAE, or takes no callback; `show` is not callable; or the decoder only works
            with tiles of one size.
        ValueError: `every` or `side` is below 1; `size` is not a width and a height; or, in the first step and on all
            ranks, it is not known how the pipeline's latents become its VAE's.

    Warns:
        RuntimeWarning: a picture could not be drawn or shown; the pipeline continues without previews.
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
    if size is not None and not (len(size) == 2 and all(isinstance(extent, int) and extent > 0 for extent in size)):
        raise ValueError(f"size={size!r}: expected width and height in pixels, such as (1024, 768)")
    if not isinstance(decoder, VAE):
        decoder = VAE(pipe.vae if decoder is None else decoder)
    if tiles_only(decoder.module):
        raise TypeError(f"{type(decoder.module).__name__} decodes tiles of one size: expected another decoder")
    return Previews(every, show, side, size, decoder)


# VAEs, and prefixes of pipelines' names, whose latents are `[B, T, C, H, W]` or `[B, T, H, W, C]`.
_TRANSPOSED = ("AutoencoderKLCogVideoX", "AutoencoderKLTemporalDecoder", "Kandinsky5", "Kandinsky6")
_FLOW = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")  # straight only with the sigmas of flow matching


def _sigma(scheduler: Any) -> float | None:
    """The sigma of the latents after a step, if they are linear in it from noise to picture; else None."""
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
    """Unpack latents `[B, tokens, C]` to `[B, C, H, W]` or `[B, C, 1, H, W]`; also say if they are still normalized."""
    name = type(pipe).__name__
    unpack: Any = getattr(pipe, "_unpack_latents", None)
    is_flux2 = name.startswith("Flux2") and hasattr(pipe, "_unpatchify_latents")
    needed = ["latents", "height", "width", "vae_scale_factor"]
    if not is_flux2 and (unpack is None or list(inspect.signature(unpack).parameters) != needed):
        raise ValueError(f"previews of {name}: how its latents {list(latents.shape)} are unpacked is not known")
    if size is None:
        raise ValueError(f"previews of {name}: its latents are packed, expected size=(width, height) of the result")
    (width, height), ratio = size, pipe.vae_scale_factor
    try:
        if not is_flux2:
            return unpack(latents, height, width, ratio), True
        wide = latents.transpose(1, 2).reshape(1, -1, height // (2 * ratio), width // (2 * ratio))
        mean, variance = (  # an offloaded VAE has them on another device
            statistic.to(wide).view(1, -1, 1, 1) for statistic in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var)
        )
        return pipe._unpatchify_latents(wide * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean), False
    except RuntimeError as error:  # from a view of another size
        raise ValueError(
            f"previews of {name}: size {width}x{height} does not make latents of {latents.shape[1]} tokens: expected "
            "the width and height of the result"
        ) from error

"""A drop-in for a diffusers pipeline's VAE: its `decode` and `encode` go through halovae, all else stays as it is."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from halovae.decode import Decoder, HaloDepth, Mode
from halovae.geometry import Grid
from halovae.integrations.autoencoder import parallelize_plane, replace_call
from halovae.integrations.plane_call import tiles_only
from halovae.integrations.sharing import Sharing
from halovae.loop import Gather
from halovae.models.load import CLASSES, from_module
from halovae.planning.plan import Chunk


def parallelize(
    pipe_or_vae: Any,
    *,
    mode: Mode = "auto",
    grid: Grid | None = None,
    chunk: Chunk | None = None,
    gather: Gather = "all",
    halo_depth: HaloDepth | None = None,
    memory_budget: int | None = None,
) -> Any:
    """Make a diffusers pipeline, or its VAE, decode and encode through halovae on all ranks of the world.

    Run it under torchrun, one process per device; every rank calls the pipeline with the same arguments and seed.
    `vae.decode(z).sample` and `vae.encode(x).latent_dist` keep their meaning: same shape, dtype and device,
    `return_dict` included. `config` and the weights, which are shared, stay untouched. Calling it again replaces the
    settings.

    Args:
        pipe_or_vae: a pipeline with a `vae`, or any diffusers autoencoder with rows and cols. `AutoencoderKLWan` and
            `AutoencoderKLQwenImage` have decoders of halovae's own; all else runs unmodified on a partitioned plane.
        mode: how ranks share a latent, or pictures that are encoded; see `Decoder.stream` for this, `grid`, `chunk` and
            `halo_depth`.
        grid: instead of `mode`, for decoding.
        chunk: latent frames per pass.
        gather: "all" gives every rank the frames. "rank0" saves the other ranks the memory: they get black frames of
            the right shape, which take none.
        halo_depth: how many convolutions one exchange lasts.
        memory_budget: bytes that a decode may take on each rank, above the resting process.

    Returns:
        `pipe_or_vae` itself.

    Raises:
        TypeError: the argument has no VAE.
        ValueError: `gather` is neither "all" nor "rank0", or an option that the VAE's path does not have.
    """
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook

    if gather not in ("all", "rank0"):
        raise ValueError(f"gather={gather!r}: a pipeline needs whole frames, expected 'all' or 'rank0'")
    vae = _vae_of(pipe_or_vae)
    if type(vae).__name__ not in CLASSES:
        for name, value in (("chunk", chunk), ("halo_depth", halo_depth)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: {type(vae).__name__} runs on the plane path, which has no {name} yet"
                )
        parallelize_plane(vae, Sharing(mode, grid, gather, None, memory_budget), _warn_of_tiling)
        return pipe_or_vae
    decoder = Decoder(from_module(vae))

    @functools.wraps(type(vae).decode)
    def decode(self: nn.Module, z: Tensor, return_dict: bool = True) -> Any:
        _warn_of_tiling(self)
        sample = decoder.decode(
            z, mode=mode, grid=grid, chunk=chunk, gather=gather, halo_depth=halo_depth, memory_budget=memory_budget
        )
        if sample is None:
            sample = _black(decoder, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    vars(decode)["halovae_method"] = True  # as in `parallelize_plane`: graphs of the encode do not depend on it
    # The hook moves an offloaded VAE to its device first, as around diffusers' own decode.
    vae.decode = types.MethodType(apply_forward_hook(decode), vae)
    replace_call(vae, "encode", Sharing(mode, gather="all"), _warn_of_tiling)
    return pipe_or_vae


def do_without_torchvision() -> None:
    """Let Qwen's processors of pictures load where torchvision is not installed.

    Only their part for videos needs that (transformers 5), which no pipeline uses. Where torchvision is installed
    nothing changes.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        for name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
            if (processor := getattr(transformers, name, None)) is not None:
                processor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def gather_uneven_parts() -> None:
    """Let ranks on gloo share a sequence whose length they do not divide.

    diffusers (0.42) gathers the ranks' parts, which differ in length then, by one `all_gather`. NCCL does that, gloo
    wants equal lengths. So the parts are filled up, and cut again.
    """
    from diffusers.hooks import context_parallel

    def gathered(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        lengths: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(lengths, tensor.shape[dim], group)
        padding = [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim) + [0, max(lengths) - tensor.shape[dim]]
        filled = F.pad(tensor, padding).contiguous()
        parts = [torch.empty_like(filled) for _ in lengths]
        dist.all_gather(parts, filled, group)
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)

    context_parallel._all_gather_anything = gathered


def restore(pipe_or_vae: Any) -> Any:
    """Undo `parallelize`: the VAE works through diffusers again. Does nothing to one that does already.

    Raises:
        TypeError: the argument has no VAE.
    """
    vae = _vae_of(pipe_or_vae)
    for name in ("decode", "encode"):
        vars(vae).pop(name, None)
    return pipe_or_vae


def _warn_of_tiling(vae: nn.Module) -> None:
    tiled = getattr(vae, "use_tiling", False) and not tiles_only(vae)
    if tiled or getattr(vae, "use_slicing", False):
        warnings.warn(
            "tiling and slicing are not needed with halovae, and ignored: the ranks share the memory",
            UserWarning,
            stacklevel=4,
        )


def _vae_of(pipe_or_vae: Any) -> Any:
    vae = getattr(pipe_or_vae, "vae", pipe_or_vae)
    if not isinstance(vae, nn.Module):
        raise TypeError(f"expected a diffusers pipeline with a vae, or a VAE; got {type(pipe_or_vae).__name__}")
    return vae


def _black(decoder: Decoder, z: Tensor) -> Tensor:
    """Black frames of the shape that the decode of `z` has: one number, seen from everywhere."""
    config = decoder.config
    height, width = (extent * config.spatial_factor for extent in z.shape[3:])
    shape = (z.shape[0], config.picture_channels, config.frames(z.shape[2]), height, width)
    return z.new_full((), -1, dtype=decoder.dtype).expand(shape)

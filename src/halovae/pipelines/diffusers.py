"""A drop-in for a diffusers pipeline's VAE: its `decode` and `encode` go through halovae, all else stays as it is."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from halovae.grid import Grid
from halovae.models.classes import tiles_only
from halovae.plane.results import Gather
from halovae.runtime.sharing import Mode, Sharing
from halovae.runtime.vae import replace_call


def parallelize(
    pipe_or_vae: Any,
    *,
    mode: Mode = "auto",
    grid: Grid | None = None,
    gather: Gather = "all",
    memory_budget: int | None = None,
) -> Any:
    """Make a diffusers pipeline, or its VAE, decode and encode through halovae on all ranks of the world.

    Run it under torchrun, one process per device; every rank calls the pipeline with the same arguments and seed.
    `vae.decode(z).sample` and `vae.encode(x).latent_dist` keep their meaning: same shape, dtype and device,
    `return_dict` included. `config` and the weights, which are shared, stay untouched. Calling it again replaces the
    settings.

    Args:
        pipe_or_vae: a pipeline with a `vae`, or any diffusers autoencoder with rows and cols.
        mode: how ranks share a latent, or pictures that are encoded; see `VAE.stream`.
        grid: instead of `mode`, for decoding.
        gather: "all" gives every rank the frames. "rank0" saves the other ranks the memory: they get black frames of
            the right shape, which take none.
        memory_budget: bytes that a decode may take on each rank, above the resting process.

    Returns:
        `pipe_or_vae` itself.

    Raises:
        TypeError: the argument has no VAE.
        ValueError: `gather` is neither "all" nor "rank0".
    """
    if gather not in ("all", "rank0"):
        raise ValueError(f"gather={gather!r}: a pipeline needs whole frames, expected 'all' or 'rank0'")
    vae = _vae_of(pipe_or_vae)
    if hasattr(type(vae), "decode"):
        replace_call(vae, "decode", Sharing(mode, grid, gather, None, memory_budget), _warn_of_tiling)
    if hasattr(type(vae), "encode"):
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
    needs equal lengths. So the parts are filled up, and cut again.
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

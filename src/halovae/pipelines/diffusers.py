"""A drop-in for a diffusers pipeline's VAE: its `decode` and `encode` go through halovae, the rest stays as it is."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from halovae.distributed.mesh import Mesh
from halovae.grid import Grid
from halovae.models.classes import tiles_only
from halovae.pipelines.in_time import plan_before_denoising
from halovae.plane.results import Gather
from halovae.runtime.options import DecodeOptions, Mode, Sharing
from halovae.runtime.vae import replace_call


def parallelize(
    pipe_or_vae: Any,
    *,
    mode: Mode = "auto",
    grid: Grid | None = None,
    gather: Gather = "all",
    memory_budget: int | None = None,
    mesh: Mesh | DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Make a diffusers pipeline, or its VAE, decode and encode through halovae on all ranks of the world.

    Run it under torchrun, one process per device; every rank calls the pipeline with the same arguments and seed.
    `vae.decode(z).sample` and `vae.encode(x).latent_dist` keep their meaning: same shape, dtype and device,
    `return_dict` included. `config` and the weights stay untouched; the weights are shared. A second call replaces the
    settings. A pipeline plans its decode before it denoises: the logger "halovae" says how latents will be decoded,
    and a `memory_budget` that no way fits into raises `halovae.MemoryBudgetError` then.

    Args:
        pipe_or_vae: a pipeline with a `vae`, or any diffusers autoencoder with rows and cols.
        mode: how ranks share a latent, or pictures that are encoded; see `VAE.stream`.
        grid: instead of `mode`, for decoding.
        gather: "all" gives every rank the frames. "rank0" saves the other ranks the memory: they get black frames of
            the right shape, which take no memory.
        memory_budget: bytes that a decode or an encode may take on each rank, above the resting process.
        mesh: the ranks and their grid, for decoding and encoding; see `VAE.stream`.
        group: the ranks, which share by `mode` or `grid`; None for all of the world.

    Returns:
        `pipe_or_vae` itself.

    Raises:
        TypeError: the argument has no VAE.
        ValueError: `gather` is neither "all" nor "rank0".
    """
    if gather not in ("all", "rank0"):
        raise ValueError(f"gather={gather!r}: a pipeline needs whole frames, expected 'all' or 'rank0'")
    vae = _vae_of(pipe_or_vae)
    shared: DecodeOptions = {"mode": mode, "mesh": mesh, "group": group, "memory_budget": memory_budget}
    if hasattr(type(vae), "decode"):
        options: DecodeOptions = {"grid": grid, "gather": gather}
        options = {**shared, **options}
        call = replace_call(vae, "decode", options, _warn_of_tiling)
        if pipe_or_vae is not vae:
            plan_before_denoising(pipe_or_vae, lambda z: call.choose(z, Sharing.of(options, z.device), {}))
    if hasattr(type(vae), "encode"):
        replace_call(vae, "encode", {**shared, "gather": "all"}, _warn_of_tiling)
    return pipe_or_vae


def do_without_torchvision() -> None:
    """Let Qwen's processors of pictures load without torchvision.

    Only their processor of videos needs torchvision (transformers 5), and no pipeline uses it. If torchvision is
    installed, nothing changes.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        for name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
            if (processor := getattr(transformers, name, None)) is not None:
                processor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def gather_uneven_shards() -> None:
    """Let ranks on gloo share a sequence whose length they do not divide.

    The ranks' shards then differ in length, and diffusers (0.42) gathers them by one `all_gather`. NCCL supports that,
    but gloo needs equal lengths. So shards are zero-padded before the gather and trimmed after it.
    """
    from diffusers.hooks import context_parallel

    def gathered(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        lengths: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(lengths, tensor.shape[dim], group)
        padding = [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim) + [0, max(lengths) - tensor.shape[dim]]
        padded = F.pad(tensor, padding).contiguous()
        shards = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(shards, padded, group)
        return torch.cat([shard.narrow(dim, 0, length) for shard, length in zip(shards, lengths, strict=True)], dim)

    context_parallel._all_gather_anything = gathered


def restore(pipe_or_vae: Any) -> Any:
    """Undo `parallelize`: the VAE works through diffusers again. A VAE that already does is left as it is.

    Raises:
        TypeError: the argument has no VAE.
    """
    vae = _vae_of(pipe_or_vae)
    for name in ("decode", "encode"):
        vars(vae).pop(name, None)
    vars(pipe_or_vae).pop("prepare_latents", None)
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

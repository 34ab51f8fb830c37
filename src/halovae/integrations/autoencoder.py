"""Any diffusers autoencoder on a grid of ranks: its own `decode` and `encode`, unmodified, on a partitioned plane."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from halovae.integrations.pictures import PictureStream
from halovae.integrations.plane_call import PlaneCall
from halovae.integrations.sharing import Call, Sharing
from halovae.plane import ShardReport
from halovae.platform import Platform


class Autoencoder:
    """A diffusers autoencoder that decodes and encodes on all ranks, with one process's result.

    Weights are shared with the module, which stays as it is. Every rank makes the same calls with the same tensors.

    Args:
        vae: a diffusers autoencoder whose latents have a plane: `[B, C, H, W]` or `[B, C, T, H, W]`.

    Attributes:
        module: the autoencoder itself.
        calls: "decode" and "encode", those that it has.

    Raises:
        TypeError: it has no `decode` or `encode`.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.module = vae
        self.calls = {name: PlaneCall(vae, name) for name in ("decode", "encode") if hasattr(type(vae), name)}
        if not self.calls:
            raise TypeError(f"{type(vae).__name__} has neither decode nor encode: expected a diffusers autoencoder")

    @property
    def config(self) -> Any:
        """The module's own."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def report(self) -> ShardReport | None:
        """What the last decode took; None before the first."""
        return self.calls["decode"].report if "decode" in self.calls else None

    def warmup(self, shape: Sequence[int], **options: Any) -> float:
        """Compile what later calls are made of, on the CPU, and decode zeros once. Collective: all ranks call it.

        Until it is called, the CPU computes in eager PyTorch. Compiled kernels serve other shapes as well, and are kept
        on disk: later processes load them. Accelerators choose their kernels for the shape.

        Args:
            shape: of the latents, `[B, C, H, W]` or `[B, C, T, H, W]`.
            options: as for `stream`.

        Returns:
            The seconds it took.

        Raises:
            ValueError: as `stream`.

        Warns:
            RuntimeWarning: nothing can be compiled here (no C++ compiler?); calls run in eager PyTorch.
        """
        begin = time.perf_counter()
        for call in self.calls.values():
            call.compile()
        stream = self.stream(torch.zeros(*shape, dtype=self.dtype, device=self.device), **options)
        for _ in islice(stream, 2):  # the first chunk, and one like all others
            pass
        stream.close()
        Platform(self.device).synchronize()
        return time.perf_counter() - begin

    def decode(self, latents: Tensor, **options: Any) -> Tensor | None:
        """Decode latents to pictures.

        Args:
            latents: as for `stream`, which takes the same options and raises the same errors.
            options: `mode`, `grid`, `gather`, `dtype`, `memory_budget`, and those of the module's own `decode`.

        Returns:
            What the module's `decode` returns as `sample`; None on the ranks that receive nothing.
        """
        return self.stream(latents, **options).join()

    def stream(self, latents: Tensor, **options: Any) -> PictureStream:
        """Decode latents, and yield frames as soon as they are there, where the module decodes a clip in chunks.

        Collective: all ranks take all chunks.

        Args:
            latents: `[B, C, H, W]` or `[B, C, T, H, W]`, floating point, the same on all ranks.
            mode: "auto": the grid that is predicted to be the fastest, by the recorded graph and what was measured on
                this machine (which the first decode on several ranks does, within a minute). "parallel": all ranks
                share the rows. "single": each rank decodes all by itself.
            grid: how ranks share the latents, instead of `mode`.
            gather: who receives pictures: "rank0" (the default), "all" ranks, or "none": each rank keeps its own part.
            dtype: None for the module's dtype, another floating dtype, or uint8 for pictures in 0..255.
            memory_budget: bytes that a decode may take on each rank, above the resting process; mode "auto" plans
                within them. None for what is free on the rank with the least.
            mesh: a mesh to use instead of the one that all decodes with this grid share; all its ranks share the plane.
            options: further arguments of the module's own `decode`, such as `temb` or `num_frames`.

        Yields:
            `[B, 3, T', H', W']`, or `[B, 3, H', W']` of pictures; None on the ranks that receive nothing.

        Raises:
            ValueError: see `Sharded`; an argument out of range; or a memory budget that no grid fits into
                (`TooLittleMemory`).
            TypeError: latents without a plane, a dtype that pictures cannot have, or an unknown option.
            RuntimeError: another rank refused, or was given other arguments or weights.
        """
        sharing, options = _sharing(options)
        call = self._call("decode")
        choice = call.choose(latents, sharing, options)
        return PictureStream(latents, choice, call.stream(latents, choice, sharing, options), call, sharing.mesh)

    def encode(self, pictures: Tensor, **options: Any) -> Tensor | None:
        """Encode pictures or clips.

        Args:
            pictures: `[B, C, H, W]` or `[B, C, T, H, W]` as the module's `encode` takes them.
            mode: as for `stream`; likewise `grid` and `memory_budget`. On one rank each encodes all by itself.
            gather: who receives the result: "all" ranks (the default), "rank0", or "none".
            options: further arguments of the module's own `encode`.

        Returns:
            The parameters of the latents' distribution (means, then logarithms of variances) where the module makes
            one, else the latents.

        Raises:
            ValueError: as for `stream`.
            TypeError: pictures without a plane.
            RuntimeError: another rank refused.
        """
        sharing, options = _sharing({"gather": "all", **options})
        call = self._call("encode")
        return call.stream(pictures, call.choose(pictures, sharing, options), sharing, options).join()

    def _call(self, name: Call) -> PlaneCall:
        if name not in self.calls:
            raise TypeError(f"{type(self.module).__name__} has no {name}")
        return self.calls[name]


def _sharing(options: dict[str, Any]) -> tuple[Sharing, dict[str, Any]]:
    """The options that say how ranks share a call, and those of the module's own call."""
    names = Sharing.__dataclass_fields__
    own = {name: value for name, value in options.items() if name not in names}
    return Sharing(**{name: value for name, value in options.items() if name in names}), own


def parallelize_plane(vae: nn.Module, sharing: Sharing, warn: Callable[[Any], None]) -> None:
    """Replace the `decode` and `encode` of an autoencoder's instance; see `halovae.parallelize`."""
    if hasattr(type(vae), "decode"):
        replace_call(vae, "decode", sharing, warn)
    if hasattr(type(vae), "encode"):
        replace_call(vae, "encode", Sharing(sharing.mode, gather="all"), warn)


def replace_call(vae: nn.Module, name: Call, sharing: Sharing, warn: Callable[[Any], None]) -> None:
    """Replace one of the two."""
    from diffusers.utils.accelerate_utils import apply_forward_hook

    # The hook moves an offloaded VAE to its device first, as around diffusers' own.
    vars(vae)[name] = apply_forward_hook(_method(PlaneCall(vae, name), sharing, warn)).__get__(vae)


def _method(call: PlaneCall, sharing: Sharing, warn: Callable[[Any], None]) -> Callable[..., Any]:
    name = call.name

    @functools.wraps(getattr(type(call.vae), name))
    def method(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        warn(self)
        used = call
        if self is not call.vae:  # a copy of the module, with weights of its own
            kept = vars(self).get(f"_halovae_{name}")
            used = kept if kept is not None and kept.vae is self else PlaneCall(self, name)
            vars(self)[f"_halovae_{name}"] = used
        if name == "encode" and isinstance(x, Tensor) and x.is_floating_point():
            x = x.to(next(used.vae.parameters()))  # pipelines hand over what the text encoder's dtype is
        options, as_tuple = used.arguments(x, *args, **kwargs)
        value = used.stream(x, used.choose(x, sharing, options), sharing, options).join()
        return used.result(used.blank(x) if value is None else value, as_tuple)

    vars(method)["halovae_method"] = True  # graphs do not depend on it: they are of the class's own method
    return method


def decode_options(module: nn.Module, latents: Tensor) -> dict[str, Any]:
    """What a class's `decode` needs besides latents: LTX-Video's timestep, 0 as its pipelines have it."""
    if getattr(module.config, "timestep_conditioning", False):
        return {"temb": torch.zeros(latents.shape[0], dtype=latents.dtype, device=latents.device)}
    return {}

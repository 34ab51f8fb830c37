"""Any diffusers autoencoder on a grid of ranks: its own `decode` and `encode`, unmodified, on a partitioned plane."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from halovae.device.captures import CALLS, LARGEST, captures
from halovae.device.kinds import Device
from halovae.distributed.transport import world_size
from halovae.errors import CheckpointError
from halovae.grid import Grid
from halovae.kernels.native import ready
from halovae.models import load as checkpoints
from halovae.models.classes import denormalized, moved
from halovae.plane import ShardReport
from halovae.planning.decision import Decision
from halovae.runtime.options import Call, DecodeOptions, EncodeOptions, Sharing
from halovae.runtime.pictures import PictureStream
from halovae.runtime.plane_call import PlaneCall


class VAE:
    """A diffusers autoencoder that decodes and encodes on all ranks, with one process's result.

    Weights are shared with the module, which stays as it is. Every rank makes the same calls with the same tensors.

    Args:
        vae: an autoencoder whose latents have a plane, `[B, C, H, W]` or `[B, C, T, H, W]`: diffusers', or any module
            whose `decode` and `encode` take a tensor and return one.

    Attributes:
        module: the autoencoder itself.
        calls: "decode" and "encode", those that it has.

    Raises:
        TypeError: it has no `decode` or `encode`.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.module = vae
        names: list[Call] = ["decode"]
        if not isinstance(getattr(vae, "encoder", None), checkpoints.NoEncoder):
            names.append("encode")
        self.calls = {name: PlaneCall(vae, name) for name in names if hasattr(type(vae), name)}
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

    def warmup(self, shape: Sequence[int], **options: Unpack[DecodeOptions]) -> float:
        """Do what only the first decode of a shape does, and decode zeros once. Collective: all ranks call it.

        On the CPU it waits for the compiler: the first process on a machine compiles for some seconds, in the
        background, and until then computes in eager PyTorch. Accelerators choose their algorithms for the shape by
        measuring them, and capture the work as a graph where they have such (`Captures`).

        Args:
            shape: of the latents, `[B, C, H, W]` or `[B, C, T, H, W]`.
            options: as for `stream`.

        Returns:
            The seconds it took.

        Raises:
            ValueError: as `stream`.

        Warns:
            RuntimeWarning: once a process, where nothing can be compiled (no C++ compiler?): calls run in eager
                PyTorch.
        """
        begin, device = time.perf_counter(), Device(self.device)
        ready(self.device, wait=True)
        zeros = torch.zeros(*shape, dtype=self.dtype, device=self.device)

        def decode(chunks: int) -> None:
            stream = self.stream(zeros, **options)
            for _ in islice(stream, chunks):
                pass
            stream.close()

        with device.choosing():
            decode(2)  # the first chunk, and one like all others
        if self._is_captured(zeros, options):
            for _ in range(CALLS + 1):
                decode(3)  # those that are computed by other graphs than all others, and one of these
        device.synchronize()
        return time.perf_counter() - begin

    def _is_captured(self, latents: Tensor, options: DecodeOptions) -> bool:
        """Whether decodes of such latents may be captured as graphs."""
        if not captures(self.device).allowed or options.get("memory_budget") is not None or world_size() > 1:
            return False
        peak = self._call("decode").peak(latents, options.get("module_kwargs") or {})
        return not isinstance(peak, str) and peak[0] <= LARGEST

    def plan(self, shape: Sequence[int], **options: Unpack[DecodeOptions]) -> Decision | None:
        """Say how ranks would share a decode, and why, without decoding. Collective: all ranks call it.

        Args:
            shape: of the latents, `[B, C, H, W]` or `[B, C, T, H, W]`.
            options: as for `stream`.

        Returns:
            The grid that mode "auto" takes and those that lost, each with its predicted seconds, memory, and messages.
            None where there is nothing to predict: another mode, one rank without a budget, or a module that no graph
            can be recorded of.

        Raises:
            ValueError, TypeError: as `stream`.
        """
        call = self._call("decode")
        sharing, own = self._read(call, options, DecodeOptions)
        return call.choose(torch.zeros(*shape, dtype=self.dtype, device=self.device), sharing, own).decision

    def why_eager(self, shape: Sequence[int], name: Call = "decode", **module_kwargs: Any) -> str:
        """Say why a call on one rank runs eagerly, without a recorded graph, plans, or strips.

        Args:
            shape: of the latents, or of the pictures for "encode".
            name: which call.
            module_kwargs: further arguments of the module's own call.

        Returns:
            The reason; empty if a graph was recorded.
        """
        weight = next(self.module.parameters())
        found = self._call(name).peak(weight.new_zeros(()).expand(*shape), module_kwargs)
        return found if isinstance(found, str) else ""

    def decode(self, latents: Tensor, **options: Unpack[DecodeOptions]) -> Tensor | None:
        """Decode latents to pictures.

        Args:
            latents: as for `stream`, which takes the same options and raises the same errors.
            options: as for `stream`.

        Returns:
            What the module's `decode` returns as `sample`; None on the ranks that receive nothing.
        """
        return self.stream(latents, **options).join()

    def decode_many(self, latents: Sequence[Tensor], **options: Unpack[DecodeOptions]) -> list[Tensor | None]:
        """Decode latents of one size, but maybe of different lengths, as one batch, where time is known to be causal.

        Shorter latents are zero-padded to the longest. Padded frames are decoded and discarded: time is causal, so they
        do not reach earlier ones.

        Args:
            latents: each `[C, T, H, W]`.
            options: as for `stream`, but for gather="none".

        Returns:
            For each, `[3, T', H', W']`; None on the ranks that receive nothing.

        Raises:
            ValueError: there are none, they differ in more than length, or as `stream` raises it.
            TypeError: an autoencoder of which it is not known whether time is causal.
        """
        sizes = self._call("decode").sizes
        if sizes is None:
            raise TypeError(
                f"{type(self.module).__name__}: latents of different lengths only make a batch where time is known to "
                f"be causal: expected {' or '.join(checkpoints.CLASSES)}"
            )
        shapes = [list(one.shape) for one in latents]
        if not latents or any(len(shape) != 4 for shape in shapes) or len({(s[0], s[2], s[3]) for s in shapes}) > 1:
            raise ValueError(f"latents of shapes {shapes}: expected at least one, [C, T, H, W], all of one C, H and W")
        if options.get("gather") == "none":
            raise ValueError("gather='none': the latents of a batch need whole frames, expected 'rank0' or 'all'")
        longest = max(shape[1] for shape in shapes)
        filled = torch.stack([F.pad(one, (0, 0, 0, 0, 0, longest - one.shape[1])) for one in latents])
        frames = self.decode(filled, **options)
        if frames is None:
            return [None] * len(latents)
        return [own[:, : sizes.frames(shape[1])] for own, shape in zip(frames, shapes, strict=True)]

    def stream(self, latents: Tensor, **options: Unpack[DecodeOptions]) -> PictureStream:
        """Decode latents, and yield frames as soon as they are there, where the module decodes a clip in chunks.

        Collective: all ranks take all chunks.

        Args:
            latents: `[B, C, H, W]` or `[B, C, T, H, W]`, floating point, on any device, the same on all ranks. They
                are decoded in the module's dtype.
            options: keyword arguments, all of them optional:

                - `mode`: "auto", the default: the grid that is predicted to be the fastest, by the recorded graph and
                  what was measured on this machine (which the first decode on several ranks does, within a minute).
                  "parallel": all ranks share the rows. "single": each rank decodes all by itself.
                - `grid`: how ranks share the latents, instead of `mode`.
                - `gather`: who receives pictures: "rank0", the default; "all" ranks; or "none": each rank keeps its own
                  shard.
                - `dtype`: None for the module's dtype, another floating dtype, or uint8 for pictures in 0..255.
                - `denormalize`: undo first what pipelines do to latents, as the config says it: a mean and a standard
                  deviation for each channel, or a scaling and a shift. Off, as in diffusers.
                - `memory_budget`: bytes that a decode may take on each rank, above the resting process; mode "auto"
                  plans within them. None for what is free on the rank with the least.
                - `mesh`: the ranks and their grid: a `torch.distributed.DeviceMesh` with dims out of "batch", "rows",
                  and "cols", in this order, which may leave out ranks of the world; or a `halovae.Mesh`.
                - `group`: the ranks, as a process group, which share the latents by `mode` or `grid`. None for all of
                  the world. Ranks outside of it do not call.
                - `module_kwargs`: further arguments of the module's own `decode`, such as `temb` or `num_frames`.

        Yields:
            `[B, 3, T', H', W']`, or `[B, 3, H', W']` of pictures; None on the ranks that receive nothing.

        Raises:
            ValueError: see `Sharded`; an argument out of range; a memory budget that no grid fits into
                (`MemoryBudgetError`); or a config that does not say how to denormalize.
            TypeError: latents without a plane, a dtype that pictures cannot have, or an unknown option.
            RuntimeError: another rank refused, or was given other arguments or weights.

        Warns:
            RuntimeWarning: the latents hold NaN or infinite values; the decode goes on.
        """
        call = self._call("decode")
        sharing, own = self._read(call, options, DecodeOptions)
        if isinstance(latents, Tensor) and latents.is_floating_point():
            try:
                if options.get("denormalize"):
                    if call.sizes is not None:
                        call.sizes.check_latents(latents.shape, latents.dtype, Grid())
                    latents = denormalized(latents, self.config, type(self.module).__name__)
            except ValueError as error:
                call.refuse(sharing, error)
            latents = moved(self.module, latents)
        choice = call.choose(latents, sharing, own)
        chunks = call.stream(latents, choice, sharing, own)
        return PictureStream(latents, choice, chunks, call, call.everyone(sharing), sharing.memory_budget is None)

    def encode(self, pictures: Tensor, **options: Unpack[EncodeOptions]) -> Tensor | None:
        """Encode pictures or clips.

        Args:
            pictures: `[B, C, H, W]` or `[B, C, T, H, W]` as the module's `encode` takes them.
            options: `mode`, `grid`, `memory_budget`, `mesh`, and `group` as for `stream`; `gather`: who receives the
                result: "all" ranks, the default; "rank0"; or "none"; `module_kwargs`: further arguments of the module's
                own `encode`.

        Returns:
            The parameters of the latents' distribution (means, then logarithms of variances) where the module makes
            one, else the latents.

        Raises:
            ValueError: as for `stream`.
            TypeError: pictures without a plane, or an unknown option.
            RuntimeError: another rank refused.
        """
        call = self._call("encode")
        sharing, own = self._read(call, {"gather": "all", **options}, EncodeOptions)
        return call.stream(pictures, call.choose(pictures, sharing, own), sharing, own).join()

    def _call(self, name: Call) -> PlaneCall:
        if name not in self.calls:
            raise TypeError(f"{type(self.module).__name__} has no {name}, or was loaded without")
        return self.calls[name]

    def _read(self, call: PlaneCall, options: Mapping[str, Any], known: type) -> tuple[Sharing, Mapping[str, Any]]:
        """How ranks share a call, and the arguments of the module's own call. All ranks learn of an unknown option."""
        sharing = Sharing.of(options, self.device)
        unknown = ", ".join(sorted(options.keys() - known.__annotations__.keys()))
        if unknown:
            expected = ", ".join(known.__annotations__)
            call.refuse(
                sharing,
                TypeError(
                    f"{call.name}: unknown option {unknown}; expected {expected}. Arguments of the module's own "
                    f"{call.name} go into module_kwargs"
                ),
            )
        return sharing, options.get("module_kwargs") or {}


def replace_call(vae: nn.Module, name: Call, options: DecodeOptions, warn: Callable[[Any], None]) -> PlaneCall:
    """Replace the `decode` or `encode` of an autoencoder's instance, and return what stands in its place.

    Args:
        vae: the autoencoder.
        name: which of the two.
        options: how ranks share it.
        warn: is called with the autoencoder at each call.
    """
    from diffusers.utils.accelerate_utils import apply_forward_hook

    # The hook moves an offloaded VAE to its device first, as around diffusers' own.
    call = PlaneCall(vae, name)
    vars(vae)[name] = apply_forward_hook(_method(call, options, warn)).__get__(vae)
    return call


def _method(call: PlaneCall, given: DecodeOptions, warn: Callable[[Any], None]) -> Callable[..., Any]:
    name = call.name

    @functools.wraps(getattr(type(call.vae), name))
    def method(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        warn(self)
        used = call
        if self is not call.vae:  # a copy of the module, with weights of its own
            kept = vars(self).get(f"_halovae_{name}")
            used = kept if kept is not None and kept.vae is self else PlaneCall(self, name)
            vars(self)[f"_halovae_{name}"] = used
        if isinstance(x, Tensor) and x.is_floating_point():
            x = moved(used.vae, x)  # pipelines hand over what the transformer's dtype is
        options, as_tuple = used.arguments(x, *args, **kwargs)
        sharing = Sharing.of(given, next(used.vae.parameters()).device)
        value = used.stream(x, used.choose(x, sharing, options), sharing, options).join()
        return used.result(used.blank(x) if value is None else value, as_tuple)

    vars(method)["halovae_method"] = True  # graphs do not depend on it: they are of the class's own method
    return method


def load(
    source: str | Path | nn.Module,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    encoder: bool = True,
) -> VAE:
    """Make a `VAE` of a diffusers VAE, a folder in diffusers layout, a file, or a hub id.

    Args:
        source: a live diffusers autoencoder, whose parameters are shared, not copied; a folder with `config.json` and
            `.safetensors` files, or a pipeline's folder with such a one as `vae/`; a single file of a layout that is
            known, alone or among a whole pipeline's weights (docs/checkpoints.md); or a hub id.
        subfolder: where in the folder or the repository the VAE is; None tries the top and `vae/`.
        dtype: what weights that come from files are converted to.
        device: where weights that come from files go; None for this process's accelerator, or the CPU without one.
        encoder: whether to load what only encodes, from files. Without it there is no `encode`.

    Raises:
        halovae.CheckpointError: an unsupported class, a file of an unknown layout, damaged files, missing or unexpected
            weights (named).
    """
    if isinstance(source, nn.Module):
        try:
            return VAE(source)
        except TypeError as error:
            raise CheckpointError(str(error)) from error
    path = checkpoints.find_model(source, subfolder)
    target = Device.default().torch_device if device is None else torch.device(device)
    return VAE(checkpoints.diffusers_module(path, dtype, encoder).to(target))

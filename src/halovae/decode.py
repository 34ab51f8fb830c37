"""A decoder of latents: what a decode may be asked for, checked, and where decoders come from."""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halovae import kernels
from halovae.geometry import Grid
from halovae.integrations.autoencoder import Autoencoder
from halovae.kernels import Kernels
from halovae.lines import world_size
from halovae.loop import Gather, Request
from halovae.mesh import Mesh, mesh_for
from halovae.models import load as checkpoints
from halovae.models.wan import WanConfig, WanDecoder
from halovae.models.weights import CheckpointError
from halovae.planning.choose import Question
from halovae.planning.plan import Chunk, Plan
from halovae.planning.planner import decide
from halovae.platform import Platform
from halovae.stream import FrameStream

HaloDepth = int | Mapping[str, int]
Mode = Literal["auto", "single", "parallel"]


class Decoder:
    """Decodes latents to frames, on one device or on a grid of ranks, with the same result.

    A decoder holds weights and no state of a decode: several decodes may run at once. On a grid of
    several ranks, every rank makes the same calls with the same latents.
    """

    def __init__(self, model: WanDecoder) -> None:
        self.model = model
        self._used: set[str] = set()  # what has been decoded before, for the reports
        self._kernels = kernels.EAGER

    @property
    def config(self) -> WanConfig:
        """The model's sizes."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which the decoder computes."""
        return next(self.model.parameters()).dtype

    @property
    def kernels(self) -> Kernels:
        """What it computes with: eager, or compiled once it is warmed up."""
        return self._kernels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def warmup(self, shape: Sequence[int], **options: Any) -> float:
        """Compile what later decodes are made of, measure this machine if nobody has yet, and decode zeros once.

        Without it, decodes run in eager PyTorch. What is compiled serves other shapes as well, and is kept on disk, so
        that another process only loads it. On several ranks, all of them call.

        Args:
            shape: of the latents, `[B, C, T, H, W]`.
            options: `mode`, `grid`, `chunk`, `halo_depth`, `memory_budget` and `mesh` as for `stream`.

        Returns:
            The seconds it took.

        Raises:
            ValueError: as `stream`.

        Warns:
            RuntimeWarning: nothing can be compiled here (no C++ compiler?); decodes run in eager PyTorch.
        """
        begin = time.perf_counter()
        self._kernels = kernels.compiled() if kernels.works(self.device) else kernels.EAGER
        stream = self.stream(torch.zeros(*shape), **options)
        for _ in islice(stream, 2):  # the first chunk, and one like all others
            pass
        stream.close()
        Platform(self.device).synchronize()
        return time.perf_counter() - begin

    def decode(self, latents: Tensor, **options: Any) -> Tensor | None:
        """Decode latents to all their frames at once; see `stream` for the options and for what is raised.

        Returns:
            `[B, 3, T', H', W']` as `stream` yields it, over all frames. None on the ranks that receive nothing. With
            gather="none", this rank's shard.
        """
        return self.stream(latents, **options).join()

    def decode_many(self, latents: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
        """Decode latents of one size, but maybe of different lengths, as one batch.

        Time is causal: what comes after a latent's end cannot reach its frames. Shorter ones are filled up with zeros
        to the longest one's length, and the frames of the filling, which cost what others do, are dropped.

        Args:
            latents: each `[C, T, H, W]`.
            options: as for `stream`; with gather="none" nobody would know whose frames are whose, so that is refused.

        Returns:
            For each, `[3, T', H', W']`; None on the ranks that receive nothing.

        Raises:
            ValueError: there are none, they differ in more than length, or as `stream` raises it.
        """
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
        return [own[:, : self.config.frames(shape[1])] for own, shape in zip(frames, shapes, strict=True)]

    def stream(
        self,
        latents: Tensor,
        *,
        mode: Mode = "auto",
        grid: Grid | None = None,
        chunk: Chunk | None = None,
        gather: Gather = "rank0",
        dtype: torch.dtype | None = None,
        halo_depth: HaloDepth | None = None,
        denormalize: bool = False,
        memory_budget: int | None = None,
        plan: Plan | None = None,
        mesh: Mesh | None = None,
    ) -> FrameStream:
        """Decode latents chunk by chunk, and yield each chunk's frames as soon as they are final.

        Args:
            latents: `[B, C, T, H, W]`, floating point, the same on all ranks; T = 1 is an image.
            mode: "auto": the plan that is predicted to be the fastest, from what was measured on this machine (which
                the first decode on several ranks does, within a minute). "single": one rank decodes. "parallel": all
                ranks share the rows.
            grid: how the ranks share the latents, instead of `mode`. On 1x1 each rank decodes all by itself.
            chunk: how many latent frames go through the decoder at once, after the first one, which goes alone;
                "all" for the rest in one. Memory grows with it. None leaves it to mode "auto", and is 1 elsewhere.
            gather: who receives frames: "rank0", "all" ranks, or "none": each rank keeps its own shard.
            dtype: None for the model's dtype, another floating dtype, or uint8 for pictures in 0..255.
            halo_depth: how many convolutions one halo exchange lasts, 1 or more: for all blocks, or by the names in
                `config.blocks` (1 where not named). Deeper halos mean fewer messages and more rows computed twice.
                No halo gets deeper than the smallest shard. None leaves it to mode "auto", and is 1 elsewhere.
            denormalize: multiply by the config's latents_std and add latents_mean first. Off, as in diffusers, where
                the pipeline does it.
            memory_budget: bytes that a decode may take on each rank, above the resting process; mode "auto" plans
                within them. None for what is free on the rank with the least.
            plan: a plan of one's own, instead of `mode`, `grid`, `chunk` and `halo_depth`.
            mesh: a mesh to use instead of the one that all decodes with this grid share.

        Yields:
            `[B, 3, T', H', W']` on the ranks that receive frames, None on the others: one frame for the first latent
            frame, `config.temporal_factor` for each later one. [-1, 1] in a floating dtype, 0..255 in uint8.

        Raises:
            ValueError: latents of another shape than the model's, more ranks than rows or cols, a grid that does not
                match the world, or an argument out of range.
            TooLittleMemory: (a ValueError) no plan fits into the memory budget; says what would.
            TypeError: latents or `dtype` of a kind that cannot be decoded.
            RuntimeError: another rank refused its arguments, or was given other ones.

        Warns:
            RuntimeWarning: the latents hold NaN or infinite values; the decode goes on.
        """
        everyone = mesh or mesh_for(Grid(rows=world_size()), self.device)
        error, depths = None, None
        try:
            if mesh is not None and grid not in (None, mesh.grid):
                raise ValueError(f"grid {grid} is not the grid of the given mesh, {mesh.grid}: leave one of them out")
            if mesh is None and grid is not None:
                mesh_for(grid, self.device)  # refuses one that does not match the world
            if mesh is None and grid is None and mode == "parallel":
                grid = Grid(rows=world_size())
            check_latents(self.config, latents.shape, latents.dtype, mesh.grid if mesh else grid or Grid())
            if plan is not None and (mesh, grid, chunk, halo_depth) != (None, None, None, None):
                raise ValueError("plan= says it all: leave mesh, grid, chunk and halo_depth out")
            depths = None if halo_depth is None else self._depths(halo_depth)
            check_choice("mode", mode, get_args(Mode))
            check_choice("gather", gather, get_args(Gather))
            if chunk not in (None, "all") and not (isinstance(chunk, int) and chunk >= 1):
                raise ValueError(f"chunk={chunk!r}: expected a number of latent frames >= 1, or 'all'")
            if dtype is not None and not dtype.is_floating_point and dtype != torch.uint8:
                raise TypeError(f"dtype={dtype}: expected a floating dtype or torch.uint8")
            if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
                raise ValueError(f"memory_budget={memory_budget!r}: expected a number of bytes > 0")
        except (ValueError, TypeError) as refused:
            error = refused
        asked = (
            f"{list(latents.shape)}, mode {mode}, plan {plan}, grid {grid}, chunk {chunk}, gather {gather}, "
            f"dtype {dtype}, depths {depths}, budget {memory_budget}, {self.dtype}"
        )
        offers = everyone.agree(asked, error, (everyone.platform.memory()[0], socket.gethostname()))
        _warn_unless_finite(latents)
        request = Request(gather, dtype or self.dtype, denormalize, self._kernels)
        decision, batch, world = None, latents.shape[0], everyone.lines.world
        if plan is not None:
            _check_plan(plan, batch, latents.shape[3], world, gather)
        elif mesh is not None:
            plan = Plan.of(batch, mesh.grid, chunk or 1, depths, apart=mesh.alone)
        elif grid is not None:
            plan = Plan.of(batch, grid, chunk or 1, depths, apart=grid.size == 1)
        elif mode == "auto":
            question = Question(
                self.config, tuple(latents.shape), self.dtype, world, memory_budget, gather, request.dtype,
                self._kernels is not kernels.EAGER, self.device.type, chunk=chunk, depths=depths,
            )  # fmt: skip
            decision = decide(question, everyone, offers, self._kernels)
            plan = decision.chosen.plan
        else:
            plan = Plan.of(batch, Grid(), chunk or 1, depths, apart=world == 1 or gather == "all")
        key = f"{plan}: {asked}"
        first_use = key not in self._used
        self._used.add(key)
        plans = [plan] if decision is None else [plan, *decision.leaner()]
        return FrameStream(self.model, latents, plans, request, first_use, decision, mesh)

    def _depths(self, halo_depth: HaloDepth) -> dict[str, int]:
        depths = {"": 1, **({"": halo_depth} if isinstance(halo_depth, int) else halo_depth)}
        for block, depth in depths.items():
            if block:
                check_choice("halo_depth", block, self.config.blocks)
            if not (isinstance(depth, int) and depth >= 1):
                raise ValueError(f"halo_depth={halo_depth!r}: a depth must be an integer >= 1")
        return depths


def load(
    source: str | Path | nn.Module,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Any:
    """Make a decoder from a diffusers VAE, a folder in diffusers layout, a file, or a hub id.

    Args:
        source: a live diffusers autoencoder, whose parameters are shared, not copied; a folder with `config.json` and
            `.safetensors` files, or a pipeline's folder with such a one as `vae/`; a single file of a layout that is
            known, alone or among a whole pipeline's weights (docs/checkpoints.md); or a hub id.
        subfolder: where in the folder or the repository the VAE is; None tries the top and `vae/`.
        dtype: what weights that come from files are converted to.
        device: where weights that come from files go; None for this process's accelerator, or the CPU without one.

    Returns:
        A `Decoder` for `AutoencoderKLWan` and `AutoencoderKLQwenImage`; for other classes an `Autoencoder`, which
        needs diffusers.

    Raises:
        halovae.CheckpointError: an unsupported class, a file of an unknown layout, damaged files, missing or unexpected
            weights (named).
    """
    if isinstance(source, nn.Module):
        known = type(source).__name__ in checkpoints.CLASSES
        try:
            return Decoder(checkpoints.from_module(source)) if known else Autoencoder(source)
        except TypeError as error:
            raise CheckpointError(str(error)) from error
    path = checkpoints.find_model(source, subfolder)
    target = Platform.default().device if device is None else torch.device(device)
    if checkpoints.read_class(path) not in checkpoints.CLASSES:
        return Autoencoder(checkpoints.diffusers_module(path, dtype).to(target))
    return Decoder(checkpoints.from_files(path, dtype, target))


def check_latents(config: WanConfig, shape: Sequence[int], dtype: torch.dtype, grid: Grid) -> None:
    """Check that latents of this shape and dtype can be decoded by this model on this grid.

    Raises:
        ValueError: what is wrong with the shape, or which grids are possible.
        TypeError: the dtype is not floating point.
    """
    expected = f"[B, {config.z_dim}, T, H, W] for {config.family}"
    if len(shape) != 5:
        raise ValueError(f"latents of shape {list(shape)} have {len(shape)} dims; expected 5: {expected}")
    if shape[1] != config.z_dim:
        raise ValueError(f"latents of shape {list(shape)} have {shape[1]} channels; expected {expected}")
    if min(shape) < 1:
        raise ValueError(f"latents of shape {list(shape)} are empty; expected {expected}, each at least 1")
    if not dtype.is_floating_point:
        raise TypeError(f"latents of dtype {dtype}; expected a floating dtype, such as torch.float32 or torch.bfloat16")
    grid.shards(shape[0], shape[3], shape[4])


def _check_plan(plan: Plan, batch: int, height: int, world: int, gather: Gather) -> None:
    if gather == "none" and len(plan.stages) > 1:
        raise ValueError(f"plan {plan} has several stages: gather='none' needs a single one")
    items = [index for stage in plan.stages for index in range(stage.items.start, stage.items.stop)]
    if items != list(range(batch)):
        raise ValueError(f"plan {plan}: its stages hold the latents {items}; expected each of {batch} once, in order")
    for stage in plan.stages:
        if not 1 <= plan.bands <= (rows := height // stage.grid.rows):
            raise ValueError(f"plan {plan}: bands={plan.bands}, expected 1 to {rows}, the rows of the smallest shard")
    if max(stage.grid.size for stage in plan.stages) > world:
        raise ValueError(f"plan {plan} needs more ranks than the {world} there are")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of its choices.

    Raises:
        ValueError: it is none; names all.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def _warn_unless_finite(latents: Tensor) -> None:
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        warnings.warn(
            f"latents hold {bad} NaN or infinite values among {latents.numel()}; the frames they touch will be broken",
            RuntimeWarning,
            stacklevel=4,
        )

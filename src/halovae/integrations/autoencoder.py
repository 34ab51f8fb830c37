"""Any diffusers autoencoder on a grid of ranks: its own `decode` and `encode`, unmodified, on a partitioned plane."""

from __future__ import annotations

import functools
import inspect
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from halovae.geometry import Grid
from halovae.integrations.pictures import PictureStream
from halovae.kernels import EAGER
from halovae.lines import world_size
from halovae.mesh import mesh_for
from halovae.plane import Sharded, ShardReport
from halovae.plane.sharded import Chunks, Gather, hooked, value_key
from halovae.planning.choose import Decision, TooLittleMemory
from halovae.planning.graphs import Search, UnplannableError
from halovae.planning.planner import calibration_of, usable

Call = Literal["decode", "encode"]
Mode = Literal["auto", "single", "parallel"]
BATCHED = ("AutoencoderKLTemporalDecoder",)  # the batch is the frames of one clip
FIELDS = ("sample", "latent_dist", "latent", "latents")  # of what diffusers' autoencoders return


class Autoencoder:
    """A diffusers autoencoder that decodes and encodes on all ranks, with one process's result.

    Weights are shared with the module, which stays as it is. Every rank makes the same calls with the same tensors.

    Args:
        vae: a diffusers autoencoder whose latents have a plane: `[B, C, H, W]` or `[B, C, T, H, W]`.

    Raises:
        TypeError: it has no `decode` or `encode`.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.module = vae
        self._calls = {name: PlaneCall(vae, name) for name in ("decode", "encode") if hasattr(type(vae), name)}
        if not self._calls:
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
        return self._calls["decode"].report if "decode" in self._calls else None

    def decode(
        self,
        latents: Tensor,
        *,
        mode: Mode = "auto",
        grid: Grid | None = None,
        gather: Gather = "rank0",
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        **options: Any,
    ) -> Tensor | None:
        """Decode latents to pictures.

        Args:
            latents: `[B, C, H, W]` or `[B, C, T, H, W]`, floating point, the same on all ranks.
            mode: "auto": the grid that is predicted to be the fastest, by the recorded graph and what was measured on
                this machine (which the first decode on several ranks does, within a minute). "parallel": all ranks
                share the rows. "single": each rank decodes all by itself.
            grid: how ranks share the latents, instead of `mode`.
            gather: who receives pictures: "rank0", "all" ranks, or "none": each rank keeps its own part.
            dtype: None for the module's dtype, another floating dtype, or uint8 for pictures in 0..255.
            memory_budget: bytes that a decode may take on each rank, above the resting process; mode "auto" plans
                within them. None for what is free on the rank with the least.
            options: further arguments of the module's own `decode`, such as `temb` or `num_frames`.

        Returns:
            What the module's `decode` returns as `sample`; None on the ranks that receive nothing.

        Raises:
            ValueError: see `Sharded`; or a memory budget that no grid fits into (`TooLittleMemory`).
            TypeError: latents without a plane, or a dtype that pictures cannot have.
            RuntimeError: another rank refused, or was given other arguments or weights.
        """
        return self.stream(
            latents, mode=mode, grid=grid, gather=gather, dtype=dtype, memory_budget=memory_budget, **options
        ).join()

    def stream(
        self,
        latents: Tensor,
        *,
        mode: Mode = "auto",
        grid: Grid | None = None,
        gather: Gather = "rank0",
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        **options: Any,
    ) -> PictureStream:
        """Decode latents, and yield frames as soon as they are there, where the module decodes a clip in chunks.

        Args:
            latents: as for `decode`; likewise all others.
            mode: how ranks share them.
            grid: instead of `mode`.
            gather: who receives pictures.
            dtype: of the pictures.
            memory_budget: bytes for each rank.
            options: of the module's own `decode`.

        Yields:
            `[B, 3, T', H', W']`, or `[B, 3, H', W']` of pictures; None on the ranks that receive nothing.

        Raises:
            ValueError: as for `decode`; likewise the others.
            TypeError: latents without a plane, or a dtype that pictures cannot have.
            RuntimeError: another rank refused.
        """
        if dtype is not None and not dtype.is_floating_point and dtype != torch.uint8:
            raise TypeError(f"dtype={dtype}: expected a floating dtype or torch.uint8")
        call = self._call("decode")
        choice = call.choose(latents, mode, grid, gather, options, memory_budget)
        return PictureStream(self.module, latents, choice, call.stream(latents, choice, gather, options), call, dtype)

    def encode(
        self, pictures: Tensor, *, mode: Mode = "auto", grid: Grid | None = None, gather: Gather = "all", **options: Any
    ) -> Tensor | None:
        """Encode pictures or clips.

        Args:
            pictures: `[B, C, H, W]` or `[B, C, T, H, W]` as the module's `encode` takes them.
            mode: "auto" and "parallel": all ranks share the rows, or in mode "auto" the cols where there are too few
                rows. "single": each rank encodes all by itself.
            grid: instead of `mode`.
            gather: who receives the result.
            options: further arguments of the module's own `encode`.

        Returns:
            The parameters of the latents' distribution (means, then logarithms of variances) where the module makes
            one, else the latents.

        Raises:
            ValueError: see `Sharded`.
            TypeError: pictures without a plane.
            RuntimeError: another rank refused, or was given other arguments or weights.
        """
        call = self._call("encode")
        return call.stream(pictures, call.choose(pictures, mode, grid, gather, options, None), gather, options).join()

    def _call(self, name: Call) -> PlaneCall:
        if name not in self._calls:
            raise TypeError(f"{type(self.module).__name__} has no {name}")
        return self._calls[name]


@dataclass(frozen=True)
class Choice:
    """How ranks share a call.

    Attributes:
        grid: of ranks.
        items: how many of the batch go at once; one round after the other.
        decision: why, if that was predicted.
        kept: bytes of the pictures, which a rank that receives them holds besides.
    """

    grid: Grid
    items: int
    decision: Decision | None = None
    kept: int = 0


class PlaneCall:
    """One of an autoencoder's two calls, sharded.

    Args:
        vae: the autoencoder.
        name: which call.
    """

    def __init__(self, vae: nn.Module, name: Call) -> None:
        self.vae, self.name = vae, name
        self._own: Callable[..., Any] = getattr(type(vae), name)
        self.signature = inspect.signature(self._own)
        config = getattr(vae, "config", None)
        ratio = vars(vae).get("spatial_compression_ratio", getattr(config, "spatial_compression_ratio", None))
        levels = len(getattr(config, "block_out_channels", None) or (0,))
        multiple = int(ratio) if isinstance(ratio, (int, float)) else 2 ** (levels - 1)
        self._sharded = Sharded(self._run, [vae], multiple if name == "encode" else 1)
        self._choices: dict[str, Choice] = {}
        # Of the result: its class, the field that counts, and the class of a distribution in there.
        self.kind: tuple[type, str, type | None] = (Tensor, "", None)

    @property
    def report(self) -> ShardReport | None:
        """What the last call took."""
        return self._sharded.report

    def choose(
        self, x: Tensor, mode: Mode, grid: Grid | None, gather: Gather, options: dict[str, Any],
        memory_budget: int | None,
    ) -> Choice:  # fmt: skip
        """How ranks share a call. Collective in mode "auto".

        Raises:
            ValueError: an unknown mode, or a budget below 1.
            TooLittleMemory: (a ValueError) no grid fits into the budget.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(get_args(Mode))}")
        if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
            raise ValueError(f"memory_budget={memory_budget!r}: expected a number of bytes > 0")
        if not isinstance(x, Tensor) or x.ndim not in (4, 5) or not x.numel() or not x.is_floating_point():
            return Choice(grid or Grid(), 1)  # refused on all ranks in a moment
        world, batch = world_size(), x.shape[0]
        if grid is not None or mode == "single" or (world == 1 and memory_budget is None):
            return Choice(grid or Grid(), batch)
        if mode == "auto" and self.name == "decode":
            try:
                return self._decided(x, options, gather, memory_budget)
            except UnplannableError:
                pass  # it runs eagerly
        height, width = x.shape[-2:]
        if height >= world or mode == "parallel":
            return Choice(Grid(rows=world), batch)
        return Choice(Grid(cols=world) if width >= world else Grid(), batch)

    def _decided(self, x: Tensor, options: dict[str, Any], gather: Gather, memory_budget: int | None) -> Choice:
        """The grid that is predicted to be the fastest of those that fit; all ranks ask together, and decide alike."""
        tensors, static = self._bound(x, options)
        told, moved = value_key(static), next(hooked(self.vae), None)
        if told is None or moved is not None:
            raise UnplannableError("an option is no plain value, or hooks move weights: it runs eagerly")
        batch, names = x.shape[0], ",".join(tensors)
        asked = f"{list(x.shape)}, {x.dtype}, {told}, {[list(one.shape) for one in tensors.values()]}, {gather}"
        everyone = mesh_for(Grid(rows=world_size()), x.device)
        free = everyone.platform.memory()[0], socket.gethostname()
        offers = everyone.agree(f"decode {asked}, budget {memory_budget}", None, free)
        budget = memory_budget or usable(offers, everyone.platform.kind)
        known = self._choices.get(asked)
        if known is not None and known.decision is not None and known.decision.stands(budget - known.kept):
            return known

        def search(items: int) -> Search:
            return Search(
                lambda z: self._run(z, *tensors.values(), _names=names, **static), self.vae, (items, *x.shape[1:]),
                x.dtype, calibration_of(everyone, x.dtype, EAGER), batch // items, budget,
                len({host for _, host in offers}) > 1, all_ranks=True,
            )  # fmt: skip

        # Noise is drawn for all items at once, and other tensors may belong to all of them.
        whole = batch == 1 or bool(tensors) or any(kind.__name__ in BATCHED for kind in type(self.vae).__mro__)
        found = search(batch if whole else 1)
        first = found.traced(Grid())
        if not whole and first.random:
            whole = True
            first = (found := search(batch)).traced(Grid())
        kept = 0 if gather == "none" else math.prod(first.pictures) * x.element_size() * (1 if whole else batch)
        if kept >= budget:
            raise TooLittleMemory(
                f"latents {list(x.shape)} do not fit into a memory budget of {budget / 2**20:,.1f} MiB: their pictures "
                f"alone take {kept / 2**20:,.1f} MiB"
            )
        decision = found.within(budget - kept).decide(world_size())
        grid = decision.chosen.plan.stages[0].grid
        items = batch if whole or gather == "none" else grid.batch
        choice = self._choices[asked] = Choice(grid, items, decision, kept)
        return choice

    def _bound(self, x: Tensor, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Further tensors, and other arguments, by name."""
        parameters = list(self.signature.parameters)
        bound = dict(self.signature.bind(self.vae, x, **options).arguments)
        bound.pop("return_dict", None)
        rest = {name: value for name, value in bound.items() if name not in parameters[:2]}
        rest |= rest.pop("kwargs", {})
        tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
        return tensors, {name: value for name, value in rest.items() if name not in tensors}

    def stream(self, x: Tensor, choice: Choice, gather: Gather, options: dict[str, Any]) -> Chunks:
        """The result in chunks, as `Sharded.stream` has them; that of several rounds at once."""
        if not isinstance(x, Tensor) or x.ndim not in (4, 5):
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{type(self.vae).__name__}.{self.name} of {shape}: expected [B, C, H, W] or [B, C, T, H, W]; "
                "audio and other autoencoders without a plane of rows and cols cannot be partitioned"
            )
        tensors, static = self._bound(x, options)
        static["_names"] = ",".join(tensors)
        if choice.items >= x.shape[0]:
            return self._sharded.stream(x, *tensors.values(), grid=choice.grid, gather=gather, options=static)
        return Chunks(self._rounds(x, choice, gather, static))

    def _rounds(self, x: Tensor, choice: Choice, gather: Gather, options: dict[str, Any]) -> Iterator[Tensor | None]:
        """All items, a few at a time."""
        whole, taken = None, []
        for start in range(0, x.shape[0], choice.items):
            some = x[start : start + choice.items]
            part = self._sharded(some, grid=choice.grid, gather=gather, options=options)
            if part is not None:
                whole = part.new_empty((x.shape[0], *part.shape[1:])) if whole is None else whole
                whole[start : start + choice.items] = part
            assert self.report is not None
            taken.append(self.report)
        self._sharded.report = replace(
            taken[-1],
            shape=(x.shape[0], *taken[-1].shape[1:]),
            chunked=None,
            recorded=sum(one.recorded for one in taken),
            seconds=sum(one.seconds for one in taken),
            waiting=sum(one.waiting for one in taken),
            messages=sum(one.messages for one in taken),
            bytes_sent=sum(one.bytes_sent for one in taken),
        )
        yield whole

    def _run(self, x: Tensor, *tensors: Tensor, _names: str, **options: Any) -> Tensor:
        named = dict(zip(_names.split(","), tensors, strict=True)) if _names else {}
        with _whole(self.vae):
            result = self._own(self.vae, x, **named, **options)
        if isinstance(result, Tensor):
            self.kind = Tensor, "", None
            return result
        field = next((name for name in FIELDS if getattr(result, name, None) is not None), None)
        if field is None:
            name, fields = f"{type(self.vae).__name__}.{self.name}", ", ".join(FIELDS)
            raise TypeError(f"{name} returned {type(result).__name__}: expected one of {fields} in it")
        value = getattr(result, field)
        distribution = None
        if not isinstance(value, Tensor):
            distribution, value = type(value), value.parameters
        self.kind = type(result), field, distribution
        tensor: Tensor = value
        return tensor

    def result(self, value: Tensor, as_tuple: bool) -> Any:
        """What the module's own call returns."""
        cls, field, distribution = self.kind
        if not field:
            return value
        held = value if distribution is None else distribution(value)
        return (held,) if as_tuple else cls(**{field: held})

    def blank(self, x: Tensor) -> Tensor:
        """Black pictures of the result's shape: one number, seen from everywhere."""
        report = self.report
        assert report is not None
        return x.new_full((), -1).expand(report.shape)


def tiles_only(vae: nn.Module) -> bool:
    """Whether an autoencoder has no other way than tiles: diffusers' Allegro refuses to work without."""
    return type(vae).__name__ == "AutoencoderKLAllegro"


@contextmanager
def _whole(vae: nn.Module) -> Iterator[None]:
    """Let an autoencoder take its whole plane at once: ranks share the memory. Some know nothing but tiles."""
    flags = {name: vars(vae)[name] for name in ("use_tiling", "use_slicing") if vars(vae).get(name) is True}
    if tiles_only(vae):
        flags.pop("use_tiling", None)
    vars(vae).update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        vars(vae).update(flags)


def parallelize_plane(
    vae: nn.Module,
    mode: Mode,
    grid: Grid | None,
    gather: Gather,
    memory_budget: int | None,
    warn: Callable[[Any], None],
) -> None:
    """Replace the `decode` and `encode` of an autoencoder's instance; see `halovae.parallelize`."""
    from diffusers.utils.accelerate_utils import apply_forward_hook

    for name in ("decode", "encode"):
        if not hasattr(type(vae), name):
            continue
        own, wished = (grid, gather) if name == "decode" else (None, "all")
        method = _method(PlaneCall(vae, name), mode, own, wished, memory_budget, warn)
        vars(vae)[name] = apply_forward_hook(method).__get__(vae)


def _method(
    call: PlaneCall, mode: Mode, grid: Grid | None, gather: Gather, memory_budget: int | None,
    warn: Callable[[Any], None],
) -> Callable[..., Any]:  # fmt: skip
    own, name = getattr(type(call.vae), call.name), call.name

    @functools.wraps(own)
    def method(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        warn(self)
        bound = call.signature.bind(self, x, *args, **kwargs).arguments
        options = {key: value for key, value in list(bound.items())[2:] if key != "kwargs"} | bound.get("kwargs", {})
        used = call
        if self is not call.vae:  # a copy of the module, with weights of its own
            kept = vars(self).get(f"_halovae_{name}")
            used = kept if kept is not None and kept.vae is self else PlaneCall(self, name)
            vars(self)[f"_halovae_{name}"] = used
        value = used.stream(x, used.choose(x, mode, grid, gather, options, memory_budget), gather, options).join()
        return used.result(used.blank(x) if value is None else value, not options.get("return_dict", True))

    return method

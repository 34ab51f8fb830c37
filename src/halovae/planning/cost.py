"""What a decode takes, found by one walk through the real decoder with tensors that have shapes but no data.

Every operator that the walk meets becomes features: calls, FLOPs, bytes and weights, by its kind. A calibration
(see `calibrate.py`) gives each feature of each kind its seconds, so that a plan's time is their sum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from halovae.kernels import EAGER, Kernels
from halovae.lines import Lines, Scope
from halovae.loop import Gather, Loop, Request
from halovae.memory import LiveBytes
from halovae.mesh import Mesh, Traffic
from halovae.models.wan import WanConfig, WanDecoder
from halovae.planning.plan import Plan
from halovae.platform import Platform

CPU = torch.device("cpu")
# Kinds of work that are no operators: swapping borders, or sending frames; and collecting what all ranks have. Their
# bytes are those of the largest message, and of what comes from others.
EXCHANGE, GATHER = "exchange", "gather"


@dataclass
class Work:
    """What operators of one kind do, all together.

    Attributes:
        calls: how many there are.
        flops: multiplications and additions, as torch's FLOP counter has them.
        bytes: of what they read and write, weights aside.
        weights: numbers among their weights.
    """

    calls: float = 0
    flops: float = 0
    bytes: float = 0
    weights: float = 0

    def add(self, other: Work, times: float = 1) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)


@dataclass(frozen=True)
class Cost:
    """What the rank with the most to do takes.

    Attributes:
        work: by layer and kind of operator; exchanges and gathers are kinds as well.
        messages: how many it sends, a gather being one to each other rank; likewise `bytes_sent`.
        weights: bytes of the decoder's parameters.
        caches: bytes of the feature caches, held from chunk to chunk.
        peak: bytes of live tensors at the highest point, caches included, weights and the finished clip not.
    """

    work: dict[tuple[str, str], Work]
    messages: int
    bytes_sent: int
    weights: int
    caches: int
    peak: int

    @property
    def flops(self) -> int:
        """Of all layers."""
        return round(sum(work.flops for work in self.work.values()))

    def kinds(self) -> dict[str, Work]:
        """The work of all layers by kind."""
        return self._summed(1)

    def layers(self) -> dict[str, Work]:
        """The work of all kinds by layer."""
        return self._summed(0)

    def _summed(self, part: int) -> dict[str, Work]:
        found: dict[str, Work] = defaultdict(Work)
        for key, work in self.work.items():
            found[key[part]].add(work)
        return dict(found)


class Recorder(LiveBytes):
    """Notes what each operator on tensors without data does, besides the bytes that would live."""

    counts_meta = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = ""
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self._results: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}  # by the calls that had them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.note(*described(func, args, kwargs or {}, result))
        return result

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator returns; one that writes into its first argument has nothing to do without data."""
        if _in_place(func):
            return args[0]
        if _named(func)[1]:
            return super().called(func, args, kwargs)
        # torch finds out the results of many operators in Python, at length; most calls are like an earlier one.
        call = func, tuple(map(_likeness, args)), tuple((name, _likeness(one)) for name, one in kwargs.items())
        if call not in self._results:
            result = self._laid_out(func, args, kwargs)
            given = [one.untyped_storage() for one in args if isinstance(one, Tensor)]
            if not isinstance(result, Tensor) or result.untyped_storage() in given:
                return result
            self._results[call] = result.shape, result.stride(), result.dtype
        shape, stride, dtype = self._results[call]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _laid_out(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = super().called(func, args, kwargs)
        if "conv" in func._schema.name and args[0].stride(1) == 1:  # where there is data, channels stay last
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            result = torch.empty_like(result, memory_format=formats[result.ndim])
        return result

    def note(self, kind: str, work: Work) -> None:
        """Count the work of one operator."""
        self.work[self.layer, kind].add(work)

    def kernels(self) -> Kernels:
        """Kernels that stand for compiled ones, which no mode sees, and do nothing but be noted."""

        def normalize(x: Tensor, scale: Tensor, limits: Tensor, silu: bool, out: Tensor) -> None:
            self.note("norm_silu", norm_work(x, out))

        return replace(EAGER, normalize=normalize)

    def taken(self) -> dict[tuple[str, str], Work]:
        """What was noted since this was last asked."""
        work, self.work = self.work, defaultdict(Work)
        return dict(work)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know the layers: those that the decoder calls in turn, each with what leads up to it."""
        names = {layer: name for name, layer in model.named_modules()}
        layers = [layer for layer in model.modules() if _is_layer(names[layer])]
        following = dict(zip(layers, [*layers[1:], None], strict=True))
        self.layer = names[layers[0]]

        def after(layer: nn.Module, *_: object) -> None:
            coming = following[layer]
            self.layer = "" if coming is None else names[coming]

        def before(layer: nn.Module, *_: object) -> None:
            self.layer = names[layer]

        handles = [layer.register_forward_hook(after) for layer in layers]
        handles += [layer.register_forward_pre_hook(before) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_layer(name: str) -> bool:
    parts = name.removeprefix("decoder.").split(".")
    return parts[0] in ("conv_in", "conv_out") or parts[-1] == "upsampler" or (len(parts) > 2 and parts[-1].isdigit())


def norm_work(x: Tensor, out: Tensor) -> Work:
    """What a compiled norm and SiLU does."""
    return Work(calls=1, bytes=_bytes(x) + _bytes(out))


def described(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[str, Work]:
    """The kind of an operator, and the work of this call of it."""
    name, is_view = _named(func)
    if is_view:
        return name, Work(calls=1)
    tensors = [one for one in args if isinstance(one, Tensor)]
    if name.startswith("halovae"):
        window, weight, _, out, *_ = tensors
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return f"{name} {args[5]}", Work(1, flops, _bytes(window) + _bytes(out), weight.numel())
    flops, weights = 0.0, 0
    if name in ("conv2d", "conv3d", "convolution", "mkldnn_convolution", "linear", "addmm", "mm"):
        weight = tensors[2 if name == "addmm" else 1]
        per_result = weight.shape[0] if name in ("addmm", "mm") else math.prod(weight.shape[1:])
        flops, weights = 2.0 * result.numel() * per_result, weight.numel()
        name = "linear" if name in ("linear", "addmm", "mm") else "convolution"
        tensors = tensors[:1]
    elif name == "scaled_dot_product_attention":
        flops = 4.0 * math.prod(tensors[0].shape) * tensors[1].shape[-2]
    if name == "cat":
        tensors = list(args[0])
    results = result if isinstance(result, (list, tuple)) else [result]
    written = [one for one in results if isinstance(one, Tensor)]
    return name, Work(1, flops, sum(map(_bytes, tensors + written)), weights)


@cache
def _named(func: Any) -> tuple[str, bool]:
    """A name for what an operator does, and whether it touches no data."""
    schema = func._schema
    name = schema.name.removeprefix("aten::").replace("::", " ").removeprefix("_")
    aliases = [one.alias_info for one in schema.returns]
    untouched = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    if untouched or name.startswith(("empty", "new_empty", "halovae buffer", "prim")):
        return "view", True
    if name in ("detach", "lift_fresh", "reshape"):
        return "view", True
    return name, False


def _likeness(value: Any) -> Any:
    """What of an operator's argument its result's shape and layout depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_likeness, value))
    return type(value), value  # 1 and 1.0 make different results


@cache
def _in_place(func: Any) -> bool:
    returns, first = func._schema.returns, func._schema.arguments[:1]
    written = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return written and first[0].name == "self"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@cache
def hollow(config: WanConfig, dtype: torch.dtype) -> WanDecoder:
    """A decoder whose weights have shapes but no data."""
    with torch.device("meta"):
        return WanDecoder(config).to(dtype)


def walk(
    config: WanConfig,
    shape: Sequence[int],
    dtype: torch.dtype,
    plan: Plan,
    *,
    gather: Gather = "rank0",
    out_dtype: torch.dtype | None = None,
    compiled: bool = False,
    device: torch.device = CPU,
    rank: int | None = None,
) -> Cost:
    """What a rank takes to decode latents `[B, C, T, H, W]` as planned.

    Chunks after the first cost the same each, so a few are walked and the rest is multiplied.

    Args:
        config: the model's sizes.
        shape: of the latents.
        dtype: what is computed in.
        plan: how.
        gather: as for `Decoder.stream`.
        out_dtype: its `dtype`.
        compiled: whether kernels are compiled.
        device: whose way through the layers to take; it need not be here.
        rank: whose cost; None for the one with the most to do.

    Raises:
        ValueError: a grid has more ranks along an axis than there is to share out.
    """
    batch, channels, length, height, width = shape
    rank = _busiest(plan, shape) if rank is None else rank
    spans = plan.chunks(length)
    repeats = [1] * len(spans)
    if len(spans) > 4 and plan.bands == 1:
        # The first chunk, two like most (the second has what the first one kept), and the last one.
        length = spans[0].size + 2 * spans[1].size + spans[-1].size
        repeats = [1, 1, len(spans) - 3, 1]
    world = 1 if plan.apart else max(stage.grid.size for stage in plan.stages)
    traffic, recorder = Traffic(Platform(CPU)), Recorder()
    lines = _WalkedLines(rank, max(world, rank + 1), recorder)
    model = hollow(config, dtype)
    kernels = recorder.kernels() if compiled else EAGER
    request = Request(gather, out_dtype or dtype, False, kernels)
    total: dict[tuple[str, str], Work] = defaultdict(Work)
    sent = sent_bytes = 0
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())  # whoever counts a decode's work does not mean this
        stack.enter_context(torch.inference_mode())
        meshes = [Mesh(stage.grid, device, lines) for stage in plan.stages]
        latents = torch.empty((batch, channels, length, height, width), dtype=dtype, device="meta")
        stack.enter_context(recorder)
        stack.enter_context(recorder.watching(model))
        caches: list[int] = []
        loop = Loop(model, latents, plan, meshes, request, traffic)
        chunks = loop.chunks()
        for times in repeats:
            before = traffic.messages, traffic.bytes
            next(chunks)
            for key, work in recorder.taken().items():
                total[key].add(work, times)
            sent += times * (traffic.messages - before[0])
            sent_bytes += times * (traffic.bytes - before[1])
            caches.append(loop.cached())
    weights = sum(_bytes(parameter) for parameter in model.parameters())
    return Cost(dict(total), sent, sent_bytes, weights, max(caches), recorder.peak)


def _busiest(plan: Plan, shape: Sequence[int]) -> int:
    """The rank with the most cells to compute, ghosts included, over all stages."""
    load: dict[int, float] = defaultdict(float)
    for stage in plan.stages:
        shards = stage.grid.shards(stage.items.size, *shape[3:])
        for rank, shard in enumerate(shards):
            _, row, col = stage.grid.coordinates(rank)
            rows = shard.rows.size + (row > 0) + (row < stage.grid.rows - 1)
            cols = shard.cols.size + (col > 0) + (col < stage.grid.cols - 1)
            load[rank] += shard.batch.size * rows * cols
    return max(load, key=lambda rank: (load[rank], -rank))


class _WalkedLines(Lines):
    """Lines to ranks that are not there: nothing is sent, and what would be received is made up."""

    def __init__(self, rank: int, world: int, recorder: Recorder) -> None:
        self.rank, self.world = rank, world
        self._recorder = recorder

    def start(
        self, scope: Scope, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        largest = max(_bytes(tensor) for _, tensor in (*sends, *receives))
        self._recorder.note(EXCHANGE, Work(calls=1, bytes=largest))
        return lambda: None

    def all_gather(self, scope: Scope, own: Tensor, ranks: int) -> list[Tensor]:
        self._recorder.note(GATHER, Work(calls=1, bytes=(ranks - 1) * _bytes(own)))
        return [torch.empty_like(own) for _ in range(ranks)]

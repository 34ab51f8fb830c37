"""Repeated calls: recorded once, with the state that modules keep between them, and handed out chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.grid import Grid
from halovae.kernels.pool import BufferPool
from halovae.models import zoo
from halovae.plane import Plane, context, shard
from halovae.plane import program as lowering
from halovae.plane.program import Program
from halovae.plane.trace import trace

CPU = torch.device("cpu")
ROWS = Grid(rows=2)


class Cached(nn.Module):
    """A causal convolution over time that keeps the last frames of its input in a place of the given kind."""

    def __init__(self, place: str, kernel: int) -> None:
        super().__init__()
        self.place, self.kernel = place, kernel
        self.conv = nn.Conv3d(2, 2, (kernel, 3, 3), padding=(0, 1, 1), dtype=torch.float64)
        self.kept: Any = None

    def forward(self, x: Tensor, cache: Any, index: list[int]) -> Tensor:
        holder: Any = {"list": lambda: cache["list"], "dict": lambda: cache["dict"], "self": lambda: vars(self)}[
            self.place
        ]()
        key: Any = {"list": index[0], "dict": f"conv {index[0]}", "self": "kept"}[self.place]
        before = holder[key] if self.place != "dict" else holder.get(key)
        if before is None:
            before = torch.zeros_like(x[:, :, :1]).repeat(1, 1, self.kernel - 1, 1, 1)
        x = torch.cat([before, x], 2)
        holder[key] = x[:, :, x.shape[2] - self.kernel + 1 :].clone()
        index[0] += 1
        return torch.nn.functional.silu(self.conv(x))


class Decoder(nn.Module):
    def __init__(self, layers: list[tuple[str, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cached(*layer) for layer in layers)

    def forward(self, x: Tensor, cache: dict[str, Any], scale: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
        index = [0]
        for layer in self.layers:
            x = x + layer(x, cache, index)
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2) * scale, {**cache, "count": len(self.layers)}


class Video(nn.Module):
    """Decodes a clip in chunks of frames, as diffusers' video autoencoders do."""

    def __init__(self, layers: list[tuple[str, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(layers)
        self.calls = 0

    def forward(self, z: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        cache: dict[str, Any] = {"list": [None] * len(self.decoder.layers), "dict": {}}
        frames = []
        for chunk in torch.split(z, list(sizes) if sizes else 1, 2):
            out, cache = self.decoder(chunk, cache)
            frames.append(out)
        for layer in self.decoder.layers:
            vars(layer)["kept"] = None
        return torch.cat(frames, 2).clamp(-1, 1)


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def replayed(
    function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, grid: Grid = ROWS
) -> tuple[Tensor, Program]:
    """The full result of the second replay, and the first rank's program."""

    def rank(mesh: Mesh) -> tuple[Tensor, Program]:
        program = trace(function, [module], mesh, x.shape, x.dtype, CPU)
        plane = Plane(mesh)
        local = plane.scatter(x).local
        program(local, mesh)
        result = program(local, mesh)
        with plane.active():
            return plane.full(plane.wrap(result, program.returns)), program

    return on_threads(grid, CPU, rank)[0]


@settings(max_examples=25, deadline=None)
@given(
    layers=st.lists(st.tuples(st.sampled_from(["list", "dict", "self"]), st.integers(2, 3)), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=7),
)
def test_caches_go_from_call_to_call_wherever_they_are_kept(layers: list[tuple[str, int]], sizes: list[int]) -> None:
    module = Video(layers)
    x = picture(1, 2, sum(sizes), 5, 3)
    with torch.no_grad():
        expected = module(x, tuple(sizes))
    result, program = replayed(lambda z: module(z, tuple(sizes)), x, module)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert all(layer.kept is None for layer in module.decoder.layers)
    assert "forward" not in vars(module.decoder)
    assert program.chunked == 2


def test_a_graph_does_not_grow_with_the_clip() -> None:
    module = Video([("list", 3), ("dict", 2), ("self", 3)])
    short, long = (replayed(module, picture(1, 2, frames, 5, 3), module)[1] for frames in (5, 40))
    assert sorted(len(body.nodes) for body in short.bodies.values()) == sorted(
        len(body.nodes) for body in long.bodies.values()
    )
    assert len(short.bodies) == 3  # the first chunk, further ones, and the last, whose caches are unused
    assert len(long.graph.nodes) < 12 * 40
    assert long.peak - short.peak == 2 * (40 - 5) * 3 * 3 * 8  # the input clip


class Growing(nn.Module):
    """Appends each frame to the earlier ones, as Wan's decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1), dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        first, *others = map(self.decoder, z.split(1, 2))
        for one in others:
            first = torch.cat([first, one], 2)
        return first


def test_a_clip_of_many_chunks_is_recorded() -> None:
    module, x = Growing().requires_grad_(False), picture(1, 1, 1100, 3, 2)
    sharded = shard(module)
    found = sharded(x, grid=Grid())
    assert sharded.report is not None
    assert sharded.report.chunked == 2
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)


def test_chunks_come_as_they_are_computed() -> None:
    module = Video([("list", 3)])
    x = picture(1, 2, 6, 4, 4)
    with torch.no_grad():
        expected = module(x)
    sharded = shard(module)
    calls: list[str] = []
    handle = module.decoder.get_submodule("layers.0.conv").register_forward_hook(lambda *_: calls.append("recorded"))
    chunks = sharded.stream(x, grid=Grid())
    first = next(chunks)
    assert first is not None
    assert torch.equal(first, expected[:, :, :1])
    assert sharded.report is None
    rest = list(chunks)
    assert torch.equal(torch.cat([first, *(one for one in rest if one is not None)], 2), expected)
    handle.remove()
    assert sharded.report is not None
    assert sharded.report.chunked == 2
    assert sharded.report.shape == tuple(expected.shape)
    assert torch.equal(sharded(x, grid=Grid()), expected)


def test_all_chunks_of_a_clip_share_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BufferPool] = []

    class Counted(BufferPool):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            if device == CPU:  # and not for a recording
                made.append(self)

    monkeypatch.setattr(lowering, "BufferPool", Counted)
    monkeypatch.setattr(context, "BufferPool", Counted)  # where none is given
    assert len(list(shard(Video([("list", 3)])).stream(picture(1, 2, 6, 4, 4), grid=Grid()))) == 6
    assert len(made) == 1


class Odd(Video):
    """Keeps its cache where it cannot be tracked, or writes to its inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__([("list", 2)])
        self.kind = kind
        kept: list[Tensor] = []
        plain = self.decoder.forward

        def forward(x: Tensor, cache: Any, scale: float = 1.0) -> Any:
            if kind == "closure":
                kept.append(x)
                x = x + kept[-2] if len(kept) > 1 else x
            if kind == "set":
                cache["seen"] = {len(cache)}
            if kind == "write" and cache["list"][0] is not None:
                cache["list"][0].mul_(0.5)
            return plain(x, cache, scale)

        vars(self.decoder)["run"] = forward
        self.kept = kept

    def forward(self, z: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        self.kept.clear()
        return super().forward(z, sizes)


@pytest.mark.parametrize("kind", ["closure", "set", "write"])
def test_what_cannot_be_followed_is_recorded_in_full(kind: str) -> None:
    class Inner(Decoder):
        def forward(self, x: Tensor, cache: dict[str, Any], scale: float = 1.0) -> Any:
            return module.decoder.run(x, cache, scale)  # type: ignore[operator]

    module = Odd(kind)
    module.decoder.__class__ = Inner
    x = picture(1, 2, 6, 4, 4)
    with torch.no_grad():
        expected = module(x)
    result, program = replayed(module, x, module)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert not program.bodies


LONG = {
    "AutoencoderKLWan (2.2)": 7,
    "AutoencoderKLCogVideoX": 9,
    "AutoencoderKLMagvit": 5,
    "AutoencoderKLKVAEVideo": 15,
    "AutoencoderVidTok (causal, chunks)": 9,
}


@pytest.mark.parametrize("name", LONG)
def test_diffusers_clips_are_rolled_up(name: str) -> None:
    entry = next(one for one in zoo.ENTRIES if one.name == name)
    assert entry.latents is not None
    module = zoo.build(entry, torch.float64)
    x = picture(*entry.latents[:2], LONG[name], *entry.latents[3:])
    with torch.no_grad():
        expected = zoo.decode(module, x)
    result, program = replayed(lambda z: zoo.decode(module, z), x, module)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
    assert program.bodies


class Joined(nn.Module):
    """Concatenates chunks in unusual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.decoder = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        chunks = torch.split(z, 1, 2)
        if self.how == "backward":
            return torch.cat([self.decoder(one) for one in reversed(chunks)][::-1], 2)
        made = [self.decoder(one) for one in chunks]
        if self.how == "twice":
            return torch.cat([made[0], made[1], made[0], made[2]], 2)
        if self.how == "first frame again":
            whole = torch.cat(made, 2)
            return torch.cat([whole[:, :, :1].repeat(1, 1, 2, 1, 1), whole], 2)
        if self.how == "the input first":
            return torch.cat([z[:, :, :1], *made], 2)
        if self.how == "a constant first":
            return torch.cat([torch.zeros_like(z[:, :, :1]) + 1, *made], 2)
        if self.how == "cast late":
            return torch.cat([made[0].float(), *made[1:]], 2)
        before, found = None, []
        for one in chunks:  # each from the one before
            before = self.decoder(one if before is None else one + before)
            found.append(before)
        return torch.cat(found, 2)


HOWS = ["backward", "twice", "first frame again", "the input first", "a constant first", "cast late", "chained"]


@pytest.mark.parametrize("how", HOWS)
def test_chunks_are_in_order_and_belong_to_who_gets_them(how: str) -> None:
    module, x = Joined(how).requires_grad_(False), picture(1, 2, 4, 4, 4)
    expected, before = module(x), x.clone()
    sharded = shard(module)
    for _ in range(2):
        found = []
        for chunk in sharded.stream(x, grid=Grid()):
            assert chunk is not None
            found.append(chunk.clone())
            chunk.fill_(7)
        torch.testing.assert_close(torch.cat(found, 2), expected, rtol=0, atol=1e-6 if how == "cast late" else 1e-12)
    assert torch.equal(x, before)
    torch.testing.assert_close(sharded(x, grid=Grid()), expected, rtol=0, atol=1e-6 if how == "cast late" else 1e-12)


class Shares(nn.Module):
    """Its decoder returns its input's memory, or two results in the same memory, and these are written to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), dtype=torch.float64)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.conv(x)
                return y, (y if how == "the result" else x)[:, :, -1:]

        self.decoder = Inner()

    def forward(self, z: Tensor) -> Tensor:
        z, found = z * 1.0, []
        for one in torch.split(z, 1, 2):
            y, kept = self.decoder(one)
            found.append(y)
            if self.how == "the result":
                kept.mul_(0.5)
        if self.how == "the input":
            kept.mul_(0.5)
        return torch.cat(found, 2) + z


@pytest.mark.parametrize("how", ["the result", "the input"])
def test_memory_that_calls_share_is_written_to(how: str) -> None:
    module, x = Shares(how).requires_grad_(False), picture(1, 2, 4, 4, 4)
    result, _ = replayed(module, x, module)
    torch.testing.assert_close(result, module(x), rtol=0, atol=1e-12)


class Keeps(nn.Module):
    """Its decoder counts its calls in a place that is hard to see."""

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Counter:
            __slots__ = ("calls",)

            def __init__(self) -> None:
                self.calls = 0

        counts = {"n": 0}

        def closure() -> int:
            counts["n"] += 1
            return counts["n"]

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv3d(2, 2, 1, dtype=torch.float64)
                self.queue: deque[int] = deque()
                self.array = np.zeros(1)
                self.slots = Counter()
                self.call = closure
                self.other = [nn.Identity()]
                if place != "queue":
                    del self.queue
                if place != "array":
                    del self.array
                if place != "slots":
                    del self.slots
                if place != "call":
                    del self.call

            def forward(self, x: Tensor) -> Tensor:
                times = 1.0
                if place == "queue":
                    self.queue.append(1)
                    times = len(self.queue)
                elif place == "array":
                    self.array += 1
                    times = float(self.array[0])
                elif place == "slots":
                    self.slots.calls += 1
                    times = self.slots.calls
                elif place == "call":
                    times = self.call()
                elif place == "module in a list":
                    self.other[0].count = getattr(self.other[0], "count", 0) + 1  # type: ignore[assignment]
                    times = self.other[0].count  # type: ignore[assignment]
                elif place == "training":
                    times = 2.0 if self.training else 3.0
                y: Tensor = self.conv(x) * times
                return y

        self.place = place
        self.decoder = Inner()

    def forward(self, z: Tensor) -> Tensor:
        found = []
        for index, one in enumerate(torch.split(z, 1, 2)):
            if self.place == "training":
                self.decoder.train(index == 2)
            found.append(self.decoder(one))
        return torch.cat(found, 2)


@pytest.mark.parametrize("place", ["queue", "array", "slots", "call", "module in a list", "training"])
def test_state_that_is_hard_to_see_is_not_taken_for_equal(place: str) -> None:
    x = picture(1, 2, 4, 4, 4)
    expected = Keeps(place).requires_grad_(False)(x)
    module = Keeps(place).requires_grad_(False)
    program = trace(module, [module], Mesh(Grid(), CPU), x.shape, x.dtype, CPU)
    torch.testing.assert_close(program(x, Mesh(Grid(), CPU)), expected, rtol=0, atol=1e-12)


LEAKED: list[Tensor] = []


class Leaks(nn.Module):
    """Its parent uses an intermediate result that its decoder left in a global list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv3d(2, 2, 1, dtype=torch.float64)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.conv(x)
                LEAKED[:] = [y]
                return y * 2

        self.decoder = Inner()

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([self.decoder(one) + LEAKED[0] for one in torch.split(z, 1, 2)], 2)


def test_an_intermediate_result_that_leaks_is_recorded_in_full() -> None:
    module, x = Leaks().requires_grad_(False), picture(1, 2, 4, 4, 4)
    expected = module(x)
    result, program = replayed(module, x, module)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert not program.bodies

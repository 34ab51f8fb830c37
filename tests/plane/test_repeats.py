"""Calls that repeat: recorded once, with what modules keep between them, and handed out chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halovae.bench import zoo
from halovae.geometry import Grid
from halovae.mesh import Mesh
from halovae.plane import Plane, shard
from halovae.plane.program import Program
from halovae.plane.trace import trace
from halovae.simulate import on_threads

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
    """All of the second replay's result, and the first rank's program."""

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
    assert len(short.bodies) == 3  # the first chunk, further ones, and the last, whose caches nobody uses
    assert len(long.graph.nodes) < 12 * 40
    assert long.peak - short.peak == 2 * (40 - 5) * 3 * 3 * 8  # the clip that goes in


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


class Odd(Video):
    """Keeps its cache where it cannot be followed, or writes into what it is given."""

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

"""What a caller hears of a call between its convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import halovae
from halovae.grid import Grid
from halovae.plane.strip_program import InStrips

WAYS = {"at once": None, "in strips": InStrips(3, "rows")}


class Clip(nn.Module):
    """It decodes frame by frame, by a child that is recorded once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([self.layers(frame) for frame in z.unbind(2)], 2)


class Stop(Exception):
    pass


def clip() -> tuple[Clip, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = Clip().requires_grad_(False)
    for one in module.parameters():
        one.copy_(torch.randn(one.shape, generator=generator) / 4)
    return module, torch.randn(1, 2, 3, 24, 6, generator=generator)


@pytest.mark.parametrize("way", WAYS)
def test_each_step_of_a_call_is_counted(way: str) -> None:
    module, x = clip()
    sharded, heard = halovae.shard(module), list[tuple[int, int]]()
    with halovae.on_each_step(lambda done, total: heard.append((done, total))):
        found = sharded(x, grid=Grid(), strips=WAYS[way])
        total = 2 * 3 * (3 if WAYS[way] else 1)  # convolutions, frames, strips
        assert heard == [(done, total) for done in range(1, total + 1)]
        sharded(x, grid=Grid(), strips=WAYS[way])
        assert heard[total:] == heard[:total]
    assert found is not None
    torch.testing.assert_close(found, module(x))
    sharded(x, grid=Grid(), strips=WAYS[way])
    assert len(heard) == 2 * total


@pytest.mark.parametrize("way", WAYS)
def test_what_the_function_raises_ends_the_call(way: str) -> None:
    module, x = clip()
    sharded = halovae.shard(module)

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise Stop

    with pytest.raises(Stop), halovae.on_each_step(stop):
        sharded(x, grid=Grid(), strips=WAYS[way])
    found = sharded(x, grid=Grid(), strips=WAYS[way])
    assert found is not None
    torch.testing.assert_close(found, module(x))


def test_the_inner_of_two_contexts_hears() -> None:
    module, x = clip()
    sharded, outer, inner = halovae.shard(module), list[int](), list[int]()
    with halovae.on_each_step(lambda done, total: outer.append(done)):
        with halovae.on_each_step(lambda done, total: inner.append(done)):
            sharded(x, grid=Grid())
        assert not outer
        sharded(x, grid=Grid())
    assert inner == outer == [1, 2, 3, 4, 5, 6]


def test_a_call_that_runs_eagerly_has_no_steps_and_says_why() -> None:
    class Reading(Clip):
        def decode(self, z: Tensor) -> Tensor:
            return self(z if float(z.mean()) < 0 else z + 1)

    class Plain(Clip):
        def decode(self, z: Tensor) -> Tensor:
            return self(z)

    heard: list[int] = []
    vae = halovae.VAE(Reading().requires_grad_(False))
    with halovae.on_each_step(lambda done, total: heard.append(done)):
        vae.decode(torch.ones(1, 2, 3, 8, 6))
    assert not heard
    assert "reads values that depend on the input" in vae.why_eager((1, 2, 3, 8, 6))
    assert halovae.VAE(Plain().requires_grad_(False)).why_eager((1, 2, 3, 8, 6)) == ""
    with pytest.raises(TypeError, match="Plain has no encode"):
        halovae.VAE(Plain()).why_eager((1, 3, 3, 8, 6), "encode")

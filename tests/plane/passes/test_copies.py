"""Copies that are made channels last."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.passes.cases import Of, aten, check, seeded, targets
from plane.test_trace import picture, recorded
from torch import Tensor, fx, nn

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.kernels.native import EAGER
from halovae.plane import context, windows


def test_tensors_written_in_place_keep_their_copies() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            neutral = x * 1
            neutral += 3
            return F.silu(neutral / 1) + x

    check(Module(), picture(1, 2, 6, 5))


def test_a_sum_has_the_layout_of_the_convolution_not_of_the_attention() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            found = F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)
            return found + self.conv(x)

    for program in check(seeded(Module), picture(1, 4, 8, 7)):
        (node,) = (node for node in program.nodes() if node.target in (aten.add.Tensor, aten.add_.Tensor))
        assert program.changes["channels-last"] == 1
        assert node.all_input_nodes[0].target is windows.convolution


class Rearranged(nn.Module):
    """A convolution whose channels become rows and cols, with a shortcut that repeats channels first."""

    def __init__(self, ndim: int, repeat: Callable[[Tensor], Tensor], rearrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = (nn.Conv2d if ndim == 2 else nn.Conv3d)(8, 64, 3, padding=1)
        self.after = (nn.Conv2d if ndim == 2 else nn.Conv3d)(16 if ndim == 2 else 8, 4, 3, padding=1)
        self.repeat, self.rearrange = repeat, rearrange

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.rearrange(self.conv(x)) + self.rearrange(self.repeat(x)))


def as_ltx(x: Tensor) -> Tensor:
    """Move channels to frames, rows and cols; the remaining channels vary slowest."""
    return x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def as_hunyuan(x: Tensor) -> Tensor:
    """Move channels to frames, rows and cols; the remaining channels vary fastest."""
    items, _, frames, rows, cols = x.shape
    parts = x.reshape(items, 2, 2, 2, -1, frames, rows, cols).permute(0, 4, 5, 1, 6, 2, 7, 3).contiguous()
    return parts.reshape(items, -1, 2 * frames, 2 * rows, 2 * cols)


REARRANGED: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]] = {
    "DC-AE": (2, lambda x: x.repeat_interleave(8, 1), lambda x: F.pixel_shuffle(x, 2), 3),
    "LTX": (3, lambda x: x.repeat(1, 8, 1, 1, 1), as_ltx, 3),
    "HunyuanVideo-1.5": (3, lambda x: x.repeat_interleave(8, 1), as_hunyuan, 2),
}


@pytest.mark.parametrize("name", list(REARRANGED))
def test_copies_are_channels_last(name: str) -> None:
    ndim, repeat, rearrange, copies = REARRANGED[name]
    module = seeded(lambda: Rearranged(ndim, repeat, rearrange), torch.float32)
    x = picture(1, 8, *(3, 9, 8)[-ndim:]).float()
    for program in check(module, x, atol=1e-5):
        assert targets(program).count(windows.copied) == copies
        assert not {aten.clone.default, aten.repeat.default} & set(targets(program))
        assert program.changes["copies"] >= copies
    (summed,) = (node for node in program.nodes() if node.target in (aten.add.Tensor, aten.add_.Tensor))
    terms = list[Tensor]()

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.name == summed.name:
                terms.extend(self.fetch_args_kwargs_from_env(n)[0])
            return super().run_node(n)

    ((_, program, _),) = recorded(module, x, Grid(), module)
    last = x.contiguous(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
    with context.on(Mesh(Grid(), torch.device("cpu")), EAGER), torch.inference_mode():
        Watched(program._module).run(last)
    assert [term.stride(1) for term in terms] == [1, 1]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_reshaped_copy_keeps_its_values(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 2))
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=4, max_size=7))
    order = data.draw(st.permutations(range(1, len(sizes) + 1)))
    moved = [[items, *sizes][dim] for dim in order]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1), max_size=5)))
    merged = [math.prod(moved[a:b]) for a, b in pairwise([0, *cuts, len(moved)])]
    copied, activated = data.draw(st.booleans()), data.draw(st.booleans())

    def function(x: Tensor) -> Tensor:
        parts = F.silu(x).reshape(items, *sizes).permute(0, *order)
        parts = F.silu(parts) if activated else parts
        return (parts.contiguous() if copied else parts).reshape(items, *merged) * 2.0

    check(Of(function), picture(items, math.prod(sizes), 1, 1), (Grid(),))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeats that add a dim": lambda x: F.silu(x)[0].repeat(1, 8, 1, 1) * 2.0,
    "repeats of channels and rows": lambda x: F.silu(x).repeat(1, 2, 3, 1) * 2.0,
    "several dims of channels": lambda x: (
        F.silu(F.silu(x).reshape(2, 2, 3, 2, 2, 3, 3).permute(0, 1, 3, 2, 4, 5, 6))
        .permute(0, 1, 3, 2, 4, 5, 6).reshape(2, 2, 6, 2, 3, 3) * 2.0
    ),
    "items merged into channels": lambda x: F.silu(x).permute(1, 0, 2, 3).reshape(1, 12, 6, 6) * 2.0,
    "to one number for all": lambda x: F.silu(x).sum().reshape(()) * 2.0 + x,
    "none left": lambda x: F.silu(x)[:0].permute(0, 2, 1, 3).reshape(0, 2, 6, 3, 6).sum() + x,
}  # fmt: skip


@pytest.mark.parametrize("name", list(COPIES))
def test_copies_that_only_resemble_these_keep_their_values(name: str) -> None:
    check(Of(COPIES[name]), picture(2, 6, 6, 6), (Grid(),))

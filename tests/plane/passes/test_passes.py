"""Passes over graphs: each alone and all together, and what they must leave unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plane.passes.cases import ODD, Block, Gated, Odd, Of, Steps, Written, added, aten, check, larger, seeded, targets
from plane.test_trace import picture, recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.kernels import winograd
from halovae.plane import constants, group_norms, passes, windows

# Passes that change nothing in a `Block`.
UNUSED = ("biases", "channels-last", "copies", "dead-taps", "frames", "margins", "products", "residuals", "sums")


@pytest.mark.parametrize("name", [*passes.PASSES, "all"])
def test_a_block_is_exact_with_each_pass_and_with_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "all":  # some passes need the operators of this one
        monkeypatch.setenv("HALOVAE_PASSES", f"convolutions,{name}")
    for program in check(seeded(Block), picture(1, 4, 13, 11)):
        assert program.changes.get(name, 1) or name in UNUSED


def test_without_passes_a_graph_stays_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOVAE_PASSES", "")
    (program,) = check(seeded(Block), picture(1, 4, 13, 11), (Grid(),))
    assert not program.changes
    assert targets(program).count(aten.convolution.default) == 4
    assert targets(program).count(group_norms.whole_group_norm) == 2


def test_an_unknown_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOVAE_PASSES", "norms,faster")
    with pytest.raises(ValueError, match="there is no pass faster; expected some of convolutions, dead-taps"):
        passes.chosen()


def test_a_block_becomes_four_operators_and_a_sum() -> None:
    (program,) = check(seeded(Block), picture(1, 4, 13, 11), (Grid(),))
    expected = [windows.convolution, windows.convolution, windows.pointwise, aten.add_.Tensor]
    assert sorted(map(str, targets(program))) == sorted(map(str, [*expected, windows.upsampled_convolution]))
    one, two = (node for node in program.nodes() if node.target is windows.convolution)
    assert one.kwargs["norm"] == (2, 1e-5, "plane", ())
    assert (two.kwargs["norm"], two.kwargs["silu"]) == ((4, 1e-5, "plane", ()), True)


def test_a_map_with_other_users_is_not_overwritten() -> None:
    def function(x: Tensor) -> Tensor:
        first = x + 1
        view, second = first[..., :1], first + 2
        third = second + first  # the last use of `first`, but not of its view
        return third + view

    module = nn.Module()
    module.forward = function
    for program in check(module, picture(1, 2, 6, 5)):
        assert program.changes["in-place"] == 2  # the sums of `second` and `third`


def test_an_input_is_never_overwritten() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x[:, :, 1:-1] if x.shape[2] > 8 else x) * 2

    x = picture(1, 2, 6, 5)
    before = x.clone()
    check(Module(), x)
    assert torch.equal(x, before)


class Loop(nn.Module):
    """Calls a submodule for each frame. The submodule returns a view of its input."""

    def __init__(self) -> None:
        super().__init__()

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1))

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return F.silu(self.conv(x)) * 1, x[:, :1]

        self.decoder = Inner()

    def forward(self, z: Tensor) -> Tensor:
        found, views = [], []
        for frame in torch.split(z, 1, 2):
            larger = F.silu(frame * 2)
            y, view = self.decoder(larger)
            found.append(y + F.silu(larger) + 0)
            views.append(view)
        return torch.cat(found, 2) + torch.cat(views, 2)


def test_a_map_whose_view_a_called_graph_returns_is_not_overwritten() -> None:
    for program in check(seeded(Loop), picture(1, 2, 5, 6, 7)):
        assert program.bodies
        assert program.changes["in-place"]


def between(module: Any, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    y = x * 2
    h = make(y)
    y += 1
    found: Tensor = module.conv(h)
    return found + (y if found.shape == y.shape else larger(y))


def in_front(module: Any, x: Tensor) -> Tensor:
    padded = F.pad(x.unsqueeze(2), (0, 0, 0, 0, 2, 0))
    padded[:, :, :2] = 1.5
    found: Tensor = module.conv3(padded)
    return found.squeeze(2)


def through_a_view(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.conv(x)
    view = y.flatten(1, 2)
    view += 1
    return y


@pytest.mark.parametrize(
    "steps",
    [
        lambda m, x: m.conv(added(larger(x * 2))),
        lambda m, x: m.conv(F.relu(larger(x), inplace=True)),
        lambda m, x: between(m, x, larger),
        lambda m, x: between(m, x, F.silu),
        lambda m, x: between(m, x, m.norm),
        in_front,
        through_a_view,
    ],
)
def test_writes_in_place_are_respected(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seeded(lambda: Written(steps)), picture(1, 4, 12, 10))
    monkeypatch.setattr(winograd, "is_profitable", lambda scheme, weight, *_: weight.dtype == torch.float32)
    check(seeded(lambda: Written(steps), torch.float32), picture(1, 4, 12, 10).float(), atol=2e-5)


def test_expanded_maps_and_numbers_are_not_overwritten() -> None:
    steps: list[Steps] = [
        lambda m, x: F.silu(m.conv(x)[:, :1].expand(-1, 4, -1, -1)),  # type: ignore[operator]
        lambda m, x: torch.add(1.0, m.conv(x)),  # type: ignore[operator]
    ]
    for step in steps:
        check(seeded(lambda step=step: Written(step)), picture(1, 4, 9, 8))  # type: ignore[misc]


def test_autocast_adds_no_casts_after_recording() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.three(larger(self.one(x)))

    module, x = seeded(Module, torch.float32), picture(1, 4, 8, 8).float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        ((full, *_),) = recorded(module, x, Grid(), module)
    assert full.dtype == torch.float32
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-6)


def test_a_linear_layer_over_channels_is_one_product() -> None:
    for program in check(seeded(Gated), picture(2, 4, 13, 11)):
        assert targets(program).count(aten.mm.default) == 1
        assert aten.bmm.default not in targets(program)


def test_products_with_different_matrices_stay() -> None:
    def function(x: Tensor) -> Tensor:
        weight = F.silu(x)[0, :, :1, 0]
        return torch.bmm(F.silu(x)[0], weight.expand(4, 4).reshape(4, 4, 1)) + x[0, :, :, :1]

    for program in check(Of(function), picture(1, 4, 5, 4), (Grid(),)):
        assert aten.bmm.default in targets(program)


@pytest.mark.parametrize("how", ODD)
def test_graphs_that_resemble_known_ones_stay_exact(how: str) -> None:
    check(seeded(lambda: Odd(how)), picture(1, 4, 3, 9, 8))


class Masked(nn.Module):
    """Attention over all cells with a mask that is written row by row, as in HunyuanVideo-1.5, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2)
        length = cells.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype)
        for row in range(length):
            mask[row, : row + 1] = 0
        mixed = F.scaled_dot_product_attention(cells, cells, cells, attn_mask=mask)
        return self.convolution(F.silu(mixed.transpose(1, 2).reshape(x.shape)))


def test_passes_run_beside_a_large_mask() -> None:
    """It is computed once, and nothing in the graph writes to it."""
    x = picture(1, 4, 18, 21)  # 1.1 MB
    assert constants._LARGEST < 8 * (18 * 21) ** 2
    for program in check(seeded(Masked), x, grids=(Grid(), Grid(rows=2))):
        assert windows.convolution in targets(program)

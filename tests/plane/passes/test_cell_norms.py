"""Norms, and how they become part of the convolution after them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from plane.passes.cases import GRIDS, NORMS, Cells, Of, Repeated, aten, check, seeded, targets
from plane.test_trace import picture, recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.kernels import halves, winograd
from halovae.kernels.halves import multiplied
from halovae.plane import program as lowering
from halovae.plane import windows


@pytest.mark.parametrize("least", [1e-12, 1.5])
@pytest.mark.parametrize("frames", [1, 3])
def test_norms_over_channels_are_part_of_a_convolution(least: float, frames: int) -> None:
    module = seeded(lambda: Cells(least))
    for program in check(module, picture(2, 3, frames, 13, 9)):
        assert targets(program) == [*[aten.slice.Tensor] * (frames < 3), windows.convolution]
        *_, node = program.nodes()
        assert (node.kwargs["norm"], node.kwargs["silu"]) == ((least, 0.0, 3**0.5), True)


class HalfCells(Cells):
    """`Cells` in half precision, with the quotient and upsampling in fp32, and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.upsampled, self.mixed = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.normalize(x.float(), dim=1).to(x.dtype) * 3**0.5 * self.gamma + 0.0
        y: Tensor = self.conv(F.silu(normalized))[:, :, 0]
        larger: Tensor = F.interpolate(y.float(), scale_factor=2.0, mode="nearest-exact").type_as(y)
        found: Tensor = self.mixed(self.upsampled(larger).movedim(1, -1))
        return found


@pytest.mark.parametrize("units", [False, True])
def test_casts_to_fp32_and_back_are_removed(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module_ in (halves, lowering, winograd):
        monkeypatch.setattr(module_, "has_units", lambda dtype: units or dtype.itemsize > 2)
    module, x = seeded(HalfCells, torch.bfloat16), picture(1, 3, 1, 13, 9).bfloat16()
    with torch.no_grad():
        exact, theirs = copy.deepcopy(module).double()(x.double()), module(x)
    for grid in GRIDS:
        for full, program, _ in recorded(module, x, grid, module):
            assert {windows.convolution, windows.upsampled_convolution} < {*targets(program)}
            assert aten._to_copy.default not in targets(program)
            assert aten.linalg_vector_norm.default not in targets(program)
            assert (full - exact).square().mean() <= 1.1 * (theirs - exact).square().mean()
            assert any(node.target is multiplied for node in program._module.graph.nodes) is not units


def test_graphs_that_resemble_a_norm_over_channels_stay() -> None:
    class Module(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how, self.gamma, self.conv = how, nn.Parameter(torch.randn(4, 1, 1)), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            length = x.norm(dim=2 if self.how == "rows" else 1, p=1 if self.how == "order" else 2, keepdim=True)
            y = (x + 1 if self.how == "other" else x) / length.clamp_min(1e-3)
            y = y * (x.mean() if self.how == "scalar" else self.gamma) * self.gamma
            return self.conv(y) + (length if self.how == "kept" else 0)

    for how in ("rows", "order", "other", "scalar", "kept", "twice"):
        torch.manual_seed(0)
        check(Module(how).double(), picture(1, 4, 8, 7), GRIDS[:3])


@pytest.mark.usefixtures("always")
def test_winograd_of_norms_over_channels_is_exact_on_any_grid() -> None:
    check(seeded(Cells, torch.float32), picture(2, 3, 1, 13, 9).float(), atol=2e-5)


class Normed(nn.Module):
    """A convolution, then a norm over channels: with a bias as in DC-AE, or without as in Wan."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.conv, self.biased = nn.Conv2d(4, 4, 3, padding=1), biased
        self.weight, self.bias = nn.Parameter(torch.randn(4 if biased else (4, 1, 1))), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv(x)
        if not self.biased:
            return x + F.normalize(inner, dim=1) * 2.0 * self.weight
        inner = inner.movedim(1, -1)
        inner = inner * torch.rsqrt(inner.pow(2).mean(-1, keepdim=True) + 1e-3)
        return x + (inner * self.weight + self.bias).movedim(-1, 1)


@pytest.mark.parametrize("biased", [True, False])
def test_norms_over_channels_without_a_convolution_after_them_are_one_operator(biased: bool) -> None:
    for program in check(seeded(lambda: Normed(biased)), picture(2, 4, 13, 11)):
        assert [target for target in targets(program) if target is not aten.permute.default] == [
            windows.convolution, windows.normalized, aten.add.Tensor,
        ]  # fmt: skip
        (node,) = (node for node in program.nodes() if node.target is windows.normalized)
        assert node.kwargs == {"spare": True}


class Modulated(Repeated):
    """A residual block as in LTX-Video from 0.9.1 on: a scale and a shift from a timestep modulate the norm."""

    def __init__(self, per_item: bool = False) -> None:
        super().__init__()
        self.per_item = per_item  # modulate each item differently
        self.table = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        inner = x.movedim(1, -1)
        inner = (inner * torch.rsqrt(inner.pow(2).mean(-1, keepdim=True) + 1e-3)).movedim(-1, 1)
        shift, scale = (self.table[None, ..., None, None, None] * 0.5).unbind(1)
        inner = F.silu(inner * (1 + (scale + x.mean((2, 3, 4), keepdim=True) if self.per_item else scale)) + shift)
        return x + self.conv(torch.cat([inner[:, :, :1], inner, inner[:, :, -1:]], 2))


def test_the_modulation_of_a_norm_is_part_of_the_convolution() -> None:
    for per_item, items in ((False, 1), (False, 2), (True, 1)):
        for program in check(seeded(partial(Modulated, per_item)), picture(items, 4, 3, 9, 8)):
            (node,) = (node for node in program.nodes() if node.target is windows.convolution)
            assert node.kwargs.keys() >= {"gamma", "beta", "norm", "silu", "repeats"}


def test_a_modulation_per_item_stays() -> None:
    for program in check(seeded(lambda: Modulated(True)), picture(2, 4, 3, 9, 8)):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        assert "norm" not in node.kwargs
        assert windows.normalized in targets(program)


@pytest.mark.parametrize("name", list(NORMS))
def test_norms_without_a_convolution_after_them_keep_their_values(name: str) -> None:
    check(Of(NORMS[name]), picture(2, 6, 7, 6), (Grid(),))


def test_a_norm_that_overwrites_its_map_needs_no_memory() -> None:
    for program in check(Of(lambda x: F.normalize(F.silu(x), dim=1) * 2.0), picture(1, 6, 7, 6), (Grid(),)):
        assert program.peak == 2 * picture(1, 6, 7, 6).nbytes  # the input and one map


def test_a_norm_over_channels_with_two_users_is_computed_once() -> None:
    class Both(Normed):
        def forward(self, x: Tensor) -> Tensor:
            normed = F.normalize(x, dim=1) * 2.0
            return self.conv(normed) + self.conv(F.silu(normed))

    for program in check(seeded(lambda: Both(False)), picture(1, 4, 13, 11)):
        assert targets(program).count(windows.normalized) == 1


def test_a_norm_in_a_narrower_dtype_than_its_map_stays() -> None:
    class Narrow(Repeated):
        def forward(self, x: Tensor) -> Tensor:
            squares = x.float().pow(2).mean(1, keepdim=True)
            return self.conv(F.silu(x * torch.rsqrt(squares + 1e-3)).repeat(1, 1, 3, 1, 1))

    for program in check(seeded(Narrow), picture(1, 4, 1, 9, 8)):
        assert aten.rsqrt.default in targets(program)


@pytest.mark.parametrize("kept", [False, True])
def test_norms_of_a_clip_of_one_frame_are_part_of_a_pictures_convolution(kept: bool) -> None:
    class Frame(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.gamma = nn.GroupNorm(2, 4), nn.Parameter(torch.randn(4, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(F.silu(self.norm(x)).squeeze(2)).unsqueeze(2)
            inner = F.silu(F.normalize(x, dim=1) * 2 * self.gamma)
            inner = self.two(inner.squeeze(2)).unsqueeze(2)
            return x + inner if kept else inner

    for program in check(seeded(Frame), picture(2, 4, 1, 9, 8)):
        one, two = (node for node in program.nodes() if node.target is windows.convolution)
        assert {"norm", "silu"} <= one.kwargs.keys() & two.kwargs.keys()
        assert program.changes["norms"] > 6

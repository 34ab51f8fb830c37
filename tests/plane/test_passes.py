"""Passes over recorded graphs: each on its own and all together, exact on any grid, with the predicted messages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.test_trace import picture, recorded
from torch import Tensor, fx, nn

from halovae import Grid
from halovae.device.kinds import Device
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.kernels import halves, winograd
from halovae.kernels.halves import multiplied
from halovae.kernels.native import EAGER, compiled
from halovae.plane import Sharded, context, operators, passes, windows
from halovae.plane import program as lowering
from halovae.plane.agreement import message_digests
from halovae.plane.live import root
from halovae.plane.passes import residuals
from halovae.plane.program import Program

aten = torch.ops.aten
# Passes that change nothing in a `Block`.
UNUSED = ("biases", "channels-last", "copies", "dead-taps", "frames", "products", "residuals")
GRIDS = tuple(map(Grid.parse, ("1x1", "2x1", "1x2", "2x2", "3x1")))


class Block(nn.Module):
    """A residual block of an autoencoder, with its shortcut, and an upsampling after it."""

    def __init__(self, channels: int = 4, outputs: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut, self.upsampled = nn.Conv2d(channels, outputs, 1), nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        total = (self.shortcut(x) + inner) / 1.0
        return self.upsampled(F.interpolate(total, scale_factor=2.0, mode="nearest"))


class Causal(nn.Conv3d):
    """A convolution with causal padding in time, as in Wan."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0)))


class Around(nn.Module):
    """A convolution of a map padded with its own edges, as in HunyuanVideo and LTX-2."""

    def __init__(self, mode: str, ndim: int = 3, before: int = 0) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), (nn.Conv3d if ndim == 3 else nn.Conv2d)(4, 8, 3)
        self.mode, self.widths = mode, (1, 1, 1, 1, *((before, 0) if ndim == 3 else ()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(F.silu(self.norm(x)), self.widths, mode=self.mode))


class Repeated(nn.Module):
    """A residual block as in LTX: a root mean square norm over channels, and the first and last frame repeated."""

    def __init__(self, moved: bool = True, before: int = 1, after: int = 1) -> None:
        super().__init__()
        self.conv, self.times, self.moved = nn.Conv3d(4, 4, 3, padding=(0, 1, 1)), (before, after), moved

    def forward(self, x: Tensor) -> Tensor:
        inner = x.movedim(1, -1) if self.moved else x
        squares = inner.pow(2).mean(-1 if self.moved else 1, keepdim=True)
        inner = inner * torch.rsqrt(squares + 1e-3) if self.moved else inner / torch.sqrt(squares + 1e-3)
        inner = F.silu(inner.movedim(-1, 1) if self.moved else inner)
        before, after = self.times
        first, last = inner[:, :, :1].repeat(1, 1, before, 1, 1), inner[:, :, -1:].repeat(1, 1, after, 1, 1)
        return x + self.conv(torch.cat([part for part in (first, inner, last) if part.shape[2]], 2))


class Causally(nn.Module):
    """A convolution in time of a map whose first frame is repeated, one by one, as in CogVideoX."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv3d(4, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.norm(x))
        return x + self.conv(torch.cat([*[inner[:, :, :1]] * 2, inner], 2))


AROUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "replicated": (lambda: Around("replicate", before=2), 3),
    "replicated, 2-D": (lambda: Around("replicate", 2), 2),
    "reflected": (lambda: Around("reflect"), 3),
    "reflected, 2-D": (lambda: Around("reflect", 2), 2),
    "repeated": (Repeated, 3),
    "repeated before": (lambda: Repeated(False, 2, 0), 3),
    "repeated one by one": (Causally, 3),
}


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def check(module: nn.Module, x: Tensor, grids: tuple[Grid, ...] = GRIDS, atol: float = 1e-12) -> list[Program]:
    with torch.no_grad():
        expected = module(x.clone())
    programs = []
    for grid in grids:
        for full, program, mesh in recorded(module, x, grid, module):
            torch.testing.assert_close(full, expected, rtol=0, atol=atol * float(expected.abs().max()))
            assert (program.messages, program.bytes_sent) == (mesh.traffic.messages, mesh.traffic.bytes)
            assert len(message_digests(program, mesh)) <= grid.size  # what ranks compare before they run it
            programs.append(program)
    return programs


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.nodes()]


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
    assert targets(program).count(operators.whole_group_norm) == 2


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


def test_tensors_written_in_place_keep_their_copies() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            neutral = x * 1
            neutral += 3
            return F.silu(neutral / 1) + x

    check(Module(), picture(1, 2, 6, 5))


class Cells(nn.Module):
    """The norm over channels, SiLU and causal convolution of Wan's VAE."""

    def __init__(self, least: float = 1e-12) -> None:
        super().__init__()
        self.gamma, self.conv, self.least = nn.Parameter(torch.randn(3, 1, 1, 1)), Causal(), least

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.normalize(x, dim=1, eps=self.least) * 3**0.5 * self.gamma + 0.0
        found: Tensor = self.conv(F.silu(normalized))
        return found


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


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_taps_that_meet_only_zeros_are_removed(frames: int) -> None:
    module = seeded(Causal)
    for program in check(module, picture(1, 3, frames, 7, 9)):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        taps = {1: 1, 2: 2, 3: 3}[frames]
        assert node.args[1].meta["shape"][2] == taps  # type: ignore[union-attr]
        assert (node.args[0].meta["shape"][2], node.kwargs.get("zeros", 0)) == (frames, taps - 1)  # type: ignore[union-attr]
        assert program.changes["dead-taps"] == int(taps < 3)


class Chunks(nn.Module):
    """Two chunks of a clip, with a feature cache between them.

    Args:
        kept: computes the feature cache from an activated map and the feature cache before it.
    """

    def __init__(self, kept: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.cells, self.kept = Cells(), kept

    def forward(self, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        past: Any = None
        for chunk in x.split((x.shape[2] + 1) // 2, 2):
            y = F.silu(F.normalize(chunk, dim=1) * self.cells.gamma)
            before, past = past, self.kept(y, past)
            taken = y if before is None else torch.cat([before, y], 2)
            padded = F.pad(taken, (1, 1, 1, 1, 2 - (0 if before is None else before.shape[2]), 0))
            results.append(nn.Conv3d.forward(self.cells.conv, padded))
        return torch.cat(results, 2) + past.mean()


def last(y: Tensor, _: Tensor | None) -> Tensor:
    return y[:, :, -2:].clone()


def last_one(y: Tensor, _: Tensor | None) -> Tensor:
    return y[:, :, -1:].clone()


def not_last(y: Tensor, _: Tensor | None) -> Tensor:
    return y[:, :, :-1].clone()


def whole(y: Tensor, past: Tensor | None) -> Tensor:
    return y.clone() if past is None else torch.cat([past[:, :, -1:], y.clone()], 2)


def a_view(y: Tensor, _: Tensor | None) -> Tensor:
    return y[:, :, -1:]


def twice(y: Tensor, past: Tensor | None) -> Tensor:
    return last(y, past) + y[:, :, -2:].clone()


@pytest.mark.parametrize(("kept", "frames", "nodes"), [
    (last, 8, 2), (last_one, 8, 2), (last_one, 2, 2), (whole, 2, 2), (not_last, 6, 0), (a_view, 8, 0), (twice, 8, 0),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_convolution_joins_its_frames(
    kept: Callable[[Tensor, Tensor | None], Tensor], frames: int, nodes: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dtype == torch.float32:  # straight into a window
        monkeypatch.setattr(winograd, "is_profitable", lambda *_: True)
    x = picture(1, 3, frames, 13, 9).to(dtype)
    for program in check(seeded(lambda: Chunks(kept), dtype), x, atol=2e-5 if dtype == torch.float32 else 1e-12):
        convolutions = [node for node in program.nodes() if node.target is windows.convolution]
        assert ["past" in node.kwargs for node in convolutions] == [False, True]
        assert targets(program).count(windows.kept) == nodes
        assert all(("norm" in node.kwargs) is (nodes > 0) for node in convolutions)


def test_a_convolutions_own_input_does_not_move_after_it() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 3, 3, padding=(0, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(x)
            found: Tensor = self.conv(torch.cat([y.clone(), y], 2))  # the past is the map itself
            return found

    for program in check(seeded(Module), picture(1, 3, 3, 8, 7), GRIDS[:3]):
        assert windows.kept not in targets(program)


class Exchanged(nn.Module):
    """Ranks exchange a row between a copy and the convolution: one rank sends, the other only receives."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.conv = nn.Conv2d(3, 3, 3, stride=2), nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(x)
        lower = self.down(F.pad(y[:, :, -1:].clone()[:, :, 0], (0, 1, 0, 1)))
        found: Tensor = self.conv(y)
        return found + lower.mean()


def test_ranks_move_nothing_past_an_exchange() -> None:
    for grid in GRIDS:
        found = recorded(seeded(Exchanged), picture(1, 3, 2, 12, 8), grid)
        assert len({targets(program).count(windows.kept) for _, program, _ in found}) == 1
    check(seeded(Exchanged), picture(1, 3, 2, 12, 8))


class Padded(nn.Conv2d):
    """Pads its input by a function, and convolves it."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 4, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.how(x))


def added(x: Tensor) -> Tensor:
    x += 1
    return x


@pytest.mark.parametrize(
    "how",
    [
        lambda x: F.pad(x, (1, 1, 1, 1), value=2.0),
        lambda x: F.pad(x, (0, 2, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1)).transpose_(2, 3),
        lambda x: F.pad(x[0], (1, 1, 1, 1)).unsqueeze_(0),
        lambda x: added(F.pad(x, (1, 1, 1, 1))),
        lambda x: F.pad(x, (2, 2, 1, 1)),
    ],
    ids=["not zeros", "not even", "transposed", "unsqueezed", "written to", "wider"],
)
def test_padding_before_a_convolution(how: Callable[[Tensor], Tensor]) -> None:
    check(seeded(lambda: Padded(how)), picture(1, 4, 9, 9))


Steps = Callable[[nn.Module, Tensor], Tensor]


class Written(nn.Module):
    """Writes in place to tensors that passes would skip over."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.conv, self.norm, self.steps = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), steps
        self.conv3 = nn.Conv3d(4, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def larger(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


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


# These record different operators on different ranks: only one rank crops, only ranks at the border pad.
UNEVEN: dict[str, Steps] = {
    "cropped": lambda m, x: m.conv(larger(x * 2)[:, :, :-2]),  # type: ignore[operator]
    "padded below": lambda m, x: m.conv(F.pad(larger(x * 2), (0, 0, 0, 2))),  # type: ignore[operator]
    "padded with ones": lambda m, x: m.conv(F.pad(larger(x * 2), (0, 0, 2, 2), value=1.0)),  # type: ignore[operator]
    "reflected": lambda m, x: m.conv(F.pad(larger(x * 2), (0, 0, 2, 2), mode="reflect")),  # type: ignore[operator]
    "in another order": lambda m, x: (
        m.conv(F.silu(m.norm(x * 2))[:, :, :-1]) + m.conv(x)[:, :, :-1]  # type: ignore[operator]
    ),
    "in time": lambda m, x: m.conv3(  # type: ignore[operator]
        F.pad((x * 2).unsqueeze(2), (0, 0, 0, 0, 2, 0))[..., :-2, :]
    ).squeeze(2),
}

UNLIKE = {"padded with ones": "3x1", "reflected": "3x1"}  # of two ranks, both are at the border


def fitted(x: Tensor) -> Tensor:
    """Crop or pad a map to 24 x 20 or 12 x 10 cells."""
    rows, cols = (24, 20) if x.shape[2] > 16 else (12, 10)
    x = x[:, :, :rows, :cols]
    return F.pad(x, (0, cols - x.shape[3], 0, rows - x.shape[2]))


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("grid", ["2x1", "3x1", "2x2"])
def test_ranks_agree_on_messages_before_any_is_sent(name: str, grid: str) -> None:
    module, x = seeded(lambda: Written(lambda m, x: fitted(UNEVEN[name](m, x)))), picture(1, 4, 12, 10)
    with torch.no_grad():
        expected = module(x)

    def rank(mesh: Mesh) -> tuple[Tensor | None, dict[str, int]]:
        sharded = Sharded(module, [module])
        found = sharded(x, mesh=mesh)
        assert sharded.report is not None
        return found, dict(sharded.report.passes)

    for found, changes in on_threads(Grid.parse(grid), torch.device("cpu"), rank):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert name == "in another order" or grid not in UNLIKE.get(name, grid) or not changes


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("grid", ["2x1", "3x1", "2x2"])
def test_frames_of_zeros_are_not_exchanged(grid: str) -> None:
    module = seeded(lambda: nn.Conv3d(3, 4, 3, padding=1), torch.float32)
    check(module, picture(1, 3, 4, 15, 12).float(), (Grid.parse(grid),), atol=2e-5)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd for any map in fp32, by eager kernels."""
    monkeypatch.setattr(winograd, "is_profitable", lambda scheme, weight, *_: weight.dtype == torch.float32)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [8, 256])
def test_winograd_is_exact_on_any_grid(layout: torch.memory_format, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        winograd, "ROWS", rows
    )  # few: several row blocks, some of them computed during the halo exchange
    module = seeded(Block, torch.float32)
    for size in ((13, 11), (16, 24), (9, 8)):
        check(module, picture(2, 4, *size).float().contiguous(memory_format=layout), atol=2e-5)


@pytest.mark.usefixtures("always")
def test_winograd_of_norms_over_channels_is_exact_on_any_grid() -> None:
    check(seeded(Cells, torch.float32), picture(2, 3, 1, 13, 9).float(), atol=2e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("frames", [1, 3])
def test_winograd_of_frames_is_exact_on_any_grid(frames: int) -> None:
    check(seeded(Causal, torch.float32), picture(1, 3, frames, 13, 9).float(), atol=2e-5)


@pytest.mark.usefixtures("always")
def test_only_some_ranks_may_use_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        winograd, "is_profitable", lambda scheme, weight, cells, *_: cells > 40 and weight.dtype != torch.float64
    )
    check(seeded(Block, torch.float32), picture(1, 4, 11, 9).float(), atol=2e-5)


@pytest.mark.usefixtures("always")
def test_a_convolution_overwrites_a_map_without_other_users() -> None:
    module = seeded(Block, torch.float32)
    x = picture(1, 4, 16, 16).float().contiguous(memory_format=torch.channels_last)
    program = check(module, x, (Grid(),), atol=2e-5)[0]
    one, two = (node for node in program.nodes() if node.target is windows.convolution)
    assert (one.kwargs.get("spare"), two.kwargs["spare"]) == (
        None,
        True,
    )  # the first one's input is also the shortcut's
    assert root(two) is one
    mesh, found = Mesh(Grid(), x.device), []

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            found.append(result.data_ptr() if n.target is windows.convolution else None)
            return result

    with context.on(mesh), torch.inference_mode():
        Watched(program._module).run(x)
    first, second = (at for at in found if at is not None)
    assert first == second


def test_half_precision_rounds_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: True)
    module, x = seeded(Block, torch.float32), picture(1, 4, 16, 16).float()
    with torch.no_grad():
        exact = module(x)
        plain = (module.bfloat16()(x.bfloat16()).float() - exact).square().mean()
    for full, *_ in recorded(module, x.bfloat16(), Grid(rows=2), module):
        assert (full.float() - exact).square().mean() < 1.1 * plain


@pytest.mark.slow
def test_compiled_kernels_are_exact() -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__(32, 32)

    module, x = seeded(Wide, torch.float32), picture(1, 32, 36, 34).float()
    with torch.no_grad():
        expected = module(x)
    for grid in (Grid(), Grid(rows=2)):
        for full, program, mesh in recorded(module, x, grid, module):
            assert torch.allclose(full, expected, atol=1e-5)
            if grid.size == 1:
                result = program(x.clone(), mesh, kernels=compiled())
                torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


class Residual(nn.Module):
    """A map and the result of two convolutions of it, added by `add`."""

    def __init__(self, add: Callable[[Any, Tensor], Tensor], ndim: int = 2) -> None:
        super().__init__()
        kind: Any = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.first, self.one, self.two = (kind(4, 4, 3, padding=1) for _ in range(3))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(F.silu(self.one(F.silu(x))))
        return found


def residual_first(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return x + module.inner(x)


def residual_second(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return module.inner(x) + x


def residual_of_a_shortcut(module: Any, x: Tensor) -> Tensor:
    found: Tensor = module.first(x) + module.inner(x)
    return found


def residual_of_chunks(module: Any, x: Tensor) -> Tensor:
    past, found = None, []
    for chunk in x.split(2, 2):  # no calls of modules, which would become separate graphs
        y = F.conv3d(chunk, module.first.weight, padding=1)
        inner = F.silu(F.conv3d(y, module.one.weight, padding=1))
        taken = inner if past is None else torch.cat([past, inner], 2)
        past = inner[:, :, -2:].clone()
        padded = F.pad(taken, (1, 1, 1, 1, 4 - taken.shape[2], 0))
        found.append(y + F.conv3d(padded, module.two.weight, module.two.bias))
    return torch.cat(found, 2) + found[0].mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("add", "ndim", "merged"),
    [
        (residual_first, 2, 1),
        (residual_second, 2, 1),
        (residual_of_a_shortcut, 2, 1),
        (residual_first, 3, 1),
        (residual_second, 3, 1),
        (residual_of_chunks, 3, 2),
    ],
)
@pytest.mark.usefixtures("always")
def test_a_convolution_adds_to_the_residual(
    add: Callable[[Any, Tensor], Tensor], ndim: int, merged: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = seeded(lambda: Residual(add, ndim), dtype), picture(2, 4, *(4, 13, 11)[-ndim:]).to(dtype)
    programs = check(module, x, atol=2e-5 if dtype == torch.float32 else 1e-12)
    for program in programs:
        nodes = [node for node in program.nodes() if node.target is windows.residual_convolution]
        assert len(nodes) == program.changes["residuals"] == merged
        assert all(root(node) is node.args[0] for node in nodes)
        assert not any(node.target in (aten.add.Tensor, aten.add_.Tensor) for node in program.nodes()) or merged == 2
    if merged == 2:
        assert ["keep" in node.kwargs for node in nodes] == [True, False]
    monkeypatch.setenv("HALOVAE_PASSES", ",".join(passes.PASSES.keys() - {"residuals"}))
    for program, before in zip(programs, check(module, x, atol=2e-5), strict=True):
        assert program.flops == before.flops
        assert program.peak <= before.peak


def residual_of_another_size(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return x[:, :1] + module.inner(x)


def residual_that_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return (x + module.inner(x)) * x


def residual_whose_view_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    view = x.transpose(2, 3)
    return (x + module.inner(x)) * view.mean()


def residual_that_is_expanded(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)[:, :1].expand(-1, 4, -1, -1)
    return x + module.inner(x)


def residual_that_is_convolved(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    found: Tensor = x + module.two(x)
    return found


def convolution_that_is_used_later(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    inner = module.inner(x)
    return (x + inner) * inner


def sum_of_a_multiple(module: Any, x: Tensor) -> Tensor:
    x = module.first(x)
    return torch.add(x, module.inner(x), alpha=2)


def input_that_is_written_before_the_sum(module: Any, x: Tensor) -> Tensor:
    residual, y = module.one(x), module.first(x)
    inner = module.two(y)
    gate = F.silu(y)
    found: Tensor = (residual + inner) * gate
    return found


def input_that_is_convolved_before_the_sum(module: Any, x: Tensor) -> Tensor:
    residual, y = module.first(2 * x), module.first(x)
    inner = module.one(F.silu(y))
    gate = module.two(F.silu(y)).sigmoid()
    found: Tensor = (residual + inner) * gate
    return found


def residual_that_is_the_input(module: Any, x: Tensor) -> Tensor:
    return x + module.inner(x)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "add",
    [
        residual_of_another_size,
        residual_that_is_used_later,
        residual_whose_view_is_used_later,
        residual_that_is_expanded,
        residual_that_is_convolved,
        convolution_that_is_used_later,
        input_that_is_written_before_the_sum,
        input_that_is_convolved_before_the_sum,
        sum_of_a_multiple,
        residual_that_is_the_input,
    ],
)
def test_a_convolution_does_not_add_to_maps_in_use(add: Callable[[Any, Tensor], Tensor]) -> None:
    x = picture(1, 4, 13, 11).float()
    before = x.clone()
    for program in check(seeded(lambda: Residual(add), torch.float32), x, GRIDS[:4], atol=2e-5):
        assert windows.residual_convolution not in targets(program)
    assert torch.equal(x, before)


def residual_that_is_returned(module: Any, x: Tensor) -> Any:
    x = module.first(x)
    return x + module.inner(x), x[:, :1]


class Called(nn.Module):
    """Calls a submodule for each frame."""

    def __init__(self, add: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.decoder = Residual(add, 3)

    def forward(self, z: Tensor) -> Tensor:
        found = []
        for frame in torch.split(z, 1, 2):
            larger = F.silu(frame * 2)
            result = self.decoder(larger)
            found.append(F.silu(larger) + (result if isinstance(result, Tensor) else result[0] * result[1]))
        return torch.cat(found, 2)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("add", "merged"),
    [(residual_first, True), (residual_that_is_the_input, False), (residual_that_is_returned, False)],
)
def test_a_called_graph_does_not_add_to_maps_of_its_caller(add: Callable[[Any, Tensor], Any], merged: bool) -> None:
    x = picture(1, 4, 5, 6, 7).float()
    for program in check(seeded(lambda: Called(add), torch.float32), x, atol=2e-5):
        assert program.bodies
        assert (windows.residual_convolution in targets(program)) is merged


def test_on_accelerators_sums_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOVAE_PASSES", ",".join(passes.PASSES.keys() - {"residuals"}))
    ((_, program, mesh),) = recorded(seeded(lambda: Residual(residual_first)), picture(1, 4, 8, 7), Grid())
    monkeypatch.setattr(Device, "kind", "cuda")
    assert residuals.run(program.graph, mesh) == 0
    monkeypatch.setattr(Device, "kind", "cpu")
    assert residuals.run(program.graph, mesh) == 1


QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Random(nn.Module):
    """Convolutions, norms, sums, upsamplings and views in random order."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3 if step % 2 else 1, padding=step % 2) for step in steps)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        kept, larger = x, 0
        for step, conv, norm in zip(self.steps, self.convs, self.norms, strict=True):
            if step in (0, 1):
                x = conv(x)
            elif step in (2, 3):
                x = conv(F.silu(norm(x)))
            elif step == 4:
                x, kept = x + kept, x
            elif step == 5 and larger < 1:
                x = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
                kept, larger = x, larger + 1
            elif step == 6:
                x = x.transpose(-1, -2).transpose(-1, -2) / 1 + 0
            elif step == 7:
                x = F.silu(x) * x
            elif step == 8:
                kept = F.silu(kept)
            else:
                x = F.conv2d(F.pad(x, (1, 1, 1, 1)), x.new_ones(()).expand(4, 4, 3, 3) / 9)
        return x - kept


def drawn(data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
    grid = data.draw(st.sampled_from(GRIDS))
    size = data.draw(st.integers(6, 12)), data.draw(st.integers(6, 12))
    check(Random(steps).double(), picture(data.draw(st.integers(1, 2)), 4, *size), (grid,), atol=1e-11)


@QUICK
@given(data=st.data())
def test_any_network_is_exact(data: st.DataObject) -> None:
    drawn(data)


@pytest.mark.slow
@settings(QUICK, max_examples=400, derandomize=False, print_blob=True)
@given(data=st.data())
def test_many_networks_are_exact(data: st.DataObject) -> None:
    drawn(data)


@pytest.mark.parametrize("by_winograd", [False, True])
@pytest.mark.parametrize("name", list(AROUND))
def test_a_convolution_pads_its_map(name: str, by_winograd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "is_profitable", lambda *args: by_winograd)
    make, ndim = AROUND[name]
    dtype, atol = (torch.float32, 1e-5) if by_winograd else (torch.float64, 1e-12)
    x = picture(2, 4, *(3, 13, 11)[-ndim:]).to(dtype)
    for program in check(seeded(make, dtype), x, atol=atol):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        assert node.kwargs.keys() >= {"norm", "silu"}
        assert ("edges" in node.kwargs) is ("repeated" not in name)
        assert ("repeats" in node.kwargs) is (ndim == 3 and name != "reflected")


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


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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


class Gated(nn.Module):
    """A linear layer over the channels of a map; one half of its result gates the other, as in DC-AE."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 12), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.linear(x.movedim(1, -1)).movedim(-1, 1).chunk(2, 1)
        return self.after(inner * F.silu(gate))


def test_a_linear_layer_over_channels_is_one_product() -> None:
    for program in check(seeded(Gated), picture(2, 4, 13, 11)):
        assert targets(program).count(aten.mm.default) == 1
        assert aten.bmm.default not in targets(program)


def test_the_one_of_two_maps_without_gaps_is_overwritten() -> None:
    for program in check(seeded(Gated), picture(2, 4, 13, 11)):
        (product,) = (node for node in program.nodes() if node.target is aten.mul_.Tensor)
        assert [factor.target for factor in product.all_input_nodes] == [aten.silu.default, aten.slice.Tensor]


def test_a_term_with_a_factor_stays_second() -> None:
    class Weighted(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner, gate = self.linear(x.movedim(1, -1)).movedim(-1, 1).chunk(2, 1)
            return self.after(torch.add(inner, F.silu(gate), alpha=2))

    check(seeded(Weighted), picture(2, 4, 13, 11))


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


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of no items": lambda x: F.normalize(F.silu(x)[:0], dim=1).sum() + x,
    "of no rows": lambda x: F.normalize(F.silu(x)[:, :, :0], dim=1).sum() + x,
    "of complex numbers": lambda x: (z := torch.complex(x, x + 1)).mul((z.pow(2).mean(1, True) + 1e-3).rsqrt()).real,
    "of some channels": lambda x: F.normalize(F.silu(x)[:, 1:5], dim=1) * 2.0,
    "of what is not channels last": lambda x: F.normalize(F.silu(x.contiguous()), dim=1) * 2.0,
    "with a weight of the map's own": lambda x: F.normalize(F.silu(x), dim=1) * F.silu(x)[:1, :, :1, :1],
}


@pytest.mark.parametrize("name", list(NORMS))
def test_norms_without_a_convolution_after_them_keep_their_values(name: str) -> None:
    check(Of(NORMS[name]), picture(2, 6, 7, 6), (Grid(),))


def test_a_norm_that_overwrites_its_map_needs_no_memory() -> None:
    for program in check(Of(lambda x: F.normalize(F.silu(x), dim=1) * 2.0), picture(1, 6, 7, 6), (Grid(),)):
        assert program.peak == 2 * picture(1, 6, 7, 6).nbytes  # the input and one map


def test_products_with_different_matrices_stay() -> None:
    def function(x: Tensor) -> Tensor:
        weight = F.silu(x)[0, :, :1, 0]
        return torch.bmm(F.silu(x)[0], weight.expand(4, 4).reshape(4, 4, 1)) + x[0, :, :, :1]

    for program in check(Of(function), picture(1, 4, 5, 4), (Grid(),)):
        assert aten.bmm.default in targets(program)


def test_a_frame_that_is_repeated_twice_is_erased_once(recwarn: pytest.WarningsRecorder) -> None:
    class Twice(Causally):
        def forward(self, x: Tensor) -> Tensor:
            inner = F.silu(x)
            first = inner[:, :, :1]
            return self.conv(torch.cat([first.repeat(1, 1, 2, 1, 1), first, inner], 2))

    for program in check(seeded(Twice), picture(1, 4, 3, 9, 8)):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        assert node.kwargs["repeats"] == (3, 0)
    assert not [warning for warning in recwarn if "erase" in str(warning.message)]


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


def test_ranks_agree_on_convolutions_that_write_their_edges() -> None:
    module, x = seeded(lambda: Around("reflect", 2)).requires_grad_(False), picture(1, 4, 13, 11)

    def rank(mesh: Mesh) -> Tensor:
        found = Sharded(module, [module])(x, mesh=mesh, grid=mesh.grid)
        assert found is not None
        return found

    for found in on_threads(Grid.parse("2x2"), x.device, rank):
        torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)


class Odd(nn.Module):
    """Graphs that resemble those that passes rewrite, but differ."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two = how, nn.Conv3d(4, 4, 3, padding=(0, 1, 1)), nn.Conv3d(4, 4, 3, padding=(0, 1, 1))
        self.gamma, self.single = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.pad(x, (0, 0, 0, 0, 2, 0)))
        scale = torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-3)
        if self.how == "twice":
            return y + y
        if self.how == "past":
            y = torch.cat([y, F.silu(y)], 2)
        elif self.how == "all dims":
            y = F.silu(y * torch.rsqrt(y.pow(2).mean(dim=None, keepdim=True) + 1e-3))
        elif self.how == "no map":
            y = F.silu(torch.mul(2.0, scale)).expand_as(y)
        elif self.how == "rounded":
            y = F.silu((y * scale).to(torch.bfloat16) * self.gamma)
        elif self.how == "one value":
            moved = y.movedim(1, -1)
            moved = moved * torch.rsqrt(moved.pow(2).mean(-1, keepdim=True) + 1e-3) * self.single
            y = F.silu(moved.movedim(-1, 1))
        elif self.how == "zeros repeated":
            y = F.pad(F.pad(y, (0, 0, 0, 0, 1, 0)), (1, 1, 1, 1, 1, 0), mode="replicate")[..., 1:-1, 1:-1]
        elif self.how == "the same twice":
            first = y[:, :, :1].repeat(1, 1, 1, 1, 1)
            y = torch.cat([first, y[:, :, :1], first], 2)
        return self.two(y)


ODD = ("twice", "past", "all dims", "no map", "rounded", "one value", "zeros repeated", "the same twice")


@pytest.mark.parametrize("how", ODD)
def test_graphs_that_resemble_known_ones_stay_exact(how: str) -> None:
    check(seeded(lambda: Odd(how)), picture(1, 4, 3, 9, 8))


def test_zeros_that_are_repeated_are_not_dead_taps() -> None:
    class Zeros(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(F.pad(x, (0, 0, 0, 0, 1, 0)), (1, 1, 1, 1, 1, 0), mode="replicate")
            return super().forward(x)

    check(seeded(lambda: Zeros(4, 4, 3)), picture(1, 4, 1, 9, 8))


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

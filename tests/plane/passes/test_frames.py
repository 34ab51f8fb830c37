"""Frames: taps that meet zeros, joined and repeated frames, padding, and messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plane.passes.cases import (
    GRIDS,
    Around,
    Causal,
    Causally,
    Cells,
    Steps,
    Written,
    added,
    check,
    larger,
    last,
    seeded,
    targets,
)
from plane.test_trace import picture, recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.kernels import winograd
from halovae.plane import Sharded, windows


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


def test_ranks_agree_on_convolutions_that_write_their_edges() -> None:
    module, x = seeded(lambda: Around("reflect", 2)).requires_grad_(False), picture(1, 4, 13, 11)

    def rank(mesh: Mesh) -> Tensor:
        found = Sharded(module, [module])(x, mesh=mesh, grid=mesh.grid)
        assert found is not None
        return found

    for found in on_threads(Grid.parse("2x2"), x.device, rank):
        torch.testing.assert_close(found, module(x), rtol=0, atol=1e-12)


def test_zeros_that_are_repeated_are_not_dead_taps() -> None:
    class Zeros(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(F.pad(x, (0, 0, 0, 0, 1, 0)), (1, 1, 1, 1, 1, 0), mode="replicate")
            return super().forward(x)

    check(seeded(lambda: Zeros(4, 4, 3)), picture(1, 4, 1, 9, 8))

"""Convolutions that compute while halos travel, then their edges again: exact, with the same messages as without."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.ranks import assert_exact, check, numbers, on_ranks
from plane.test_trace import recorded
from torch import Tensor, nn

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.plane import Plane, context, operators
from halovae.plane.layout import Bounds, Factor
from halovae.plane.rules import convolution
from halovae.planning.graphs import TracedTransport

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=500, derandomize=False, print_blob=True)


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of a few cells are large enough."""
    monkeypatch.setattr(convolution, "_MAP_TO_WEIGHTS", 0)
    monkeypatch.setattr(convolution, "_EXTENT_TO_HALO", 2)
    monkeypatch.setenv("HALOVAE_PASSES", "")  # they choose when the graph runs


def cuts(data: st.DataObject, size: int, ranks: int, least: int) -> Bounds:
    """Random bounds that leave every rank `least` cells."""
    spare = size - ranks * least
    points = sorted(data.draw(st.lists(st.integers(0, spare), min_size=ranks - 1, max_size=ranks - 1)))
    return (0, *(point + least * (rank + 1) for rank, point in enumerate(points)), size)


def drawn(data: st.DataObject) -> None:
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, cols = data.draw(st.sampled_from([(2, 1), (1, 2), (2, 2), (3, 1), (3, 2)]))
    frames = data.draw(st.booleans())
    kernel = [*([integer(1, 2)] if frames else []), 2 * integer(0, 2) + 1, 2 * integer(0, 2) + 1]
    dilation = [*([1] if frames else []), integer(1, 2), integer(1, 2)]
    padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    if frames and kernel[0] == 2:
        padding[0], dilation[0] = 1, 2  # as many frames as before
    least = [max(1, 2 * p) for p in padding[-2:]]
    height, width = (ranks * low + integer(0, 5) for ranks, low in zip((rows, cols), least, strict=True))
    groups = data.draw(st.sampled_from([1, 2]))
    x = numbers(integer(1, 2), 4, *([integer(2, 3)] if frames else []), height, width)
    weight, bias = numbers(2 * groups, 4 // groups, *kernel), numbers(2 * groups) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d if frames else torch.channels_last)
    convolve: Any = F.conv3d if frames else F.conv2d
    layout: list[tuple[Factor, ...]] = [(Factor(size),) if size != 1 else () for size in x.shape]
    for dim, (name, ranks, low) in enumerate((("rows", rows, least[0]), ("cols", cols, least[1])), x.ndim - 2):
        if ranks > 1:
            layout[dim] = (Factor(x.shape[dim], name, cuts(data, x.shape[dim], ranks, low)),)  # type: ignore[arg-type]
    seen: list[Any] = []

    def work(plane: Plane) -> Tensor:
        def run(operator: Any, *args: Any) -> Tensor:
            seen.append(operator)
            return Plane.run(plane, operator, *args)

        plane.run = run  # type: ignore[method-assign]
        with plane.working():
            placed = plane.to_layout(plane.lift(x), tuple(layout))
        found: Tensor = convolve(placed, weight, bias, 1, padding, dilation, groups)
        return found

    outcomes = on_ranks(work, Grid(rows=rows, cols=cols))
    assert_exact(outcomes, convolve(x, weight, bias, 1, padding, dilation, groups))
    reaches = [p for p, ranks in zip(padding[-2:], (rows, cols), strict=True) if ranks > 1 and p]
    assert (operators.convolution in seen) == bool(reaches)


@QUICK
@given(data=st.data())
def test_a_convolution_of_any_layout_is_exact(data: st.DataObject) -> None:
    drawn(data)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_many_convolutions_of_any_layout_are_exact(data: st.DataObject) -> None:
    drawn(data)


@pytest.mark.parametrize("grid", ["2x1", "3x1", "2x2"])
def test_ranks_that_wait_and_ranks_that_do_not_understand_each_other(
    grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages do not depend on how a rank computes: each rank decides by its own shard."""
    monkeypatch.setattr(convolution, "_EXTENT_TO_HALO", 6)
    weight = numbers(3, 4, 3, 3)
    size = {"2x1": (11, 9), "3x1": (17, 6), "2x2": (11, 11)}[grid]  # the last rank has a row, or a col, too few
    check(lambda x: F.conv2d(x, weight, padding=1), numbers(1, 4, *size), Grid.parse(grid))


@pytest.mark.parametrize("grid", [Grid(rows=2), Grid(cols=2), Grid(rows=2, cols=2)], ids=str)
def test_a_graph_knows_messages_bytes_and_work(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 5, padding=2)).double()
    x = numbers(1, 4, 12, 16)
    with torch.no_grad():
        expected = module(x)
    early = recorded(module, x, grid, module)
    monkeypatch.setattr(convolution, "_MAP_TO_WEIGHTS", 10**9)
    late = recorded(module, x, grid, module)
    for (full, program, mesh), (other, waiting, _) in zip(early, late, strict=True):
        assert any(node.target is operators.convolution for node in program.nodes())
        assert not any(node.target is operators.convolution for node in waiting.nodes())
        torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-12)
        assert (program.messages, program.bytes_sent) == (mesh.traffic.messages, mesh.traffic.bytes)
        assert (program.messages, program.bytes_sent) == (waiting.messages, waiting.bytes_sent)
        assert waiting.flops < program.flops < 2 * waiting.flops


def test_a_copy_is_taken_where_weights_are_larger_than_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HALOVAE_PASSES", "")
    module = nn.Conv2d(64, 64, 3, padding=1).double()  # 36,864 weights
    (_, program, _), _ = recorded(module, numbers(1, 64, 16, 8), Grid(rows=2), module)
    assert next(node.target for node in program.nodes()) is operators.fetch


def test_a_map_keeps_the_format_that_plain_pytorch_gives_it() -> None:
    """Attention's map has an odd stride for a batch of one. Neither it nor maps made of it are channels last."""
    norm, convolve = nn.GroupNorm(2, 4).double(), nn.Conv2d(4, 4, 3, padding=1).double()

    def function(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        return convolve(F.silu(norm((tokens.transpose(1, 2).reshape(x.shape) + x) / 2)))

    x = numbers(1, 4, 8, 6)
    with torch.no_grad():
        assert function(x).is_contiguous()

    def work(plane: Plane) -> Tensor:
        found = function(plane.scatter(x))
        assert found.is_contiguous()
        assert found.local.is_contiguous()  # type: ignore[attr-defined]
        return found

    with torch.no_grad():
        expected = function(x)
    assert_exact(on_ranks(work, Grid(rows=2)), expected)


def test_messages_are_waited_for_when_a_convolution_fails() -> None:
    waited: list[bool] = []

    class Counted(TracedTransport):
        def start(self, scope: Any, sends: Any, receives: Any) -> Any:
            return lambda: waited.append(True)

    mesh = Mesh(Grid(rows=2), torch.device("cpu"), Counted(0, 2))
    cut = (2, "rows", (0, 4, 8), (((-1, 5),), ((3, 9),)), 1, False, True)
    weight = numbers(3, 5, 3, 3)  # for maps of 5 channels
    with context.on(mesh), pytest.raises(RuntimeError):
        operators.convolution(numbers(1, 4, 4, 6), weight, None, (1, 1), (1, 1), 1, (cut,))  # type: ignore[arg-type]
    assert waited == [True]

"""Convolutions by Winograd whose windows are computed in row blocks or at once, against double precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.ranks import CPU
from torch import Tensor

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.kernels import winograd
from halovae.kernels.native import EAGER
from halovae.kernels.pool import BufferPool
from halovae.kernels.schemes import PLAIN
from halovae.plane import context, rings, windows
from halovae.plane.layout import Bounds, MeshDim, ranges
from halovae.plane.operators import Cut

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=600, derandomize=False, print_blob=True)
GRIDS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3)]
BOUND = 2e-5


@pytest.fixture(autouse=True)
def winograd_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd for any map, one row of tiles at a time."""
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: True)
    monkeypatch.setattr(winograd, "ROWS", 1)
    for name in ("empty", "scratch"):  # reads of unwritten memory give NaN
        monkeypatch.setattr(BufferPool, name, filled(getattr(BufferPool, name)))


def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(torch.nan)


def drawn_bounds(data: st.DataObject, ranks: int) -> Bounds:
    """Draw bounds; some shards are whole tiles."""
    bounds = [0]
    for _ in range(ranks):
        bounds.append(bounds[-1] + data.draw(st.sampled_from([1, 2, 4, 5, 8, 8, 12])))
    return tuple(bounds)


def normalized(x: Tensor, norm: Any, gamma: Tensor | None, beta: Tensor | None, silu: bool) -> Tensor:
    weight, bias = (None if one is None else one.double() for one in (gamma, beta))
    if norm is not None and len(norm) == 4:
        x = F.group_norm(x, norm[0], weight, bias, norm[1])
    elif norm is not None:
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(norm[0]) * norm[2]
        x = x if weight is None else x * per_channel(weight, x)
    return F.silu(x) if silu else x


def cuts_of(x: Tensor, vertical: Bounds, horizontal: Bounds) -> tuple[Cut, ...]:
    dims: tuple[tuple[int, MeshDim, Bounds], ...] = (x.ndim - 2, "rows", vertical), (x.ndim - 1, "cols", horizontal)
    return tuple(
        (dim, name, bounds, tuple(((a - 1, b + 1),) for a, b in ranges(bounds)), 1, False, False)
        for dim, name, bounds in dims
        if len(bounds) > 2
    )


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def drawn(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    some = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    rows, cols = some(*GRIDS)
    vertical, horizontal = drawn_bounds(data, rows), drawn_bounds(data, cols)
    frames, items = some(0, 1, 3), some(1, 2)  # 0 for a picture
    plane = vertical[-1], horizontal[-1]
    x = torch.randn(items, 4, *([frames] if frames else []), *plane)
    x = x.contiguous(memory_format=torch.channels_last_3d if frames else torch.channels_last) if some(0, 1) else x
    taps = some(1, 3, 3) if frames else 1
    before, zeros, repeats, past = (1 if taps == 3 and some(0, 0, 1) else 0), 0, (0, 0), None
    mode = some(None, "replicate", "reflect" if min(plane) > 1 else None)
    if taps == 3 and not before:
        zeros, repeats, past = some(
            (2, (0, 0), None), (0, (2, 0), None), (0, (1, 1), None), (1, (0, 0), torch.randn(items, 4, 1, *plane)),
            (0, (0, 0), torch.randn(items, 4, 2, *plane)),
        )  # fmt: skip
    channels = some(4, 8)
    weight, bias = torch.randn(channels, 4, *([taps] if frames else []), 3, 3) / 6, some(None, torch.randn(channels))
    gamma, beta, silu = some(None, torch.rand(4) + 0.5), None, some(True, False)
    scopes: dict[Any, Any] = {(False, True): "cols", (True, False): "rows"}
    sizes = [(b - a) * (d - c) for a, b in ranges(vertical) for c, d in ranges(horizontal)]
    counts = tuple(2 * (frames or 1) * size for size in sizes) if rows * cols > 1 else ()
    norm = some(None, (2, 1e-5, scopes.get((rows > 1, cols > 1), "plane"), counts), (1e-12, 0.0, 2.0))
    if norm is not None and len(norm) == 4 and some(0, 1):
        beta = torch.randn(4)
    kept = some(0, 1, 2) if past is not None else 0

    wide = normalized(x.double(), norm, gamma, beta, silu)
    if frames:
        wide = torch.cat([wide[:, :, :1]] * repeats[0] + [wide] + [wide[:, :, -1:]] * repeats[1], 2)
        wide = wide if past is None else torch.cat([past.double(), wide], 2)
        wide = F.pad(wide, (0, 0, 0, 0, before + zeros, before))
    last = wide[:, :, wide.shape[2] - before - kept : wide.shape[2] - before] if kept else None
    ring = (1, 1, 1, 1)
    if mode is None:
        window = F.pad(wide, ring)
    else:
        window = F.pad(wide.flatten(1, -3), ring, mode=mode)
        window = window.unflatten(1, wide.shape[1:-2]) if frames else window
    convolve: Any = F.conv3d if frames else F.conv2d
    expected = convolve(window, weight.double(), None if bias is None else bias.double())
    onto = some(None, torch.randn(expected.shape))
    expected = expected if onto is None else expected + onto.double()
    spare = some(True, False)

    def work(mesh: Mesh) -> tuple[Tensor, Tensor | None]:
        (top, bottom), (left, right) = ranges(vertical)[mesh.row], ranges(horizontal)[mesh.col]

        def own(map_: Tensor | None) -> Tensor | None:
            return None if map_ is None else map_[..., top:bottom, left:right].clone()

        local = own(x)
        assert local is not None
        cuts = cuts_of(x, vertical, horizontal)
        sides = left == 0, right == horizontal[-1], top == 0, bottom == vertical[-1]
        edges: Any = None if mode is None else (mode, sides)
        keep = torch.full((items, 4, kept, *local.shape[-2:]), torch.nan) if kept else None
        padding = (*([before] if frames else []), 1, 1)
        with context.on(mesh, EAGER, BufferPool(CPU)), torch.inference_mode():
            found = windows.convolution(
                local, weight, bias, padding, cuts, False, zeros=zeros, past=own(past), keep=keep, gamma=gamma,
                beta=beta, norm=norm, silu=silu, spare=spare, repeats=repeats, edges=edges, onto=own(onto),
            )  # fmt: skip
            assert found.shape[-2:] == local.shape[-2:]
            assert mesh.traffic.calls == len(cuts) + (rows * cols > 1 and norm is not None and len(norm) == 4)
            return found.clone(), keep

    for rank, (found, keep) in enumerate(on_threads(Grid(rows=rows, cols=cols), CPU, work)):
        (top, bottom), (left, right) = ranges(vertical)[rank // cols], ranges(horizontal)[rank % cols]
        wanted = expected[..., top:bottom, left:right]
        torch.testing.assert_close(found.double(), wanted, rtol=BOUND, atol=BOUND)
        if last is not None:
            assert keep is not None
            torch.testing.assert_close(keep.double(), last[..., top:bottom, left:right], rtol=BOUND, atol=BOUND)


@QUICK
@given(data=st.data())
def test_a_convolution_of_any_window_is_exact(data: st.DataObject) -> None:
    drawn(data)


@QUICK
@given(data=st.data())
def test_an_upsampled_convolution_is_exact_on_any_grid(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows, cols = data.draw(st.sampled_from(GRIDS))
    vertical, horizontal = drawn_bounds(data, rows), drawn_bounds(data, cols)
    x = torch.randn(data.draw(st.integers(1, 2)), 4, vertical[-1], horizontal[-1])
    weight, bias = torch.randn(8, 4, 3, 3) / 6, torch.randn(8)
    larger = F.interpolate(x.double(), scale_factor=2.0)
    expected = F.conv2d(larger, weight.double(), bias.double(), padding=1)

    def work(mesh: Mesh) -> None:
        (top, bottom), (left, right) = ranges(vertical)[mesh.row], ranges(horizontal)[mesh.col]
        with context.on(mesh, EAGER, BufferPool(CPU)), torch.inference_mode():
            found = windows.upsampled_convolution(
                x[..., top:bottom, left:right].clone(), weight, bias, cuts_of(x, vertical, horizontal)
            )
        wanted = expected[..., 2 * top : 2 * bottom, 2 * left : 2 * right]
        torch.testing.assert_close(found.double(), wanted, rtol=BOUND, atol=BOUND)

    on_threads(Grid(rows=rows, cols=cols), CPU, work)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_many_convolutions_of_windows_are_exact(data: st.DataObject) -> None:
    drawn(data)


def test_a_window_of_whole_tiles_is_never_allocated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def window(*_: object) -> Tensor:
        raise AssertionError("a whole window")

    monkeypatch.setattr(rings, "window", window)
    x, weight = torch.randn(1, 4, 16, 12), torch.randn(4, 4, 3, 3)
    with context.on(Mesh(Grid(), CPU), EAGER, BufferPool(CPU)), torch.inference_mode():
        found = windows.convolution(x, weight, None, (1, 1), (), False, silu=True)
        larger = windows.upsampled_convolution(x, weight, None, ())
    torch.testing.assert_close(found, F.conv2d(F.silu(x), weight, padding=1), rtol=0, atol=BOUND)
    repeated = F.interpolate(x, scale_factor=2.0)
    torch.testing.assert_close(larger, F.conv2d(repeated, weight, padding=1), rtol=0, atol=BOUND)


@pytest.mark.parametrize("blocks", [1, 2])
def test_row_blocks_overwrite_the_map_unless_rows_are_read_again(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "WEIGHTS", 36 * 64 * 64 // blocks)
    made, window = list[Any](), rings.window

    def counted(*args: Any) -> Tensor:
        made.append(args)
        return window(*args)

    monkeypatch.setattr(rings, "window", counted)
    x = torch.randn(1, 64, 16, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3) / 24
    expected = F.conv2d(F.silu(x), weight, padding=1)
    for spare in (False, True):
        made.clear()
        with context.on(Mesh(Grid(), CPU), EAGER, BufferPool(CPU)), torch.inference_mode():
            found = windows.convolution(x, weight, None, (1, 1), (), False, silu=True, spare=spare)
        assert (found.data_ptr() == x.data_ptr()) is spare
        assert len(made) == int(spare and blocks == 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_only_the_outermost_row_blocks_wait_for_halos() -> None:
    events = list[Any]()

    class Noted:
        x = torch.zeros(1, 4, 1, 20, 8)

        def write(self, item: int, start: int, rows: slice, block: Tensor) -> None:
            events.append((start + rows.start, start + rows.stop))
            block[:, :, rows].zero_()

    out = torch.empty(1, 4, 1, 20, 8)
    weight, ready = torch.zeros(4, 4, 1, 3, 3), lambda: events.append("ready")
    with torch.inference_mode():
        winograd.convolve(PLAIN, Noted(), weight, None, out, EAGER, BufferPool(CPU), ready=ready)
    assert events == [(1, 6), (6, 10), (10, 14), (14, 18), "ready", (18, 22), (0, 1)]
    assert not out.any()

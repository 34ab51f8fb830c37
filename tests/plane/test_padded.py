"""Maps padded with a value stay channels last, and equal PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halovae import Grid, Mesh
from halovae.plane import context, windows
from halovae.plane.tensor import is_channels_last

MESH = Mesh(Grid(), torch.device("cpu"))


@settings(deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    items=st.integers(1, 2),
    channels=st.integers(1, 5),
    widths=st.lists(st.integers(-1, 3), min_size=2, max_size=8).filter(lambda one: len(one) % 2 == 0),
    value=st.sampled_from([0.0, -1.5]),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_padded_maps_are_pytorchs(
    sizes: list[int], items: int, channels: int, widths: list[int], value: float, last: bool, dtype: torch.dtype
) -> None:
    shape = (items, *sizes, channels) if last else (items, channels, *sizes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.movedim(-1, 1) if last else x
    widths = widths[: 2 * x.ndim]
    after = [x.shape[-1 - at // 2] + widths[at] + widths[at + 1] for at in range(0, len(widths), 2)]
    if min(after, default=1) < 1:
        return
    with context.on(MESH), torch.inference_mode():
        found = windows.padded(x, widths, value)
    assert torch.equal(found, F.pad(x, widths, value=value))


@pytest.mark.parametrize("shape", [(1, 8, 6, 5), (1, 8, 1, 6, 5), (2, 8, 3, 6, 5)])
def test_padded_maps_keep_their_channels_last(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    with context.on(MESH), torch.inference_mode():
        found = windows.padded(x, (0, 1, 0, 1, 0, 0, 0, 0))
        assert is_channels_last(found)
        # PyTorch's result does not for such a picture, which modules cut out of a clip of one frame.
        frame = torch.randn(1, 1, 6, 5, 8).permute(0, 1, 4, 2, 3).reshape(1, 8, 6, 5)
        assert windows.padded(frame, (0, 1, 0, 1)).stride(1) == 1

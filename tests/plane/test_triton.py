"""The Triton kernels for CUDA devices, in Triton's interpreter on the CPU: against PyTorch, and in graphs on grids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plane.passes.cases import AROUND, ODD, Block, Causal, Odd, check, seeded, targets
from plane.test_trace import picture
from torch import Tensor, nn

from halovae import Grid
from halovae.plane import backends, group_norms, windows
from halovae.plane.norms import per_channel

if torch.cuda.is_available():
    pytest.skip("Triton's interpreter is for machines without CUDA devices", allow_module_level=True)
kernels: Any = pytest.importorskip("halovae.plane.triton_kernels", exc_type=ImportError)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels on the CPU, too."""
    monkeypatch.setattr(backends, "kernels", lambda kind: None if kind == "meta" else kernels)


class Norms(nn.Module):
    """A block as in Wan, with a norm over each cell's channels and a causal convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(3, 1, 1, 1))
        self.conv = Causal()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(F.normalize(x, dim=1) * 3**0.5 * self.gamma))


def maps(data: st.DataObject) -> tuple[Tensor, int]:
    groups, size = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 5]))
    extents = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(data.draw(st.integers(1, 2)), groups * size, *extents, dtype=torch.float64) * 3 + 20
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return x.to(dtype).contiguous(memory_format=form(x)), groups


def form(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def close(found: Tensor, expected: Tensor) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * float(expected.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_group_norm_equals_pytorchs_and_writes_only_to_its_output(data: st.DataObject) -> None:
    x, groups = maps(data)
    weight, bias = torch.randn(2, x.shape[1], dtype=x.dtype)
    silu = data.draw(st.booleans())
    larger = torch.zeros([*x.shape[:2], *(extent + 2 for extent in x.shape[2:])], dtype=x.dtype)
    larger = larger.contiguous(memory_format=form(x))
    part = larger
    for dim in range(2, x.ndim):
        part = part.narrow(dim, 1, x.shape[dim])
    shift = data.draw(st.sampled_from([None, torch.randn(x.shape[1], dtype=x.dtype)]))
    moments = kernels.moments(x, shift, groups)
    kernels.group_norm(x, shift, moments, weight, bias, 1e-6, silu, part)
    wide = x.double() if shift is None else x.double() + per_channel(shift, x).double()
    variance, mean = torch.var_mean(wide.unflatten(1, (groups, -1)).flatten(2), -1, correction=0)
    torch.testing.assert_close(moments.double(), torch.stack((variance, mean)), rtol=1e-5, atol=1e-5)
    scale = (variance + 1e-6).rsqrt().repeat_interleave(x.shape[1] // groups, 1) * weight.double()
    offset = bias.double() - mean.repeat_interleave(x.shape[1] // groups, 1) * scale
    ones = (1,) * (x.ndim - 2)
    expected = wide * scale.view(*scale.shape, *ones) + offset.view(*offset.shape, *ones)
    if variance.min() > 1e-3:  # otherwise groups of one value leave only rounding errors
        close(part, F.silu(expected) if silu else expected)
    assert torch.count_nonzero(larger) == torch.count_nonzero(part)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_norms_of_cells_and_upsampling_equal_pytorchs(data: st.DataObject) -> None:
    x, _ = maps(data)
    weight, out = torch.randn(x.shape[1], dtype=x.dtype), torch.empty_like(x)
    kernels.norm_of_cells(x, weight, weight, (1e-12, 0.0, 1.7), True, out)
    wide = (
        F.normalize(x.double() + per_channel(weight, x).double(), dim=1)
        * 1.7
        * weight.double().view(-1, *(1,) * (x.ndim - 2))
    )
    close(out, F.silu(wide))
    kernels.norm_of_cells(x, None, None, None, False, out)
    assert torch.equal(out, x)
    kernels.add(x, out, weight, out)
    close(out, 2 * x.double() + per_channel(weight, x).double())
    factors = tuple(data.draw(st.integers(1, 3)) for _ in x.shape[2:])
    expected = F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest")
    assert torch.equal(kernels.upsampled(x, factors), expected)


@pytest.mark.usefixtures("triton")
def test_a_block_is_exact_on_grids() -> None:
    for program in check(seeded(Block), picture(1, 4, 13, 11)):
        found = [node for node in program.nodes() if node.target is windows.convolution]
        assert [node.kwargs["silu"] for node in found] == [True, True]
        assert group_norms.group_norm not in targets(program)
        assert [("shift" in node.kwargs) for node in found] == [False, True]
        assert windows.added_ in targets(program)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("frames", [1, 4])
def test_norms_before_causal_convolutions_are_exact_on_grids(frames: int) -> None:
    for program in check(seeded(Norms), picture(1, 3, frames, 9, 8)):
        (node,) = (node for node in program.nodes() if node.target is windows.convolution)
        assert ("zeros" in node.kwargs) is (frames > 1)  # an image has only one live tap
        assert "norm" in node.kwargs


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", list(AROUND))
def test_padding_around_a_map_is_exact_on_grids(name: str) -> None:
    make, ndim = AROUND[name]
    for program in check(seeded(make), picture(2, 4, *(3, 13, 11)[-ndim:])):
        assert windows.convolution in targets(program)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("how", ODD)
def test_graphs_that_resemble_known_ones_stay_exact(how: str) -> None:
    check(seeded(lambda: Odd(how)), picture(1, 4, 3, 9, 8))


@pytest.mark.usefixtures("triton")
def test_a_map_whose_plane_is_transposed_is_normalized() -> None:
    class Transposed(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 1, 2).transpose(1, 3)) * 2

    check(seeded(lambda: Transposed(2, 8)), picture(1, 4, 8, 8), (Grid(),))


def test_kernels_compile_for_a_device() -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 38


@pytest.mark.parametrize("columns", [1, 7, 300])
def test_attention_of_wide_heads_equals_pytorchs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_SCORES", 2 * 5 * columns)  # five queries at a time
    query = torch.randn(1, 2, 12, 8).bfloat16() * 5
    key, value = torch.randn(2, 1, 2, columns, 8).bfloat16() * 5
    for scale in (0.3, -0.3):
        found = kernels.attention(query, key, value, scale).view(1, 2, 12, 8)
        expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        close(found, expected)

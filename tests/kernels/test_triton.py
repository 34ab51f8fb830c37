"""The Triton kernels, in Triton's interpreter on the CPU: against PyTorch, and in graphs on grids."""

from __future__ import annotations

import importlib
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
kernels: Any = pytest.importorskip("halovae.kernels.triton_kernels", exc_type=ImportError)
softmax: Any = importlib.import_module("halovae.kernels.triton_kernels.softmax")


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


STRIDES = ("contiguous", "with gaps", "a plane turned around", "every second cell", "one cell everywhere")


def strided(x: Tensor, how: str) -> Tensor:
    """A map's values with other strides."""
    if how == "with gaps":
        larger = torch.full([*x.shape[:-1], x.shape[-1] + 3], float("nan"), dtype=x.dtype)
        larger[..., 1:-2] = x
        return larger[..., 1:-2]
    if how == "a plane turned around":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every second cell":
        larger = x.repeat_interleave(2, -1).contiguous(memory_format=form(x))
        return larger[..., ::2]
    if how == "one cell everywhere":
        return x[..., :1].expand_as(x)
    return x.contiguous()


def close(found: Tensor, expected: Tensor) -> None:
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[found.dtype]
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
    larger = torch.empty_like(expected)
    kernels.upsample(x, factors, larger)
    assert torch.equal(larger, expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_maps_of_any_strides_are_read_and_parts_of_larger_ones_written(data: st.DataObject) -> None:
    x, groups = maps(data)
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    x = strided(x.to(dtype), data.draw(st.sampled_from(STRIDES)))
    weight = torch.randn(x.shape[1], dtype=dtype)
    larger = torch.zeros([*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 2], dtype=dtype)
    larger = larger.contiguous(memory_format=form(x))
    part = larger[..., 2:-1, 1:-1]
    kernels.norm_of_cells(x, None, weight, (0.0, 1e-6, 1.5), True, part)
    wide = x.double()
    scaled = wide / (wide.square().sum(1, keepdim=True) + 1e-6).sqrt() * 1.5 * per_channel(weight, x).double()
    close(part, F.silu(scaled))
    part.zero_()
    assert not larger.any()
    variance, mean = kernels.moments(x, None, groups)
    grouped = wide.unflatten(1, (groups, -1)).flatten(2)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), grouped.var(-1, correction=0), rtol=1e-4, atol=1e-4)
    larger = torch.zeros([*x.shape[:2], *(2 * size + 2 for size in x.shape[2:])], dtype=dtype)
    larger = larger.contiguous(memory_format=form(x))
    inner = larger[..., 1:-1, 1:-1] if x.ndim == 4 else larger[..., 1:-1, 1:-1, 1:-1]
    kernels.upsample(x, (2,) * (x.ndim - 2), inner)
    assert torch.equal(inner, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.count_nonzero(larger) == torch.count_nonzero(inner)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_moments_of_uneven_shards_combine_to_those_of_all(data: st.DataObject) -> None:
    """Also where values are large beside their spread."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    items, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    shards = [torch.randn(items, groups, size, dtype=torch.float64) + 100 * index for index, size in enumerate(sizes)]
    parts = torch.stack([torch.stack(torch.var_mean(one, -1, correction=0)) for one in shards]).to(dtype)
    shares = torch.tensor([size / sum(sizes) for size in sizes], dtype=dtype)
    variance, mean = torch.var_mean(torch.cat(shards, -1), -1, correction=0)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    found = kernels.together(strided(parts, "with gaps"), shares).double()
    torch.testing.assert_close(found[0], variance, rtol=limit, atol=limit * 1e2)
    torch.testing.assert_close(found[1], mean, rtol=limit, atol=limit)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_sums_round_once_whatever_their_sizes(data: st.DataObject) -> None:
    x, _ = maps(data)
    x = x.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    y, bias = torch.randn_like(x), torch.randn(x.shape[1], dtype=x.dtype)
    alone, both = torch.empty_like(x), torch.empty_like(x)
    kernels.add(x, None, bias, alone)
    kernels.add(x, y, bias, both)
    close(alone, x.double() + per_channel(bias, x).double())
    total = x.float() + y.float() + per_channel(bias, x).float()
    if x.dtype == torch.bfloat16:  # Triton's interpreter (3.9) cuts bits off where devices round
        close(both, total.double())
    else:
        assert torch.equal(both, total.to(x.dtype))


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
    assert int(done.stdout) == 90


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["contiguous", "with gaps", "a plane turned around"])
@pytest.mark.parametrize("columns", [1, 7, 300])
def test_attention_of_wide_heads_equals_pytorchs(
    columns: int, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(softmax, "_SCORES", 2 * 5 * columns)  # five queries at a time
    query = strided(torch.randn(1, 2, 12, 8).to(dtype) * 5, how)
    key, value = (strided(one, how) for one in torch.randn(2, 1, 2, columns, 8).to(dtype) * 5)
    for scale in (0.3, -0.3):
        found = kernels.attention(query, key, value, scale).view(1, 2, 12, 8)
        expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        close(found, expected)

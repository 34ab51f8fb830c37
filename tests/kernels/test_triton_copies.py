"""Triton kernels for sums with residuals, halo borders, and bytes, in Triton's interpreter: against PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_triton import STRIDES, close, form, maps, strided
from torch import Tensor

from halovae.plane.norms import per_channel
from halovae.runtime.options import Sharing

kernels: Any = pytest.importorskip("halovae.kernels.triton_kernels", exc_type=ImportError)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def laid(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=form(x) if last else torch.contiguous_format)


def window(x: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """A larger map of NaNs, and the part of it that has the map's shape."""
    larger = laid(x.new_full([*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 2], float("nan")), last)
    return larger, larger[..., 1:-1, 1:-1]


def rounded(total: Tensor, found: Tensor) -> None:
    """Check a sum that was rounded once: Triton's interpreter (3.9) cuts bits of bf16 off where devices round."""
    if found.dtype == torch.bfloat16:
        close(found, total.double())
    else:
        assert torch.equal(found, total.to(found.dtype))


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans())
def test_norms_of_sums_keep_the_sum_and_write_into_a_window(
    data: st.DataObject, dtype: torch.dtype, last: bool, shifted: bool, out_last: bool
) -> None:
    x, groups = maps(data)
    x = laid(x.to(dtype), last)
    y, (shift, weight, bias) = torch.randn_like(x), torch.randn(3, x.shape[1], dtype=dtype)
    assert kernels.adds(x, y)
    wide = torch.promote_types(dtype, torch.float32)
    total = x.to(wide) + y.to(wide)
    total = total + per_channel(shift, x).to(wide) if shifted else total
    given_shift = shift if shifted else None
    norm = data.draw(st.sampled_from([None, (1e-12, 0.0, 1.7)]))

    one, (larger, part) = x.clone(), window(x, out_last)
    kernels.norm_of_cells(one, given_shift, None if norm is None else weight, norm, True, part, y)
    rounded(total, one)
    expected = one.double()
    if norm is not None:
        expected = F.normalize(expected, dim=1) * norm[2] * per_channel(weight, x).double()
    close(part, F.silu(expected))
    assert int(larger.isnan().sum()) == larger.numel() - x.numel()

    one = x.clone()
    moments = kernels.moments(one, given_shift, groups, y)
    rounded(total, one)
    torch.testing.assert_close(moments, kernels.moments(one, None, groups), rtol=1e-5, atol=1e-5)
    kernels.group_norm(one, None, moments, weight, bias, 1e-6, True, part)
    if moments[0].min() > 1e-3:  # otherwise groups of one value leave only rounding errors
        close(part, F.silu(F.group_norm(one.double(), groups, weight.double(), bias.double(), 1e-6)))

    over = x.clone()
    kernels.norm_of_cells(over, given_shift, None, None, False, over, y)  # in place
    rounded(total, over)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_contiguous_and_channels_last_maps_give_the_same(data: st.DataObject, dtype: torch.dtype) -> None:
    x, groups = maps(data)
    shift = torch.randn(x.shape[1], dtype=dtype)
    results = []
    for last in (True, False):
        one = laid(x.to(dtype), last)
        moments = kernels.moments(one, shift, groups)
        out, total = torch.empty_like(one), torch.empty_like(one)
        kernels.group_norm(one, shift, moments, None, None, 1e-2, False, out)
        kernels.add(one, one, shift, total)
        results.append((moments, out, total))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", STRIDES)
def test_only_maps_of_one_layout_without_gaps_are_added(how: str) -> None:
    x = torch.randn(1, 4, 3, 5)
    found = strided(x, how)
    assert kernels.adds(x, found) is (how == "contiguous")
    assert kernels.adds(found, found) is (how == "contiguous")
    assert not kernels.adds(x, laid(x, True))
    assert not kernels.adds(x, x.double())
    assert kernels.adds(laid(x, True), laid(x, True))
    assert not kernels.adds(x[0], x[0])


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([-2, -1]), st.booleans())
def test_borders_are_packed_as_contiguous_and_unpacked_into_a_window(
    data: st.DataObject, dtype: torch.dtype, last: bool, dim: int, thin: bool
) -> None:
    x, _ = maps(data)
    x = laid(x.to(dtype), last)
    x = x.narrow(dim, 0, 1) if thin else x
    first, final = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    messages = kernels.packed(first, final)
    assert torch.equal(messages, torch.stack((first, final)))
    assert messages.is_contiguous()
    larger, _ = window(x, data.draw(st.booleans()))
    ring = larger.narrow(-3 - dim, 1, x.shape[-3 - dim])
    borders = ring.narrow(dim, 0, 1), ring.narrow(dim, ring.shape[dim] - 1, 1)
    before, after = data.draw(st.booleans()), data.draw(st.booleans())
    kernels.unpack((messages[0] if before else None, messages[1] if after else None), borders)
    for there, message, border in zip((before, after), messages, borders, strict=True):
        assert torch.equal(border, message if there else torch.zeros_like(message))
    assert int(larger.isnan().sum()) == larger.numel() - 2 * first.numel()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(STRIDES))
def test_bytes_equal_pytorchs_steps(data: st.DataObject, dtype: torch.dtype, how: str) -> None:
    extents = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = strided((torch.randn(2, data.draw(st.integers(1, 4)), *extents) * 0.8).to(dtype), how)
    found = kernels.as_bytes(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))


def test_halves_round_to_even_and_values_beyond_are_clamped() -> None:
    values = torch.tensor([-3e38, -1, 0, 2 / 255, -2 / 255, 1, 7, float("inf")]).view(1, 1, 2, 4)
    assert kernels.as_bytes(values).flatten().tolist() == [0, 0, 128, 128, 126, 255, 255, 255]


def test_conversions_to_bytes_use_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from halovae.plane import backends

    x = torch.randn(1, 3, 2, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    convert = Sharing(dtype=torch.uint8).convert
    assert convert is not None
    plain, calls = convert(x), []

    class Counted:
        @staticmethod
        def as_bytes(x: Tensor) -> Any:
            calls.append(x.shape)
            return kernels.as_bytes(x)

    monkeypatch.setattr(backends, "kernels", lambda kind: Counted)
    assert torch.equal(convert(x), plain)
    assert calls == [x.shape]
    assert torch.equal(convert(x[0, 0]), plain[0, 0])  # no map
    assert len(calls) == 1

"""Norms: over each cell's channels, compiled and by PyTorch's operators; and GroupNorm of some cells at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halovae import Grid, Mesh
from halovae.kernels.native import EAGER, compiled
from halovae.plane import context, group_norms, moments, norms

MESH = Mesh(Grid(), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("norm", "gamma", "silu"),
    [
        ((1e-12, 0.0, 4.0), True, True),
        ((0.0, 16 * 1e-6, 4.0), True, False),
        ((0.5, 0.0, 1.0), False, True),
        ((1e-30, 0.0, 1.0), False, False),  # underflows when squared
    ],
)
@torch.inference_mode()
def test_loops_normalize_as_operators_do(dtype: torch.dtype, norm: norms.Cells, gamma: bool, silu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 3, 5, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    x[0, :, 1, 2] *= 1e-3
    x[1, :, 2, 3] = 0 if norm[1] or norm[0] > 1e-20 else 1
    weight = torch.randn(16, 1, 1, 1, generator=generator).to(dtype) if gamma else None
    outs = [torch.zeros(2, 5, 7, 8, 16, dtype=dtype).movedim(-1, 1) for _ in range(2)]
    inner = [out[:, :, 2:, 1:-1, 1:-1] for out in outs]
    for kernels, out in zip((EAGER, compiled()), inner, strict=True):
        with context.on(MESH, kernels):
            norms.write(x, None, weight, None, norm, silu, out)
    torch.testing.assert_close(outs[1], outs[0], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_map_is_normalized_in_place() -> None:
    x = torch.randn(1, 16, 4, 5).contiguous(memory_format=torch.channels_last)
    norm = 1e-12, 0.0, 4.0
    with context.on(MESH):
        expected = norms.activated(x.clone(), None, None, None, norm, True, False)
    for kernels in (EAGER, compiled()):
        reused = x.clone()
        with context.on(MESH, kernels):
            found = norms.activated(reused, None, None, None, norm, True, True)
        torch.testing.assert_close(found, expected)
        assert found.data_ptr() == reused.data_ptr()


@pytest.mark.parametrize("values", [1, 200, 10**6])  # one cell at a time; some, with fewer in the last part; all
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_group_norm_of_some_cells_at_a_time(values: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_VALUES", values)
    monkeypatch.setattr(moments, "_VALUES_ON_CPU", values)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 7, 5, generator=generator).mul_(3).add_(10).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    gamma, beta = (torch.randn(8, generator=generator).to(dtype) for _ in range(2))
    expected = F.silu(F.group_norm(x.double(), 4, gamma.double(), beta.double(), 1e-5))
    wide = torch.promote_types(dtype, torch.float32)
    found = moments.moments(x, 4, wide)
    exact = torch.stack(torch.var_mean(x.double().unflatten(1, (4, -1)).flatten(2), -1, correction=0))
    torch.testing.assert_close(found.double(), exact, rtol=64 * torch.finfo(wide).eps, atol=0)
    window = torch.full((2, 9, 7, 8), torch.nan, dtype=dtype).movedim(-1, 1)
    inner = window[:, :, 1:-1, 1:-1]
    with context.on(MESH):
        norms.write(x, None, gamma, beta, (4, 1e-5, "plane", ()), True, inner)
        norms.write(x, None, gamma, beta, (4, 1e-5, "plane", ()), True, x)  # in place
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(inner.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("items", [1, 2])
@torch.inference_mode()
def test_group_norm_of_a_large_channels_last_map_is_as_exact_as_of_a_contiguous_one(items: int) -> None:
    x = torch.randn(items, 32, 9, 96, 96, generator=torch.Generator().manual_seed(0)) + 3
    weight, bias = torch.linspace(0.5, 2, 32), torch.linspace(-1, 1, 32)
    expected = F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    with context.on(MESH, compiled()):
        found = group_norms.whole_group_norm(last, 8, weight, bias, 1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)

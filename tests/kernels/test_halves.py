"""Half-precision products computed in fp32, on CPUs without units for half precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halovae.kernels import halves

HALF = (torch.bfloat16, torch.float16)
SIZES = ((1, 4, 3, 6, 7), (6, 4, 3, 3, 3), (6, 2))


@pytest.fixture(params=[False, True], ids=["no units", "units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(halves, "has_units", lambda dtype: request.param or dtype not in HALF)
    return bool(request.param)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@torch.inference_mode()
def test_products_are_computed_in_fp32_where_there_are_no_units(dtype: torch.dtype, units: bool) -> None:
    seen = []

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        seen.append((x.dtype, weight.dtype))
        return F.conv2d(x, weight, bias)

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 8, 9, 9), (4, 8, 3, 3)))
    result = halves.multiplied(operator, x, weight, None)
    wide = torch.float32 if dtype in HALF and not units else dtype
    assert seen == [(wide, wide)]
    assert result.dtype == dtype
    assert torch.equal(result, F.conv2d(x.to(wide), weight.to(wide)).to(dtype))


@pytest.mark.parametrize("cells", [(3, 4), (1, 1), (1, 5), (2, 3, 4), (1, 1, 1)])
@pytest.mark.parametrize("step", [1, 2])
@torch.inference_mode()
def test_small_maps_are_convolved_contiguous_and_keep_their_layout(cells: tuple[int, ...], step: int) -> None:
    torch.manual_seed(0)
    ndim = len(cells)
    form = torch.channels_last if ndim == 2 else torch.channels_last_3d
    x = torch.randn(2, 32, *cells).contiguous(memory_format=form)
    weight, bias = torch.randn(48, 32, *[3] * ndim), torch.randn(48)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "convolution" in str(func):
                seen.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    with Watch():
        found = halves.convolution(x, weight, bias, [step] * ndim, [1] * ndim, [1] * ndim, False, [0] * ndim, 1)
    convolve = F.conv2d if ndim == 2 else F.conv3d
    expected = convolve(x.double(), weight.double(), bias.double(), step, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert found.is_contiguous(memory_format=form)
    assert seen == [True]


@pytest.mark.parametrize("around", [2, 7])  # rows of the result may see only padding
@pytest.mark.parametrize("values", [1, 100, 10**6])
@pytest.mark.parametrize("shape", [(2, 8, 9, 7), (2, 8, 3, 9, 7)])
@torch.inference_mode()
def test_row_blocks_in_fp32_equal_all_rows_at_once(
    shape: tuple[int, ...], values: int, around: int, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "_VALUES", values)
    torch.manual_seed(0)
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    spatial = len(shape) - 2
    x = torch.randn(shape).bfloat16().contiguous(memory_format=form)
    weight, bias = torch.randn(4, 4, *(3,) * spatial).bfloat16(), torch.randn(4).bfloat16()
    padding, dilation = (1, around, 1)[-spatial:], (1, 2, 1)[-spatial:]
    convolve = F.conv2d if spatial == 2 else F.conv3d
    found = halves.convolved(x, weight, bias, padding, dilation, 2)
    expected = convolve(x.float(), weight.float(), bias.float(), 1, padding, dilation, 2)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2 if units else 2**-7)
    weight = torch.randn(5, 8).bfloat16()
    found = halves.linear(x, weight, None)
    expected = F.linear(x.movedim(1, -1).float(), weight.float()).movedim(-1, 1)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=form)


@pytest.mark.parametrize("answer", [True, False, None])
def test_units_need_onednn_support(answer: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = {} if answer is None else dict.fromkeys(halves._ASKED.values(), lambda: answer)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**queries))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64"}, raising=False)
    for dtype in HALF:
        assert halves.has_units.__wrapped__(dtype) is bool(answer)
    assert halves.has_units.__wrapped__(torch.float32)


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, True),
    ],
)
def test_bf16_on_x86_needs_instructions_for_it(
    capabilities: dict[str, Any], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = dict.fromkeys(halves._ASKED.values(), lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**queries))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert halves.has_units.__wrapped__(torch.bfloat16) is units
    assert halves.has_units.__wrapped__(torch.float16)


def test_onednn_support_suffices_where_torch_has_no_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**dict.fromkeys(halves._ASKED.values(), lambda: True)))
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert halves.has_units.__wrapped__(torch.bfloat16)


@torch.inference_mode()
def test_on_other_devices_nothing_is_cast(units: bool) -> None:
    x = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    seen = []

    def operator(one: Tensor, other: Tensor) -> Tensor:
        seen.append(one.dtype)
        return one @ other

    assert halves.multiplied(operator, x, x.T).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), ((1, 2, 2), (0, 1, 1), 1), (1, 1, 2)])
def test_small_clips_are_convolved_without_a_copy_of_each_cell(stride: Any, padding: Any, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((1, 8, 4, 7, 9), (6, 8 // groups, 3, 3, 3), (6,))
    )
    three = [torch.nn.modules.utils._triple(one) for one in (stride, padding, 1, 0)]
    arguments = x, weight, bias, three[0], three[1], three[2], False, three[3], groups
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        got = halves.convolution(*arguments)
    expected = torch.ops.aten.convolution.default(*arguments)
    torch.testing.assert_close(got, expected)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d" not in names


@pytest.mark.parametrize("how", ["strided", "expanded", "fp64"])
def test_a_bias_may_have_any_strides_and_any_dtype_that_pytorch_takes(how: str) -> None:
    x, weight, wide = (torch.arange(size.numel()).view(size).sin() for size in map(torch.Size, SIZES))
    bias = {"strided": wide[:, 1], "expanded": wide[:1, 0].expand(6), "fp64": wide[:, 0].double()}[how]
    three = [[one] * 3 for one in (1, 0, 1, 0)]
    arguments = x, weight, bias, three[0], three[1], three[2], False, three[3], 1
    torch.testing.assert_close(halves.convolution(*arguments), torch.ops.aten.convolution.default(*arguments))

"""Operators that decoders use, on every grid and odd sizes: they are exact, and known ones run replicated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plane.ranks import GRIDS, assert_close, assert_exact, check, numbers, on_ranks, run
from torch import Tensor

from halovae import Grid
from halovae.plane import Plane, PlaneTensor

SIZES = ((7, 6), (5, 9))
Function = Callable[[Tensor], Any]


def weights(*shape: int, seed: int = 1) -> Tensor:
    return numbers(*shape, seed=seed)


def conv(kernel: tuple[int, int], stride: Any, padding: Any, dilation: int = 1, groups: int = 1) -> Function:
    weight, bias = weights(4, 4 // groups, *kernel), weights(4)
    return lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def transposed(kernel: int, stride: int, padding: int, extra: int, dilation: int = 1) -> Function:
    weight, bias = weights(4, 4, kernel, kernel), weights(4)
    return lambda x: F.conv_transpose2d(x, weight, bias, stride, padding, extra, 1, dilation)


W = weights(4, 4)
GAIN, SHIFT = weights(4, seed=2), weights(4, seed=3)
UNPADDED = conv((3, 3), 2, 0)
ONES = torch.ones(4, 4, 3, 3, dtype=torch.float64)


def attention(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = F.linear(tokens, W), F.linear(tokens, W.T), tokens
    found = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return found.transpose(1, 2).reshape(b, c, h, w)


def attention_by_products(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = x.reshape(b, c, h * w)
    scores = torch.softmax(torch.bmm(tokens.transpose(1, 2), tokens) * 0.1, -1)
    return torch.bmm(tokens, scores.transpose(1, 2)).view(b, c, h, w)


def linear_attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    return torch.matmul(torch.matmul(tokens, F.relu(tokens).transpose(-1, -2)), tokens).view(x.shape)


def masked_attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    place = torch.arange(tokens.shape[1])
    mask = (place[:, None] - place[None]).abs() < 7
    return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)


def in_place_on_views(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1] += 1
    y[:, :, 1:] *= 3
    y.add_(x)
    first = y[:, :2]
    first.mul_(2)
    y[..., 1:, 1:].clamp_(-1, 1)
    y.flatten(2)[:, 0].sub_(0.5)
    return y


def buffer(x: Tensor) -> Tensor:
    x = F.conv2d(x, ONES, padding=1)
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :2] = x[:, :2]
    out[:, 2:] = x[:, 2:] * 2
    return F.conv2d(out, ONES, padding=1)


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(3, dim=3) * 1.0


def unshuffled(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2], 2)


def with_noise(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return x + torch.randn_like(x)


def outer(x: Tensor) -> Tensor:
    return x.mean(3)[:, :, :, None] * x.mean(2)[:, :, None, :]


def haar(x: Tensor) -> Tensor:
    weight = torch.tensor([[[[1.0, 1.0]]], [[[1.0, -1.0]]]], dtype=x.dtype).repeat(4, 1, 1, 1)
    return F.conv2d(F.pad(x, (0, x.shape[-1] % 2, 0, 0), mode="replicate"), weight, stride=(1, 2), groups=4)


LOCAL: dict[str, Function] = {
    "conv_3": conv((3, 3), 1, 1),
    "conv_5x7_stride_3x2": conv((5, 7), (3, 2), (2, 1)),
    "conv_dilation_4": conv((3, 3), 1, 4, 4),
    "conv_stride_2": conv((3, 3), 2, 1),
    "conv_after_one_sided_pad": lambda x: UNPADDED(F.pad(x, (0, 1, 0, 1))),
    "conv_groups": conv((3, 3), 1, 1, 1, 2),
    "conv_without_padding": conv((3, 3), 1, 0),
    "conv_same": conv((4, 3), 1, "same"),
    "conv_2_stride_2": conv((2, 2), 2, 0),
    "conv_1x1_stride_2": conv((1, 1), 2, 0),
    "conv_transpose_4_stride_2": transposed(4, 2, 1, 0),
    "conv_transpose_3_stride_2_output_padding": transposed(3, 2, 1, 1),
    "conv_transpose_2_stride_2": transposed(2, 2, 0, 0),
    "conv_transpose_stride_3_dilation": transposed(3, 3, 2, 2, 2),
    "conv_transpose_gaps": transposed(1, 3, 1, 1),
    "pad_circular": lambda x: F.pad(x, (2, 1, 1, 2), mode="circular"),
    "pad_reflect": lambda x: F.pad(x, (2, 1, 1, 2), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (2, 1, 1, 2), mode="replicate"),
    "pad_negative": lambda x: F.pad(x, (-1, 1, 0, -2)),
    "pad_value": lambda x: F.pad(x, (3, 0, 0, 4, 1, 1), value=2.0),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear_corners": lambda x: F.interpolate(x, size=(9, 17), mode="bilinear", align_corners=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_uneven": lambda x: F.interpolate(x, size=(9, 17)),
    "nearest_exact": lambda x: F.interpolate(x, size=(9, 17), mode="nearest-exact"),
    "bicubic": lambda x: F.interpolate(x, size=(9, 17), mode="bicubic"),
    "group_norm": lambda x: F.group_norm(x, 2, GAIN, SHIFT),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "normalize": lambda x: F.normalize(x, dim=1),
    "attention": attention,
    "attention_by_products": attention_by_products,
    "linear_attention": linear_attention,
    "masked_attention": masked_attention,
    "in_place_on_views": in_place_on_views,
    "buffer": buffer,
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "std": lambda x: x / x.std(),
    "norm": lambda x: x / x.norm(),
    "amax": lambda x: x - x.amax((-1), keepdim=True),
    "pixel_shuffle": lambda x: F.pixel_shuffle(F.conv2d(x, torch.ones(8, 4, 1, 1, dtype=x.dtype)), 2),
    "pixel_unshuffle": unshuffled,
    "avg_pool_2": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_3_stride_2": lambda x: F.avg_pool2d(x, 3, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "flip": lambda x: x.flip(2, 3),
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "cat_channels": lambda x: torch.cat([x, x * 2], 1),
    "cat_rows": lambda x: torch.cat([x, x[:, :, :1], x * 2], 2),
    "slice_step": lambda x: x[:, :, 1:-1, ::2] * 1,
    "select": lambda x: x[:, :, 2] * 2,
    "chunk": lambda x: torch.cat(x.chunk(2, 3)[::-1], 3),
    "repeat": lambda x: x.repeat(1, 2, 2, 1) * 1.0,
    "repeat_interleave": repeated,
    "stack": lambda x: torch.stack([x, x], 2).flatten(1, 2),
    "einsum": lambda x: torch.einsum("bchw,cd->bdhw", x, W),
    "masked_fill": lambda x: x.masked_fill(torch.arange(x.shape[-1]) > 2, 0.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "cumsum": lambda x: x.cumsum(2),
    "sort": lambda x: x.sort(-1)[0],
    "argmax": lambda x: x.argmax(1),
    "topk": lambda x: x.topk(2, 1)[0],
    "outer": outer,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "item": lambda x: x * float(x.sum()),
    "noise": with_noise,
    "haar": haar,
    "frames_to_batch": lambda x: F.conv2d(x.unsqueeze(1).expand(-1, 3, -1, -1, -1).flatten(0, 1), ONES, padding=1),
    "linear_of_a_vector": lambda x: F.linear(x.mean((0, 2, 3)), W),
}
REPLICATED: dict[str, Function] = {
    "im2col": lambda x: F.unfold(x, 3, padding=1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "tril": lambda x: x.tril(),
    "fft": lambda x: torch.fft.fft2(x).real,
    "index": lambda x: x[:, [2, 0]],
    "index_rows": lambda x: x[:, :, [2, 0]],
    "gather": lambda x: x.gather(2, torch.zeros(1, 4, 2, x.shape[3], dtype=torch.long)),
    "unfold": lambda x: x.unfold(2, 2, 1) * 1,
}


@pytest.mark.parametrize("name", LOCAL)
def test_it_is_exact_and_never_replicated(name: str) -> None:
    for grid in GRIDS:
        for size in SIZES:
            outcomes = check(LOCAL[name], numbers(1, 4, *size), grid)
            assert all(not outcome.fallbacks for outcome in outcomes)


@pytest.mark.parametrize("name", REPLICATED)
def test_it_is_exact_whatever_has_no_rule(name: str) -> None:
    for grid in GRIDS:
        for size in SIZES:
            check(REPLICATED[name], numbers(1, 4, *size), grid)


@pytest.mark.parametrize("grid", ["4x1", "3x1", "2x2", "4x2"])
@pytest.mark.parametrize("size", [(2, 3), (1, 1)])
def test_latents_smaller_than_the_grid_are_partitioned_once_they_are_large_enough(
    grid: str, size: tuple[int, int]
) -> None:
    conv, up = LOCAL["conv_3"], LOCAL["nearest"]

    def decode(x: Tensor) -> Tensor:
        for _ in range(3):
            x = conv(up(F.silu(F.group_norm(x, 2, GAIN, SHIFT)))) / 6
        return attention(x)

    outcomes = check(decode, numbers(1, 4, *size), Grid.parse(grid))
    (layout,) = outcomes[0].layouts
    assert layout is not None
    assert {factor.mesh_dim for dim in layout for factor in dim if factor.mesh_dim} == set(outcomes[0].plane.extents)


def resnet(dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Function:
    first, second = ((weights(4, 4, 3, 3, seed=n) / 6).to(dtype, memory_format=memory_format) for n in (5, 6))
    gain, shift = GAIN.to(dtype), SHIFT.to(dtype)

    def block(x: Tensor) -> Tensor:
        y = F.conv2d(F.silu(F.group_norm(x, 2, gain, shift)), first, padding=1)
        y = F.conv2d(F.silu(F.group_norm(y, 2, gain, shift)), second, padding=1)
        return F.conv2d(F.interpolate(x + y, scale_factor=2), first, padding=1)

    return block


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_low_precision_is_as_close_to_the_truth_as_plain(grid: Grid, dtype: torch.dtype, bound: float) -> None:
    x = numbers(1, 4, 7, 5) + 5
    outcomes = run(resnet(dtype), x.to(dtype), grid)
    assert_exact(outcomes, resnet(dtype)(x.to(dtype)), bound)
    assert_close(outcomes[0].results[0].double(), resnet(torch.float64)(x), bound)


@pytest.mark.parametrize("name", ["mean", "sum", "var", "std"])
def test_sums_of_half_numbers_are_added_in_fp32(name: str) -> None:
    x = numbers(1, 4, 40, 30).to(torch.bfloat16) + 20
    outcomes = run(lambda x: getattr(x, name)(), x, Grid(rows=2, cols=2))
    assert_close(outcomes[0].results[0].double(), getattr(x.double(), name)(), 0.01)


@pytest.mark.parametrize("of", ["input", "weights", "both"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_channels_last_is_exact(grid: Grid, of: str) -> None:
    last = torch.channels_last
    x = numbers(2, 4, 7, 5)
    x = x if of == "weights" else x.contiguous(memory_format=last)
    block = resnet(torch.float64, torch.contiguous_format if of == "input" else last)

    def work(x: Tensor) -> Tensor:
        return attention_by_views(block(x))

    assert_exact(run(work, x, grid), work(x))


def attention_by_views(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
    return (tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)).reshape(b, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["conv_3", "attention", "in_place_on_views", "buffer", "linear_attention", "std"])
def test_inference_mode_is_exact(name: str) -> None:
    function = LOCAL[name]

    def inferred(x: Tensor) -> Any:
        with torch.inference_mode():
            return function(x)

    for grid in GRIDS:
        x = numbers(1, 4, 7, 6)
        assert_exact(run(inferred, x, grid), function(x))


def blended(x: Tensor, rows: bool) -> Tensor:
    """As diffusers blends tiles: row by row, in place."""
    a, b = x * 1, x * 2
    for at in range(3):
        if rows:
            b[:, :, at, :] = a[:, :, -3 + at, :] * (1 - at / 3) + b[:, :, at, :] * (at / 3)
        else:
            b[:, :, :, at] = a[:, :, :, -3 + at] * (1 - at / 3) + b[:, :, :, at] * (at / 3)
    return b


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blending_tiles_is_exact_or_refused(grid: Grid, rows: bool) -> None:
    x = numbers(1, 4, 7, 6)
    outcomes = run(lambda x: blended(x, rows), x, grid)
    errors = [outcome.error for outcome in outcomes]
    if not any(errors):
        assert_exact(outcomes, blended(x, rows))
    else:
        assert all(isinstance(error, RuntimeError) and "cannot write in place" in str(error) for error in errors)


def test_each_rank_has_a_shard_of_a_partitioned_map() -> None:
    def local(plane: Plane) -> Tensor:
        x = plane.scatter(numbers(1, 4, 7, 6))
        assert isinstance(x, PlaneTensor)
        assert x.shape == (1, 4, 7, 6)
        return x.local.clone()

    outcomes = on_ranks(local, Grid(rows=2, cols=2))
    a, b, c, d = (outcome.results[0] for outcome in outcomes)
    assert torch.equal(torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2), numbers(1, 4, 7, 6))


@pytest.mark.parametrize("grid", ["3x2", "2x2", "4x1", "1x3"])
@pytest.mark.parametrize("size", [(4, 3), (5, 4), (3, 3)])
def test_gathered_maps_have_the_same_strides_on_all_ranks(grid: str, size: tuple[int, int]) -> None:
    """Shards of one row or col do not show the memory format, and convolutions of other formats give other bits."""

    def turned(*dims: int) -> Function:
        weight = weights(3, size[dims[1] - 2], 1, 1)
        return lambda x: F.conv2d(x.permute(*dims), weight)

    for channels in (1, 2):
        x = numbers(1, channels, *size)
        for dims in ((0, 3, 1, 2), (0, 2, 3, 1)):
            check(turned(*dims), x, Grid.parse(grid))

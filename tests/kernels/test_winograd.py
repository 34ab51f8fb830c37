"""Winograd's convolution, against PyTorch's in double precision."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from samples import latents, reference, vae
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import halovae
from halovae.kernels import compiler, native, winograd
from halovae.kernels.pool import BufferPool
from halovae.kernels.schemes import PLAIN, UPSAMPLING, Scheme

LAST = torch.channels_last_3d


def convolve(
    scheme: Scheme, window: Tensor, weight: Tensor, bias: Tensor, out: Tensor, compiled: bool = False,
    add: bool = False,
) -> None:  # fmt: skip
    made = native.compiled() if compiled else native.EAGER
    winograd.convolve(scheme, window, weight, bias, out, made, BufferPool(torch.device("cpu")), add=add)


def maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.contiguous(memory_format=LAST)


def weights(outputs: int, channels: int, taps: int) -> tuple[Tensor, Tensor]:
    # Both are always the same: the largest errors below vary by 5 % with the bias.
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(5))
    return maps(outputs, channels, taps, 3, 3, seed=1) / (9 * taps * channels) ** 0.5, bias


def wide(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(window.double(), weight.double(), bias.double())


@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "taps", "frames", "height", "width"),
    [(1, 16, 32, 3, 4, 8, 12), (2, 20, 16, 1, 1, 32, 28), (1, 24, 40, 3, 1, 64, 4), (2, 16, 40, 1, 1, 8, 12)],
)
@pytest.mark.parametrize("rows", [8, 512])
@torch.inference_mode()
def test_it_is_the_same_convolution(
    monkeypatch: pytest.MonkeyPatch,
    batch: int, channels: int, outputs: int, taps: int, frames: int, height: int, width: int, rows: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(winograd, "ROWS", rows)  # few: several row blocks
    monkeypatch.setattr(winograd, "WEIGHTS", 36 * taps * channels * rows // 8)  # few: several blocks of channels
    window, (weight, bias) = (
        maps(batch, channels, frames + taps - 1, height + 2, width + 2),
        weights(outputs, channels, taps),
    )
    wanted = wide(window, weight, bias)
    out = torch.full(wanted.shape, torch.nan).contiguous(memory_format=LAST)
    convolve(PLAIN, window, weight, bias, out)
    assert (out - wanted).abs().max() < 5e-6
    convolve(PLAIN, window, weight, bias, out, add=True)
    assert (out - 2 * wanted).abs().max() < 1e-5


@pytest.mark.parametrize("scheme", [PLAIN, UPSAMPLING])
def test_compiled_kernels_support_blocks_of_channels(scheme: Scheme) -> None:
    for channels, taps in ((512, 3), (640, 3), (1024, 3), (1024, 1), (2048, 3)):
        weight = torch.empty(channels, channels, taps, 3, 3, device="meta")
        assert winograd._Plan.channels_of(scheme, weight) % native.LANES == 0


@torch.inference_mode()
def test_rounding_errors_are_within_a_few_times_those_of_direct_convolution() -> None:
    window, (weight, bias) = maps(1, 96, 6, 34, 34), weights(96, 96, 3)
    wanted = wide(window, weight, bias)
    out = torch.empty(wanted.shape).contiguous(memory_format=LAST)
    convolve(PLAIN, window, weight, bias, out)
    direct = (F.conv3d(window, weight, bias) - wanted).square().mean().sqrt()
    assert (out - wanted).square().mean().sqrt() < 6 * direct


@torch.inference_mode()
def test_upsampling_is_folded_into_the_convolution() -> None:
    window, (weight, bias) = maps(1, 16, 2, 9, 11), weights(24, 16, 1)
    larger = F.interpolate(window[0].double().movedim(1, 0)[..., 1:-1, 1:-1], scale_factor=2, mode="nearest-exact")
    framed = F.interpolate(window[0].double().movedim(1, 0), scale_factor=2, mode="nearest-exact")[..., 1:-1, 1:-1]
    wanted = F.conv2d(framed, weight[:, :, 0].double(), bias.double()).movedim(0, 1).unsqueeze(0)
    assert wanted.shape[-2:] == larger.shape[-2:]
    out = torch.empty(wanted.shape).contiguous(memory_format=LAST)
    convolve(UPSAMPLING, window, weight, bias, out)
    assert (out - wanted).abs().max() < 5e-6


@torch.inference_mode()
def test_the_flops_of_the_operator_are_those_of_its_matrix_multiplications() -> None:
    window, (weight, bias) = maps(1, 16, 4, 18, 34), weights(24, 16, 3)
    out = torch.empty(1, 24, 2, 16, 32).contiguous(memory_format=LAST)
    with FlopCounterMode(display=False) as whole:
        convolve(PLAIN, window, weight, bias, out)
    scratch = torch.empty(winograd._Plan.of(PLAIN, weight, out, 0).scratch)
    with FlopCounterMode(display=False) as inside:  # not through the operator, so that the counter sees its products
        winograd._convolve(
            window[0].movedim(0, -1), weight, bias, out[0].movedim(0, -1), scratch, "plain", False, False, False
        )
    transform = 2 * 36 * 9 * 3 * 16 * 24  # the filter transform
    assert whole.get_total_flops() == inside.get_total_flops() - transform == 2 * 36 * (4 * 8) * 2 * 3 * 16 * 24


def test_half_precision_computes_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "EAGER_HALF_CHANNELS", 16)
    monkeypatch.setattr(winograd, "EAGER_CELLS", 64)
    z = latents("wan2.1", height=12, width=8)
    exact = reference("wan2.1", z)
    model = copy.deepcopy(vae("wan2.1")).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = model.decode(z.bfloat16()).sample.float() - exact
    ours = halovae.load(model).decode(z.bfloat16())
    assert ours is not None
    assert (ours.float() - exact).square().mean() < theirs.square().mean()


@pytest.mark.parametrize(("channels", "outputs"), [(16, 32), (16, 24), (24, 16)])
@torch.inference_mode()
def test_compiled_kernels_do_what_eager_ones_do(channels: int, outputs: int) -> None:
    window, (weight, bias) = maps(1, channels, 6, 18, 34), weights(outputs, channels, 3)
    results = []
    for use_compiled in (False, True):
        out = torch.ones(1, outputs, 4, 16, 32).contiguous(memory_format=LAST)
        convolve(PLAIN, window, weight, bias, out, compiled=use_compiled, add=True)
        results.append(out)
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "mode", "message"),
    [((1, 16, 3, 8), "auto", "expected 5"), ((1, 4, 3, 8, 8), "auto", "4 channels"), ((1, 16, 3, 8, 8), "no", "mode=")],
)
def test_warming_up_refuses_what_cannot_be_decoded(shape: tuple[int, ...], mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halovae.load(vae("wan2.1")).warmup(shape, mode=mode)  # type: ignore[arg-type]


def test_without_a_compiler_warming_up_says_so_and_decodes_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(compiler, "loaded", broken)
    monkeypatch.setattr(native, "_attempted", cache(native._Attempt))
    decoder, z = halovae.load(vae("wan2.1")), latents("wan2.1", frames=2)
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler") as warnings:
        assert decoder.warmup(z.shape) > 0
    assert len(warnings) == 1
    frames = decoder.decode(z)
    assert frames is not None
    assert (frames - reference("wan2.1", z)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan2.1", "wan2.2-5b"])
def test_a_compiled_decode_equals_diffusers(family: str) -> None:
    decoder, z = halovae.load(vae(family)), latents(family, frames=3, height=12, width=10)
    wanted = reference(family, z)
    decoder.warmup(z.shape)
    frames = decoder.decode(z)
    assert frames is not None
    assert (frames - wanted).abs().max() < 1e-4

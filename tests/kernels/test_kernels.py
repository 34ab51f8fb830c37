"""Compiled kernels: their results against those of PyTorch's operators, and how they are compiled and cached."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from samples import latents, reference, vae
from torch import Tensor

import halovae
from halovae import Grid
from halovae.distributed.ranks import Ranks
from halovae.kernels import compiler, native
from halovae.kernels.native import EAGER, Norms, compiled, ready
from halovae.kernels.schemes import SCHEMES
from halovae.plane import sharded
from halovae.runtime import plane_call

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def close(found: Tensor, expected: Tensor) -> None:
    bound = 2e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "frames", "rows", "cols"), [(16, 1, 1, 1), (48, 3, 2, 5), (640, 1, 2, 7), (24, 2, 3, 4)]
)
@torch.inference_mode()
def test_transforms(scheme: str, dtype: torch.dtype, channels: int, frames: int, rows: int, cols: int) -> None:
    how = SCHEMES[scheme]
    inputs = len(how.input_transform[0])
    height, width = ((tiles - 1) * how.step + inputs for tiles in (rows, cols))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(frames, height + 2, width, channels, generator=generator).to(dtype)[:, 1:-1]
    memory = torch.empty(how.products * frames * rows * max(width, how.results * cols) * channels)
    transformed = [torch.full((how.products**2, frames, rows * cols, channels), torch.nan) for _ in range(2)]
    for kernels, out in zip((EAGER, compiled()), transformed, strict=True):
        kernels.input_transform(block, rows, how, memory, out)
    close(transformed[1], transformed[0])

    bias = torch.randn(channels, generator=generator)
    whole = torch.randn(frames, rows * how.results, cols * how.results, 2 * channels, generator=generator).to(dtype)
    for add in (False, True):
        outs = [whole.clone() for _ in range(2)]
        for kernels, out in zip((EAGER, compiled()), outs, strict=True):
            block = out[..., channels:]  # of the channels
            kernels.output_transform(transformed[0], rows, how, memory, bias, block, add)
            assert torch.equal(out[..., :channels], whole[..., :channels])
        if dtype == torch.float32:
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-4)
        else:
            close(outs[1], outs[0])


def norms() -> Norms:
    found = compiled().norms
    assert found is not None
    return found


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 32), (1, 5, 7, 16), (2, 4, 1, 48), (1, 40, 30, 32)])
@pytest.mark.parametrize("silu", [False, True])
@torch.inference_mode()
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], silu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=generator)).to(dtype)
    x.view(-1, shape[-1])[0] = 0
    x.view(-1)[-3:] = torch.tensor([60.0, -60.0, -6e4]).to(dtype)  # SiLU of the last one underflows
    factors, terms = torch.randn(2, shape[0], shape[-1], generator=generator)
    framed = torch.zeros(*shape[:-3], shape[-3] + 2, shape[-2] + 2, shape[-1], dtype=dtype)
    inner = framed[..., 1:-1, 1:-1, :]
    assert norms().takes(x)
    assert norms().takes(inner)
    wide = x.double()
    expected = wide / (wide.square().sum(-1, keepdim=True) + 1e-3).clamp_min(1e-6).sqrt() * factors[0]
    norms().normalize(x, factors[0], 1e-3, 1e-6, silu, inner)
    close(inner, (F.silu(expected) if silu else expected).to(dtype))
    per_item = (len(x), *[1] * (x.ndim - 2), -1)
    expected = wide * factors.view(per_item) + terms.view(per_item)
    norms().scale_and_shift(x, factors, terms, silu, inner)
    close(inner, (F.silu(expected) if silu else expected).to(dtype))
    norms().scale_and_shift(x, factors, terms, silu, x)
    assert torch.equal(x, inner)
    assert framed[..., 0, :].count_nonzero() == framed[..., -1, :].count_nonzero() == 0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cells", [(1, 1), (7, 9), (8, 8), (40, 50)])
@pytest.mark.parametrize("far", [0.0, 100.0])
@torch.inference_mode()
def test_moments(dtype: torch.dtype, cells: tuple[int, int], far: float) -> None:
    x = torch.randn(2, *cells, 48, generator=torch.Generator().manual_seed(0)).add_(far).to(dtype)
    variance, mean = norms().moments(x)
    expected = torch.var_mean(x.double(), (1, 2), correction=0)
    torch.testing.assert_close(mean.double(), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_moments_do_not_depend_on_the_default_dtype(default: torch.dtype, request: pytest.FixtureRequest) -> None:
    x = torch.randn(2, 9, 9, 64)
    expected = norms().moments(x)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(default)
    with torch.device("meta"):
        found = norms().moments(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_nan_and_infinity_propagate(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 1, 16, dtype=dtype)
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    one, zero = torch.ones(1, 16), torch.zeros(1, 16)
    out = torch.empty_like(x)
    norms().scale_and_shift(x, one, zero, False, out)
    assert torch.equal(out.view(-1)[1:], x.view(-1)[1:])
    assert out.view(-1)[0].isnan()
    norms().scale_and_shift(x, one, zero, True, out)
    assert out.view(-1)[0].isnan()
    assert out.view(-1)[1] == torch.inf
    assert out.view(-1)[2].isnan()  # as PyTorch's SiLU
    norms().normalize(x, one[0], 0.0, 0.0, False, out)
    assert out.isnan().all()
    last = torch.full((1, 16), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up it would be -0
    norms().scale_and_shift(torch.ones_like(x), last, zero, False, out)
    assert out.isnan().all()
    assert norms().moments(x)[:, 0, :1].isnan().all()


def test_which_maps_norms_take() -> None:
    x = torch.randn(1, 4, 4, 32)
    assert norms().takes(x)
    for other in (x.double(), x[..., :24], x[..., :16], x[..., ::2, :], x.transpose(-1, -2), x.to("meta")):
        assert not norms().takes(other)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has not tried to compile."""
    monkeypatch.setenv("HALOVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_attempted", cache(native._Attempt))
    return tmp_path / "cache"


def kernels_of(folder: Path) -> list[Path]:
    """Return the libraries in a cache folder."""
    return list(folder.glob("kernels-*.so"))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_library_is_kept(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.loaded()
    (path,) = kernels_of(built)
    before = path.stat().st_mtime_ns
    compiler.loaded()
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(compiler, "_FLAGS", tuple(flag for flag in compiler._FLAGS if flag != "-O3"))
    compiler.loaded()
    assert len(kernels_of(built)) == 2  # compiled with other flags


def test_a_broken_library_is_replaced(built: Path) -> None:
    # In processes of their own: one that has loaded the library would crash once it is broken.
    load = "from halovae.kernels.compiler import loaded; loaded()"
    subprocess.run([sys.executable, "-c", load], check=True)
    (path,) = kernels_of(built)
    size = path.stat().st_size
    path.write_text("no library")
    subprocess.run([sys.executable, "-c", load], check=True)
    assert path.stat().st_size == size


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALOVAE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native._Library(compiler.loaded()).takes(torch.zeros(1, 2, 2, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "false failed"),
        ("no-such-compiler", r"no C\+\+ compiler"),
        (" ", r"no C\+\+ compiler"),
        ("sleep 9", "took"),
    ],
)
def test_compiler_failures_are_reported_once(
    built: Path, command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    monkeypatch.setattr(compiler, "_FLAGS", ())
    monkeypatch.setattr(compiler, "_NATIVE", ((),))
    monkeypatch.setattr(compiler, "_SECONDS", 0.5)
    if command == "sleep 9":
        monkeypatch.setenv("CXX", script(built.parent / "slow", "sleep 9"))
    assert not ready(CPU, wait=True)
    with pytest.warns(RuntimeWarning, match=message):
        native.explain(CPU)
    native.explain(CPU)  # no second warning
    with pytest.raises(OSError, match=message):
        compiled()
    assert not kernels_of(built)


def test_calls_do_not_wait_for_the_compiler(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler prints its macros at once; to compile, it waits for a file."""
    go, log = built.parent / "go", built.parent / "log"
    wait = f'case "$*" in *-dM*) ;; *) echo >>{log}; while [ ! -e {go} ]; do sleep 0.02; done ;; esac; exec g++ "$@"'
    monkeypatch.setenv("CXX", script(built.parent / "compiler", wait))
    try:
        assert not ready(CPU)
        assert not ready(CPU)
    finally:
        go.touch()
    assert ready(CPU, wait=True)
    assert ready(CPU)
    monkeypatch.setattr(native, "_attempted", cache(native._Attempt))  # as another process
    monkeypatch.setattr(native, "_LOOKING", 60)
    assert ready(CPU)
    assert log.read_text() == "\n"


def test_a_process_that_ends_early_leaves_the_library_to_later_ones(built: Path) -> None:
    start = (
        "import torch; from halovae.kernels import native; native._LOOKING = 60; "
        "print(native.ready(torch.device('cpu')))"
    )
    for answer in ("False", "True"):
        done = subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == answer
    assert len(kernels_of(built)) == 1


def test_other_devices_need_no_kernels(built: Path) -> None:
    other = torch.device("meta")
    native.prepare(other)
    assert not ready(other, wait=True)
    native.explain(other)
    assert native._attempted.cache_info().currsize == 0
    assert not built.exists()


def test_the_next_compiler_is_tried_where_one_fails(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert native._Library(compiler.loaded()).takes(torch.zeros(1, 2, 2, 16))
    assert len(kernels_of(built)) == 1


def test_flags_that_a_compiler_does_not_know_are_left_out(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP, and the flag for this machine's instructions."""
    text = 'case "$*" in *native*|*openmp*) echo no >&2; exit 1; esac; exec g++ "$@"'
    monkeypatch.setattr(compiler, "_COMPILERS", (script(built.parent / "compiler", text),))
    assert native._Library(compiler.loaded()).takes(torch.zeros(1, 2, 2, 16))
    (path,) = kernels_of(built)
    assert b"GOMP_parallel" not in path.read_bytes()


def decoded(options: dict[str, Any], having: tuple[int, ...]) -> tuple[bool, Tensor | None, str]:
    """Decode where these ranks have compiled kernels; return whether it used them, the frames, and the grid."""
    z, has = latents("wan2.1", 2, 16, 16), int(os.environ["RANK"]) in having
    decoder = halovae.load(vae("wan2.1"))
    ready = lambda device, wait=False: has  # noqa: E731
    with patch.object(sharded, "ready", ready), patch.object(plane_call, "ready", ready):
        frames = decoder.decode(z, gather="all", **options)
    assert decoder.report is not None
    return decoder.report.compiled, frames, str(decoder.report.grid)


@pytest.mark.parametrize("having", [(1,), (0, 1)])
@pytest.mark.parametrize("options", [{}, {"grid": Grid(rows=2)}, {"grid": Grid()}], ids=str)
def test_ranks_use_compiled_kernels_where_all_have_them(
    options: dict[str, Any], having: tuple[int, ...], ranks: Callable[[int], Ranks]
) -> None:
    wanted = reference("wan2.1", latents("wan2.1", 2, 16, 16))
    for used, frames, grid in ranks(2).run(decoded, options, having):
        assert used is (len(having) == 2)
        assert grid == str(options.get("grid", grid))
        assert frames is not None
        assert (frames - wanted).abs().max() < 1e-4


def test_a_decoder_turns_to_compiled_kernels_once_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode that began before keeps its eager kernels; there are plans for both kinds of kernels."""
    has = False
    for module in (sharded, plane_call):
        monkeypatch.setattr(module, "ready", lambda device, wait=False: has)
    decoder, z = halovae.load(vae("wan2.1")), latents("wan2.1", 3, 8, 8)
    wanted, used = reference("wan2.1", z), []
    original = sharded.Sharded._chunks

    def watched(self: Any, *arguments: Any) -> Any:
        used.append(arguments[-1])
        return original(self, *arguments)

    monkeypatch.setattr(sharded.Sharded, "_chunks", watched)
    for options in ({"grid": Grid()}, {"memory_budget": 2**30}):
        has = False
        early = decoder.stream(z, **options)
        first = next(early)
        has = True
        late = decoder.decode(z, **options)
        frames = torch.cat([chunk for chunk in (first, *early) if chunk is not None], 2)
        for found in (frames, late):
            assert found is not None
            assert (found - wanted).abs().max() < 1e-4
        assert not early.report.compiled
    assert used == [False, True] * 2


def test_loading_begins_to_compile(built: Path) -> None:
    halovae.load(vae("wan2.1"))
    assert kernels_of(built) == []
    assert native._attempted.cache_info().currsize == 1
    assert ready(CPU, wait=True)
    assert len(kernels_of(built)) == 1


def test_one_process_compiles_for_all(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later processes wait, then load the library; the remains of a killed process are removed."""
    log = built.parent / "log"
    monkeypatch.setenv(
        "CXX", script(built.parent / "compiler", f'case "$*" in *-dM*) ;; *) echo >>{log} ;; esac; exec g++ "$@"')
    )
    (built / "kernels-abc.tmp").mkdir(parents=True)
    load = "from halovae.kernels.native import compiled; compiled()"
    running = [subprocess.Popen([sys.executable, "-c", load]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert log.read_text() == "\n"
    assert len(kernels_of(built)) == 1
    assert not list(built.glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_during_an_attempt_makes_its_own(built: Path) -> None:
    script_text = (
        "import os, torch; from halovae.kernels import native; cpu = torch.device('cpu'); native.prepare(cpu); "
        "child = os.fork(); done = native.ready(cpu, wait=True); "
        "print(done, end=' ', flush=True) if child else os._exit(not done); "
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script_text], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0"]

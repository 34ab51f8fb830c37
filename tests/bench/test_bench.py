"""`halovae bench` and `halovae validate`, their figures, and what they do when memory runs out."""

import gzip
import json
import os
import resource
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import latents, reference, vae
from typer.testing import CliRunner, Result

from halovae import Grid
from halovae.bench import validate as validation
from halovae.bench.compare import compare, seam_mask
from halovae.bench.measure import Contestant, Model
from halovae.bench.report import Row, conclusions
from halovae.bench.run import subject_of
from halovae.cli.main import app
from halovae.cli.measuring import check_ranks
from halovae.device.kinds import Device
from halovae.distributed.ranks import Ranks
from halovae.errors import RankError
from halovae.models.load import read_class
from halovae.pipelines.tiny import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan2.1 VAE."""
    path = tmp_path_factory.mktemp("wan")
    vae("wan2.1").save_pretrained(path)
    return path


def halovae(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_bench_writes_a_table_json_and_plots_and_keeps_files_of_earlier_runs(folder: Path, tmp_path: Path) -> None:
    command = ("bench", "--model", folder, "--size", "48x64", "--frames", 9, "--repeat", 2, "-o", tmp_path)
    done = halovae(*command, "--modes", "single,parallel,tiled,auto", "--num-gpus", "1,2", "--simulate-ranks", "4")
    assert done.exit_code == 0, done.output
    assert "decoding time (s)" in done.output
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["mode"], row["ranks"]): row for row in results["rows"]}
    assert set(rows) == {("single", 1), ("parallel", 2), ("tiled", 1), ("auto", 2), ("simulated", 4)}
    for (mode, _), row in rows.items():
        assert row["seconds"] > 0
        if mode != "simulated":
            assert row["decodes"] == 2
            assert row["fastest"] <= row["seconds"] <= row["slowest"]
            assert row["peak_reserved"] > row["peak_allocated"] > 0
            assert row["remaining"] > 0
    assert rows["parallel", 2]["peak_allocated"] <= 0.6 * rows["single", 1]["peak_allocated"]
    assert rows["simulated", 4]["peak_allocated"] < rows["parallel", 2]["peak_allocated"]
    assert any(
        "parallel, 2 ranks (2x1) against single: decoding latency" in conclusion
        for conclusion in results["conclusions"]
    )
    assert results["torch"] == torch.__version__
    assert not results["random_weights"]
    for name in ("results-time.png", "results-memory.png"):
        assert (tmp_path / name).stat().st_size > 1000
    before = (tmp_path / "results.json").read_bytes()
    again = halovae(*command, "--modes", "single", "--num-gpus", "1", "--batch", "1,2", "--profile")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "results.json").read_bytes() == before
    assert [row["batch"] for row in json.loads((tmp_path / "results-2.json").read_text())["rows"]] == [1, 2]
    profile = (tmp_path / "results-profile" / "profile.md").read_text()
    assert "| decoder.up_blocks." in profile
    assert "| other | " in profile
    assert "of a matrix multiplication's" in again.output
    with gzip.open(tmp_path / "results-profile" / "trace-single-1.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "halovae/decoder.up_blocks.3.resnets.0.conv1" in names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "50x64"), "size 50x64: wan2.1 makes multiples of 8, such as 48x64"),
        (("--frames", "8"), "8 frames: wan2.1 makes 1 + a multiple of 4: 5 or 9"),
        (("--modes", "single,fast"), "expected some of single,parallel,tiled,auto"),
        (("--num-gpus", "0,2"), "--num-gpus 0,2: expected numbers >= 1"),
        (("--num-gpus", "1"), "mode parallel needs a number above 1"),
        (("--device", "xpu"), "device 'xpu' is not here; there is cpu"),
        (("--size", "16x16", "--num-gpus", "3"), "only 2 latent rows"),
        (("--model", "no/such/model"), "no/such/model"),
    ],
)
def test_bench_refuses_bad_input_before_it_measures(
    folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    base = ("bench", "--model", folder, "--size", "48x64", "--frames", 9, "-o", tmp_path)
    done = halovae(*base, "--modes", "single,parallel", "--num-gpus", "1,2", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def kill_soon() -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_a_mode_that_runs_out_of_memory_reports_reserved_bytes(folder: Path) -> None:
    model = Model(folder, "AutoencoderKLWan", torch.float32, "cpu")
    contestant = Contestant("single", model, 1, 1)
    contestant.warm_up(latents("wan2.1"))
    contestant.processes.run(limit_memory)
    contestant.decode(latents("wan2.1", frames=3, height=64, width=64))
    assert contestant.out_of_memory is not None
    assert contestant.out_of_memory > 64 * 2**20
    contestant.decode(latents("wan2.1"))
    assert contestant.taken == []


def test_a_rank_that_the_system_kills_counts_as_out_of_memory(folder: Path) -> None:
    contestant = Contestant("parallel", Model(folder, "AutoencoderKLWan", torch.float32, "cpu"), 2, 1)
    contestant.processes.run(kill_soon)
    contestant.decode(latents("wan2.1", frames=400))
    assert contestant.out_of_memory == 0


def lose_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("connection reset by peer")


def test_a_killed_rank_is_the_cause_even_if_another_rank_fails_first() -> None:
    with Ranks(2) as ranks:
        ranks.run(os.getpid)  # both have started
        with pytest.raises(RankError, match="rank 0 failed") as raised:
            ranks.run(lose_rank_1)
    assert raised.value.killed


@pytest.mark.parametrize("family", ["wan2.2-5b", "qwen-image"])
def test_diffusers_decodes_without_its_encoder(family: str, tmp_path: Path) -> None:
    vae(family).save_pretrained(tmp_path)
    theirs = Model(tmp_path, read_class(tmp_path), torch.float32, "cpu")
    with closing(Contestant("tiled", theirs, 1, 1, kind="tiled")) as contestant:
        contestant.decode(latents(family, frames=1), keep=True)
    assert contestant.frames is not None
    assert torch.allclose(contestant.frames, reference(family, latents(family, frames=1)), atol=1e-4)


def test_encodes_are_measured_as_decodes_are(tmp_path: Path) -> None:
    vae("wan2.1").save_pretrained(tmp_path)
    model = Model(tmp_path, "AutoencoderKLWan", torch.float32, "cpu", call="encode")
    clip = torch.rand(1, 3, 5, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = Contestant("diffusers", model, 1, 1, kind="diffusers", channels_last=True)
    ours = Contestant("halovae", model, 2, 1, options={"mode": "parallel"})
    for one in (theirs, ours):
        with closing(one):
            one.warm_up(clip)
            one.decode(clip, keep=True)
    assert ours.frames is not None
    with torch.inference_mode():
        expected = vae("wan2.1").encode(clip).latent_dist.parameters
    torch.testing.assert_close(theirs.frames, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.frames, expected, atol=1e-4, rtol=0)
    assert min(one.memory("peak_reserved") for one in (theirs, ours)) > 0


def test_rows_that_ran_out_of_memory_are_in_the_table_and_the_conclusions() -> None:
    case: dict[str, Any] = {"size": "64x48", "frames": 9, "batch": 1}
    memory: dict[str, Any] = {"peak_reserved": 4e9, "peak_allocated": 3e9, "pool_overhead": 1e9, "remaining": 4e9}
    single = Row("single", 1, "1x1", **case, seconds=10.0, decodes=1, **memory)
    tiled = Row("tiled", 1, "", **case, out_of_memory=int(7e9))
    halved = {name: size / 2 for name, size in memory.items()}
    parallel = Row("parallel", 2, "2x1", **case, seconds=7.1, decodes=1, **halved)
    assert tiled.cells() == ["tiled", "OOM", "7.00", "-", "-", "-"]
    sentences = conclusions([single, tiled, parallel])
    assert sentences[0] == "64x48, 9 frames, batch 1: tiled ran out of memory"
    assert "decoding latency -29 %, peak memory -50 %" in sentences[1]
    assert "memory left at the peak -50 %" in sentences[1]


def test_validate_reports_on_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    options = ("--model-path", folder, "--size", "64x48", "-o", tmp_path, "--heatmap")
    done = halovae("validate", *options, "--num-gpus", 2)
    assert done.exit_code == 0, done.output
    assert "1 of 1 supported" in done.output
    report = json.loads((tmp_path / "validation-cpu.json").read_text())
    single, parallel = report["models"][0]["modes"]
    assert (single["name"], parallel["name"], parallel["grid"]) == ("single", "parallel", "2x1")
    for mode in (single, parallel):
        difference = mode["difference"]
        assert 0 < difference["max_error"] == max(difference["seam_error"], difference["interior_error"]) <= 1e-4
        assert difference["psnr"] > 90
        assert difference["ssim"] > 0.9999
        assert mode["taken"]["memory"]["peak_allocated"] > 0
    assert parallel["difference"]["seam_error"] > 0
    assert "| single 1x1 | yes |" in (tmp_path / "validation-cpu.md").read_text()
    assert len(list(tmp_path.glob("difference-*.png"))) == 2
    again = halovae("validate", *options, "--simulate-ranks", 6, "--dtype", "bf16")
    assert again.exit_code == 0, again.output
    simulated = json.loads((tmp_path / "validation-cpu-2.json").read_text())["models"][0]["modes"][1]
    assert (simulated["name"], simulated["grid"], simulated["taken"]) == ("simulated", "6x1", None)


def test_validate_exits_with_1_if_a_model_is_not_supported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model-path", folder, "--size", "32x16", "--simulate-ranks", 2, "-o", tmp_path)
    monkeypatch.setattr(validation, "FP32_BOUND", 1e-9)
    done = halovae("validate", *options)
    assert done.exit_code == 1
    assert f"0 of 1 supported; short: {folder.name}" in done.output
    too_many = halovae("validate", *options[:-3], 3, *options[-2:])
    assert too_many.exit_code == 1
    assert "only 2 latent rows" in json.loads((tmp_path / "validation-cpu-2.json").read_text())["models"][0]["problem"]


@pytest.mark.slow
def test_validate_runs_a_whole_pipeline(tmp_path: Path) -> None:
    make_model("wan2.1", tmp_path / "pipeline")
    done = halovae(
        "validate", "--model-path", tmp_path / "pipeline", "--size", "32x32", "--frames", 5, "--prompt", "a cat",
        "--steps", 2, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    pipeline = json.loads((tmp_path / "out" / "validation-cpu.json").read_text())["models"][0]["pipeline"]
    assert pipeline["max_error"] <= pipeline["bound"]
    assert "the whole pipeline: frames differ" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "Wan3"), "--models Wan3: expected some of Wan2.1,Wan2.2-A14B"),
        (("--prompt", "a cat"), "--prompt needs --model-path"),
        (("--device", "cuda"), "device 'cuda' is not here"),
    ],
)
def test_validate_refuses_bad_input(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = halovae("validate", "-o", tmp_path, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_seams_lie_around_the_borders_between_ranks() -> None:
    seams = seam_mask(Grid(rows=3, cols=2), 7 * 8, 4 * 8, 8)  # 7 rows of cells: 3 2 2
    rows = [row for row in range(56) if seams[row].all()]
    cols = [col for col in range(32) if seams[:, col].all()]
    assert rows == [*range(16, 32), *range(32, 48)]
    assert cols == [*range(8, 24)]
    assert not seam_mask(Grid(), 16, 16, 8).any()


def test_differences_at_seams_and_elsewhere_are_separate() -> None:
    torch.manual_seed(0)
    reference = torch.rand(1, 3, 2, 32, 16) * 2 - 1
    frames = reference.clone()
    frames[0, 0, 0, 15, 3] += 0.25  # beside the border at row 16
    frames[0, 0, 0, 2, 3] -= 0.125
    found = compare(frames, reference, Grid(rows=2), 8)
    assert (round(found.seam_error, 6), round(found.interior_error, 6)) == (0.25, 0.125)
    assert found.max_error == found.seam_error
    assert found.rms_error == pytest.approx(((0.25**2 + 0.125**2) / reference.numel()) ** 0.5, rel=1e-4)
    assert found.psnr == pytest.approx(10 * torch.tensor(4 / found.rms_error**2).log10().item(), rel=1e-4)
    assert compare(reference, reference, Grid(), 8).psnr is None


def test_latents_have_the_requested_size(folder: Path) -> None:
    assert subject_of(folder, (1280, 720), 81, 2).latents.shape == (2, 16, 21, 90, 160)


def test_more_ranks_than_cores_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_ranks("--num-gpus", 999, "cpu").kind == "cpu"
    assert "999 ranks share" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "memory", lambda self: (1000, 2000))
    done = halovae("bench", "--model", folder, "--size", "48x64", "--frames", 9, "-o", tmp_path)
    assert done.exit_code == 2
    assert "do not fit into the 0.0 GB that are free" in " ".join(done.output.split())

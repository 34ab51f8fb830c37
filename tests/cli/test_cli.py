"""The commands as users type them: one rank in this process, several in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import latents, reference, vae
from typer.testing import CliRunner, Result

from halovae.cli import calibrate, common
from halovae.cli.main import app
from halovae.io import latents as latents_file
from halovae.io import media
from halovae.models.load import WEIGHTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `wan` and `qwen`, and latents: raw and scaled video, an image, a batch, NaN."""
    root = tmp_path_factory.mktemp("models")
    vae("wan2.1").save_pretrained(root / "wan")
    vae("qwen-image").save_pretrained(root / "qwen")
    z = latents("wan2.1", frames=2, height=4, width=6)
    latents_file.save(root / "video.safetensors", z, "wan2.1", scaled=False, fps=12)
    latents_file.save(root / "scaled.safetensors", z, "wan2.1", scaled=True, fps=12)
    latents_file.save(root / "image.safetensors", z[:, :, :1], "wan2.1", scaled=False, fps=1)
    latents_file.save(root / "batch.safetensors", torch.cat([z, -z]), "wan2.1", scaled=False, fps=12)
    return root


def halovae(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def decode(folder: Path, name: str, output: Path, *options: object) -> Result:
    return halovae("decode", folder / f"{name}.safetensors", "--model", folder / "wan", "-o", output, *options)


def shell(*words: object, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m"]
    if ranks is not None:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, "halovae.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def as_pictures(frames: torch.Tensor) -> np.ndarray:
    return ((frames[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_frames_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    done = decode(folder, "video", tmp_path / "frames")
    assert done.exit_code == 0, done.output
    z = latents_file.read(folder / "video.safetensors")
    found, wanted = pictures(tmp_path / "frames"), as_pictures(reference("wan2.1", z))
    assert found.shape == (5, 32, 48, 3)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert "5 frames decoded in " in done.output


@pytest.mark.parametrize("grid", ["2x1", "1x2"])
def test_the_command_starts_ranks(folder: Path, tmp_path: Path, grid: str) -> None:
    words = ["decode", folder / "video.safetensors", "--model", folder / "wan", "-o"]
    single = shell(*words, tmp_path / "single")
    done = shell(*words, tmp_path / "frames", "--num-gpus", 2, "--grid", grid)
    assert single.returncode == done.returncode == 0, done.stderr
    assert np.abs(pictures(tmp_path / "frames").astype(int) - pictures(tmp_path / "single")).max() <= 1
    assert f"(grid {grid} of 2 ranks)" in done.stderr


def test_the_world_of_torchrun_is_used(folder: Path, tmp_path: Path) -> None:
    words = [
        "decode",
        folder / "video.safetensors",
        "--model",
        folder / "wan",
        "-o",
        tmp_path / "clip.mp4",
        "--mode",
        "parallel",
    ]
    done = shell(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "(grid 2x1 of 2 ranks)" in done.stderr
    assert media.read_clip(tmp_path / "clip.mp4")[0].shape == (3, 5, 32, 48)
    wrong = shell(*words, "--num-gpus", 3, ranks=2)
    assert wrong.returncode != 0
    assert "torchrun has started 2" in wrong.stderr


def test_a_video_has_the_files_frame_rate_and_is_replaced_by_a_second_run(folder: Path, tmp_path: Path) -> None:
    for options, rate in (([], 12), (["--fps", 24], 24)):
        done = decode(folder, "video", tmp_path / "clip.mp4", *options)
        assert done.exit_code == 0, done.output
        frames, fps = media.read_clip(tmp_path / "clip.mp4")
        assert frames.shape == (3, 5, 32, 48)
        assert fps == rate
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_folder_of_frames_is_replaced_by_a_second_run(folder: Path, tmp_path: Path) -> None:
    assert decode(folder, "video", tmp_path / "frames").exit_code == 0
    assert decode(folder, "image", tmp_path / "frames").exit_code == 0
    assert os.listdir(tmp_path / "frames") == ["frame_00000.png"]


def test_an_image_and_a_batch(folder: Path, tmp_path: Path) -> None:
    assert decode(folder, "image", tmp_path / "picture.png").exit_code == 0
    assert Image.open(tmp_path / "picture.png").size == (48, 32)
    assert decode(folder, "batch", tmp_path / "clip.mp4").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["clip-0.mp4", "clip-1.mp4", "picture.png"]


def test_scaled_latents_are_denormalized_as_the_file_or_the_user_says(folder: Path, tmp_path: Path) -> None:
    for output, name, options in (
        ("by_file", "scaled", []),
        ("by_user", "video", ["--scaled"]),
        ("raw", "scaled", ["--raw"]),
    ):
        assert decode(folder, name, tmp_path / output, *options).exit_code == 0
    by_file, by_user, raw = (pictures(tmp_path / output) for output in ("by_file", "by_user", "raw"))
    assert np.array_equal(by_file, by_user)
    assert not np.array_equal(by_file, raw)


def test_dtype(folder: Path, tmp_path: Path) -> None:
    assert decode(folder, "video", tmp_path / "a", "--dtype", "bf16").exit_code == 0
    assert decode(folder, "video", tmp_path / "b").exit_code == 0
    difference = np.abs(pictures(tmp_path / "a").astype(int) - pictures(tmp_path / "b"))
    assert 0 < difference.max() < 40


@pytest.mark.parametrize(
    ("name", "output", "options", "message"),
    [
        ("video", "clip.avi", [], "expected a name that ends in .mp4 or .png"),
        ("video", "one.png", [], "one .png cannot hold 5 frames"),
        ("video", "nowhere/clip.mp4", [], "there is no folder"),
        ("video", "clip.mp4", ["--grid", "2x1", "--num-gpus", 3], "--grid 2x1 needs 2 ranks, but --num-gpus is 3"),
        ("video", "clip.mp4", ["--grid", "2by1"], "write ROWSxCOLS"),
        ("video", "clip.mp4", ["--num-gpus", 5, "--mode", "parallel"], "at most 4 ranks fit"),
        ("missing", "clip.mp4", [], "cannot be read as safetensors"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, name: str, output: str, options: list[object], message: str
) -> None:
    done = decode(folder, name, tmp_path / output, *options)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
    assert os.listdir(tmp_path) == []


def test_an_unwritable_output_is_found_before_decoding(folder: Path) -> None:
    done = decode(folder, "video", Path("/proc/clip.mp4"))
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_a_folder_of_other_files_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = decode(folder, "video", tmp_path / "mine")
    assert done.exit_code == 2
    assert "notes.txt" in done.output
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_latents_of_another_family_are_refused(folder: Path, tmp_path: Path) -> None:
    words = ("decode", folder / "video.safetensors", "--model", folder / "qwen", "-o", tmp_path / "clip.mp4")
    done = halovae(*words)
    assert done.exit_code == 2
    assert "holds latents of wan2.1" in done.output
    assert "qwen-image model" in done.output.replace("\n", " ")


def test_encode_crops_and_scales_to_what_the_model_takes(folder: Path, tmp_path: Path) -> None:
    sink = media.Sink(tmp_path / "clip.mp4", 10)
    ramp = torch.linspace(0, 255, 42 * 54).view(1, 1, 42, 54).expand(3, 7, 42, 54)
    sink.write(ramp.to(torch.uint8))
    sink.close(whole=True)
    output = tmp_path / "latents.safetensors"
    done = halovae("encode", tmp_path / "clip.mp4", "--model", folder / "wan", "-o", output)
    assert done.exit_code == 0, done.output
    assert "taking 5 frames of 48x40 from 7 of 54x42" in done.output
    header = latents_file.read_header(output)
    assert header.shape == (1, 16, 2, 5, 6)
    assert (header.family, header.scaled, header.fps) == ("wan2.1", False, 10)
    scaled = halovae("encode", tmp_path / "clip.mp4", "--model", folder / "wan", "-o", output, "--size", "32x16")
    assert scaled.exit_code == 0, scaled.output
    assert latents_file.read_header(output).shape == (1, 16, 2, 2, 4)
    wrong = halovae("encode", tmp_path / "clip.mp4", "--model", folder / "wan", "-o", output, "--size", "30x16")
    assert wrong.exit_code == 2
    assert "multiples of 8" in wrong.output
    assert latents_file.read_header(output).shape == (1, 16, 2, 2, 4)


@pytest.mark.parametrize("options", [("--memory-budget", "1GiB"), ("--num-gpus", "2"), ("--grid", "1x2")], ids=" ".join)
def test_encode_gives_what_diffusers_gives(folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    picture, output = tmp_path / "picture.png", tmp_path / "latents.safetensors"
    colors = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(colors).save(picture)
    done = halovae("encode", picture, "--model", folder / "wan", "-o", output, *options)
    assert done.exit_code == 0, done.output
    pictures = torch.from_numpy(colors).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae("wan2.1").encode(pictures).latent_dist.mode()
    torch.testing.assert_close(latents_file.read(output), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_encode_within_too_small_a_budget_is_refused(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    done = halovae(
        "encode", picture, "--model", folder / "wan", "-o", tmp_path / "z.safetensors", "--memory-budget", "9KiB"
    )
    assert done.exit_code == 2
    assert "do not fit into a memory budget" in done.output.replace("\n", " ")
    assert os.listdir(tmp_path) == ["picture.png"]


def test_encode_refuses_files_that_are_not_clips(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("no video")
    done = halovae("encode", tmp_path / "clip.mp4", "--model", folder / "wan", "-o", tmp_path / "z.safetensors")
    assert done.exit_code == 2
    assert "cannot be read as a video or a picture" in done.output.replace("\n", " ")
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_inspect_shows_the_family_and_what_a_decode_needs(folder: Path) -> None:
    done = halovae("inspect", folder / "wan", "--size", "64x48", "--frames", 9, "--grid", "2x1")
    assert done.exit_code == 0, done.output
    facts = "wan2.1", "AutoencoderKLWan, unmodified", "8x in space, 4x in time", "[1, 16, 3, 6, 8]", "grid 2x1"
    for text in (*facts, "TFLOP", "MiB"):
        assert text in done.output
    wrong = halovae("inspect", folder / "wan", "--size", "65x48")
    assert wrong.exit_code == 2
    assert "multiples of 8" in wrong.output


def test_help_and_version() -> None:
    overview = halovae("--help")
    for command in ("decode", "encode", "inspect", "demo"):
        assert command in overview.output
        assert halovae(command, "--help").exit_code == 0
    assert halovae("--version").output.startswith("halovae 0.")


@pytest.mark.parametrize("command", [["demo"], ["bench", "--model", "demo"], ["validate"]])
def test_missing_modules_are_named_before_any_work(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "skimage" else True)
    done = halovae(*command, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "needs pip install 'halovae[diffusers,bench]' (no module skimage)" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_decode_needs_diffusers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "diffusers" else True)
    done = decode(folder, "video", tmp_path / "clip.mp4")
    assert done.exit_code == 2
    assert "decode needs pip install 'halovae[diffusers]' (no module diffusers)" in " ".join(done.output.split())
    assert os.listdir(tmp_path) == []


def test_a_model_without_an_encoder_decodes_and_cannot_encode(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "wan", tmp_path / "wan")
    weights = tmp_path / "wan" / WEIGHTS
    state = {key: one for key, one in load_file(weights).items() if not key.startswith(("encoder.", "quant_conv."))}
    save_file(state, weights)
    model = ("--model", tmp_path / "wan")
    done = halovae("decode", folder / "image.safetensors", *model, "-o", tmp_path / "picture.png")
    assert done.exit_code == 0, done.output
    done = halovae("encode", tmp_path / "picture.png", *model, "-o", tmp_path / "z.safetensors")
    assert done.exit_code == 2, done.output
    assert "has no encoder" in done.output.replace("\n", " ")
    assert not (tmp_path / "z.safetensors").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "Error: no"),
        ({"RANK": "0"}, "Error: no"),
        ({"RANK": "3"}, ""),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "Error: no"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, "Error: rank 8: no"),
        ({"RANK": "9", "LOCAL_RANK": "1"}, ""),
    ],
)
def test_under_torchrun_one_rank_of_each_host_prints_the_error(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(typer.Exit) as ended:
        common.fail("no", 2)
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize("command", ["decode", "generate", "calibrate"])
def test_an_interface_reaches_the_ranks_that_torchrun_started(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
    for variable, value in zip(variables, (" ", "=other", ""), strict=True):
        monkeypatch.setenv(variable, value)
    words = {
        "decode": ["latents", "--model", "none", "-o", "a.mp4"],
        "generate": ["a", "--model-path", "none", "-o", "b"],
    }
    rest = [*words.get(command, []), "--interface"]
    refused = halovae(command, *rest, "lo")
    assert refused.exit_code == 2
    assert "--interface lo: ranks that torchrun has not started are on one host" in refused.stderr
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "wire": []})
    refused = halovae(command, *rest, "wir")
    assert "--interface wir: this host has no such network interface; here: lo, wire" in refused.stderr
    monkeypatch.setattr(calibrate, "check_ranks", Mock(side_effect=ValueError("no")))  # the others miss their files
    assert halovae(command, *rest, "wire").exit_code == 2
    assert [os.environ[variable] for variable in variables] == ["wire", "=other", "wire"]

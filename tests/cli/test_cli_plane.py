"""The command line with models whose sizes are only in their configs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from halovae.cli.main import app
from halovae.grid import Grid
from halovae.io import latents as latents_file
from halovae.models import zoo
from halovae.plane import sharded
from halovae.runtime.simulate import simulate
from halovae.runtime.vae import VAE, load

ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
SHAPES = {"AutoencoderKL": (1, 4, 12, 10), "AutoencoderKLCogVideoX": (1, 4, 5, 6, 5)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Each model's folder, with latents in it, and the frames in [0, 255] that diffusers decodes them to."""
    made = {}
    for name, shape in SHAPES.items():
        folder, module = tmp_path_factory.mktemp(name), zoo.build(ENTRIES[name])
        module.save_pretrained(folder)  # type: ignore[operator]
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        latents_file.save(folder / "z.safetensors", z, name, scaled=False, fps=8.0)
        with torch.no_grad():
            frames = zoo.decode(module, z)
        made[name] = folder, (frames.clamp(-1, 1) + 1) * 127.5
    return made


def halovae(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], terminal_width=200)


@pytest.mark.parametrize("grid", [None, "2x1"])
def test_a_picture(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path, grid: str | None) -> None:
    folder, expected = folders["AutoencoderKL"]
    options = ["--grid", grid] if grid else []
    result = halovae("decode", folder / "z.safetensors", "--model", folder, "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 0, result.output
    found = torch.from_numpy(np.array(Image.open(tmp_path / "out.png"))).permute(2, 0, 1)
    assert (found - expected[0]).abs().max() <= 0.51


def test_a_clip(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, expected = folders["AutoencoderKLCogVideoX"]
    options = ["--grid", "1x2", "--report", tmp_path / "report.json"]
    result = halovae("decode", folder / "z.safetensors", "--model", folder, "-o", tmp_path / "frames", *options)
    assert result.exit_code == 0, result.output
    pictures = sorted((tmp_path / "frames").glob("*.png"))
    assert len(pictures) == expected.shape[2]
    for index, path in enumerate(pictures):
        found = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert (found - expected[0, :, index]).abs().max() <= 0.51
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["family"] == "AutoencoderKLCogVideoX"
    simulation = simulate(load(folder), latents_file.read(folder / "z.safetensors"), Grid(cols=2), dtype=torch.uint8)
    sent = [(one["messages"], one["bytes_sent"]) for one in report["ranks"]]
    assert [(one.messages, one.bytes_sent) for one in simulation.ranks] == sent


def test_scaled_latents_are_divided_by_the_configs_factor(
    folders: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    folder, expected = folders["AutoencoderKL"]
    z = latents_file.read(folder / "z.safetensors") * load(folder).config.scaling_factor
    latents_file.save(tmp_path / "z.safetensors", z, "AutoencoderKL", scaled=True, fps=1.0)
    result = halovae("decode", tmp_path / "z.safetensors", "--model", folder, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    found = torch.from_numpy(np.array(Image.open(tmp_path / "out.png"))).permute(2, 0, 1)
    assert (found - expected[0]).abs().max() <= 0.51


def test_latents_that_are_scaled_by_another_rule_are_refused(tmp_path: Path) -> None:
    entry = ENTRIES["AutoencoderKLMochi"]
    assert entry.latents is not None
    zoo.build(entry).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    latents_file.save(tmp_path / "z.safetensors", torch.zeros(entry.latents), entry.name, scaled=True, fps=1.0)
    result = halovae("decode", tmp_path / "z.safetensors", "--model", tmp_path / "vae", "-o", tmp_path / "out.mp4")
    assert result.exit_code == 2, result.output
    output = " ".join(result.output.split())
    assert "AutoencoderKLMochi is not normalized by a scaling_factor alone" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae", "z.safetensors"]


def test_encode_crops_to_what_the_model_takes(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, _ = folders["AutoencoderKL"]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (43, 50, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    result = halovae("encode", tmp_path / "in.png", "--model", folder, "-o", tmp_path / "z.safetensors")
    assert result.exit_code == 0, result.output
    config: Any = zoo.build(ENTRIES["AutoencoderKL"]).config
    step = 2 ** (len(config.block_out_channels) - 1)
    header = latents_file.read_header(tmp_path / "z.safetensors")
    assert header.shape == (1, 4, 43 // step, 50 // step)
    assert header.family == "AutoencoderKL"


def test_inspect_shows_what_a_rank_needs(folders: dict[str, tuple[Path, Tensor]]) -> None:
    result = halovae("inspect", folders["AutoencoderKL"][0], "--size", "256x256", "--grid", "2x2")
    assert result.exit_code == 0, result.output
    for text in ("AutoencoderKL, unmodified", "none: every operator is partitioned", "messages per rank"):
        assert text in result.output


def test_more_ranks_than_rows_are_refused(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, _ = folders["AutoencoderKL"]
    words = ["decode", folder / "z.safetensors", "--model", folder, "-o", tmp_path / "out.png", "--grid", "13x1"]
    result = halovae(*words)
    assert result.exit_code == 2
    assert "13 ranks along rows, but there are only 12" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_latents_of_another_shape_are_refused(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, _ = folders["AutoencoderKL"]
    latents_file.save(tmp_path / "z.safetensors", torch.zeros(1, 7, 4, 4), "AutoencoderKL", scaled=False, fps=1.0)
    result = halovae("decode", tmp_path / "z.safetensors", "--model", folder, "-o", tmp_path / "out.png")
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert "latents of shape [1, 7, 4, 4]; expected [B, C, H, W] with 4 channels" in output


def test_pictures_with_an_alpha_channel_are_refused(tmp_path: Path) -> None:
    entry = ENTRIES["AutoencoderKLQwenImage21"]
    assert entry.latents is not None
    zoo.build(entry).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    latents_file.save(tmp_path / "z.safetensors", torch.zeros(entry.latents), entry.name, scaled=False, fps=1.0)
    result = halovae("decode", tmp_path / "z.safetensors", "--model", tmp_path / "vae", "-o", tmp_path / "out.png")
    assert result.exit_code == 2
    assert "makes pictures of 4 channels; only 3 (RGB) can be written" in " ".join(result.output.split())


@pytest.mark.slow
def test_any_vae_is_validated_and_measured(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, _ = folders["AutoencoderKLCogVideoX"]
    common = ["--num-gpus", "2", "--size", "48x40", "--frames", "9"]
    result = halovae("validate", "--model-path", folder, *common, "-o", tmp_path / "validation")
    assert result.exit_code == 0, result.output
    assert "1 of 1 supported" in result.output
    simulated = ["--simulate-ranks", "3", "--dtype", "bf16", *common[2:]]
    result = halovae("validate", "--model-path", folder, *simulated, "-o", tmp_path / "s")
    assert result.exit_code == 0, result.output
    bench = ["bench", "--model", folder, *common[2:], "--repeat", "1"]
    result = halovae(*bench, "--num-gpus", "1,2", "-o", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert {"single", "parallel", "tiled", "auto"} <= set(result.output.replace(",", " ").split())


@pytest.mark.slow
def test_a_vae_that_takes_a_timestep_is_validated(tmp_path: Path) -> None:
    zoo.build(ENTRIES["AutoencoderKLLTXVideo (timestep)"]).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    size = ["--num-gpus", "2", "--size", "64x64", "--frames", "9"]
    result = halovae("validate", "--model-path", tmp_path / "vae", *size, "-o", tmp_path / "validation")
    assert result.exit_code == 0, result.output
    assert "1 of 1 supported" in result.output


@pytest.mark.parametrize("name", SHAPES)
def test_simulated_ranks_decode_what_one_process_does(folders: dict[str, tuple[Path, Tensor]], name: str) -> None:
    folder, expected = folders[name]
    z = latents_file.read(folder / "z.safetensors")
    simulation = simulate(load(folder), z, Grid(rows=2, cols=2), dtype=torch.uint8)
    assert (simulation.frames - expected).abs().max() <= 0.51
    assert [one.rank for one in simulation.ranks] == [0, 1, 2, 3]
    assert all(one.computing > 0 and one.peak_allocated > 0 for one in simulation.ranks)
    assert simulation.seconds == pytest.approx(max(one.computing + one.waiting for one in simulation.ranks))


def test_simulated_ranks_share_weights_and_no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.build(ENTRIES["AutoencoderKLWan (2.1)"])
    z = torch.randn(1, 4, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = zoo.decode(module, z)
    kept = next(module.parameters()).data_ptr()
    used = set()

    def hooked(seen: Any) -> Any:  # modules with hooks are not recorded: all ranks call them at once
        used.add(next(seen.parameters()).data_ptr())
        return iter(["decoder"])

    monkeypatch.setattr(sharded, "hooked", hooked)
    simulation = simulate(VAE(module), z, Grid(rows=2))
    assert (simulation.frames - expected).abs().max() <= 1e-4
    assert used == {kept}


def test_bench_simulates_ranks_and_profiles_submodules(folders: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    bench = ["bench", "--model", folders["AutoencoderKL"][0], "--size", "64x48", "--modes", "single", "--num-gpus", "1"]
    options = ["--repeat", "1", "--simulate-ranks", "2", "--profile"]
    result = halovae(*bench, *options, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "results.json").read_text())["rows"][1]
    assert (row["mode"], row["grid"], [one["rank"] for one in row["by_rank"]]) == ("simulated", "2x1", [0, 1])
    assert row["peak_allocated"] == max(one["peak_allocated"] for one in row["by_rank"])
    assert row["seconds"] == pytest.approx(max(one["computing"] + one["waiting"] for one in row["by_rank"]))
    folder = tmp_path / "results-profile"
    assert "| decoder.up_blocks." in (folder / "profile.md").read_text()
    with gzip.open(folder / "trace-single-1.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "halovae/decoder.up_blocks.1.resnets.0.conv1" in names

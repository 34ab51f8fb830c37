"""The demo: its model, its clips, and the run."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from halovae.cli.main import app
from halovae.demo import run as demo_run
from halovae.demo.clips import HELD_OUT, TRAINING, make_clip, photographs
from halovae.io import media
from halovae.models.architectures import DEMO
from halovae.models.load import WEIGHTS, read_config


def test_the_model_is_a_small_wan_of_all_levels() -> None:
    config = read_config(DEMO)
    assert config.family == "wan2.1"
    assert len(config.dim_mult) == 4
    assert config.temporal_factor == 4
    assert config.spatial_factor == 8
    assert (DEMO / WEIGHTS).stat().st_size <= 4_000_000


def test_the_model_was_trained_to_the_quality_that_it_reports() -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(DEMO, torch_dtype=torch.float32)
    clip = make_clip(photographs(HELD_OUT), 17, 128, 160, 10_000_000)[None]
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    psnr = 10 * torch.log10(4 / (decoded - clip).square().mean()).item()
    report = json.loads((DEMO / "training.json").read_text())
    assert psnr == pytest.approx(report["held_out_psnr_db"][0], abs=0.02)


def test_clips_are_seeded_and_held_out_ones_are_over_other_photographs() -> None:
    photos = photographs(TRAINING[:2])
    first, again, other = (make_clip(photos, 5, 32, 40, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 5, 32, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not set(HELD_OUT) & set(TRAINING)


@pytest.mark.slow
def test_the_demo_shows_an_exact_decode_beside_an_inexact_one(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.mp4").write_text("of an earlier run")
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "demo.mp4", "frames.png", "latents.safetensors",
    ]  # fmt: skip
    frames, fps = media.read_clip(tmp_path / "demo" / "demo.mp4")
    assert frames.shape == (3, demo_run.FRAMES, demo_run.HEIGHT, 2 * demo_run.WIDTH)
    assert fps == demo_run.FPS
    assert Image.open(tmp_path / "demo" / "frames.png").width > 1000
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    errors = {row[0]: float(row[3]) for row in rows}
    assert errors["diffusers"] == 0
    assert errors["halovae, 1 rank"] <= 1e-4
    assert errors["halovae, 2 ranks"] <= 1e-4
    assert errors["diffusers, tiled"] > 1e-2

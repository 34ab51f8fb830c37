"""From prompts to files: tiny pipelines on one and two ranks against diffusers' own pipelines."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from halovae.cli.main import app
from halovae.distributed.ranks import Ranks
from halovae.pipelines import tiny
from halovae.pipelines.diffusers import do_without_torchvision
from halovae.pipelines.generator import Generator
from halovae.pipelines.specs import Prompt

SIZE = (80, 48)  # 15 tokens per frame, which two ranks cannot split evenly


def picture(folder: Path) -> Path:
    path = folder / "given.png"
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


def prompt_for(name: str, folder: Path) -> Prompt:
    count = {"wan2.1-i2v": 1, "qwen-image-edit": 1, "qwen-image-edit-plus": 2}.get(name, 0)
    size = (64, 64) if name == "wan2.2-5b" else SIZE
    images = (picture(folder).read_bytes(),) * count
    return Prompt("a cat, playing", size, 9 if name.startswith("wan") else 1, 2, seed=3, images=images)


def generated(source: Path, prompt: Prompt, ulysses: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = Generator(source, torch.float32, torch.float32, ulysses, encode="parallel")
    latents = generator.denoise(generator.kind.fitted(prompt))
    return latents, generator.decoder.decode(latents, denormalize=True)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name not in tiny.FAMILIES])
def test_two_ranks_make_what_diffusers_makes(
    name: str, models: Callable[[str], Path], ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    prompt = prompt_for(name, tmp_path)
    (latents, frames), (other, nothing) = ranks(2).run(generated, models(name), prompt, 2)
    assert nothing is None
    assert torch.equal(latents, other)
    do_without_torchvision()
    pipeline = DiffusionPipeline.from_pretrained(models(name))
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_frames": prompt.frames} if name.startswith("wan") else {}
    if prompt.images:
        opened = [Image.open(io.BytesIO(image)) for image in prompt.images]
        given["image"] = opened if len(opened) > 1 else opened[0]
    assert prompt.size is not None
    (expected,) = pipeline(
        prompt=prompt.text, width=prompt.size[0], height=prompt.size[1], num_inference_steps=prompt.steps, **given,
        generator=torch.Generator().manual_seed(prompt.seed), output_type="pt", return_dict=False,
    )  # fmt: skip
    expected = expected if expected.ndim == 5 else expected.unsqueeze(1)  # [B, T, C, H, W] in 0..1
    assert frames is not None
    assert (frames.movedim(1, 2) / 2 + 0.5 - expected).abs().max() <= 1e-4


def tokens_seen(source: Path, prompt: Prompt, ulysses: int) -> int:
    """Count the picture tokens that this rank passes through the transformer's first block."""
    generator = Generator(source, torch.float32, torch.float32, ulysses)
    seen: list[int] = []
    first = generator.pipeline.transformer.blocks[0].ffn
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    generator.denoise(generator.kind.fitted(prompt))
    return seen[0]


def test_ranks_share_the_sequence(models: Callable[[str], Path], ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    prompt = prompt_for("wan2.1", tmp_path)
    tokens = tokens_seen(models("wan2.1"), prompt, 1)
    assert ranks(2).run(tokens_seen, models("wan2.1"), prompt, 2) == [tokens - tokens // 2, tokens // 2]


def test_the_command_writes_a_video_that_plays(
    models: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    words = ["generate", "a cat", "--model-path", models("wan2.1"), "-o", clip, "--size", "70x50", "--num-frames", 6]
    words += ["--num-inference-steps", 2, "--num-gpus", 2, "--report", report]
    for _ in range(2):  # the second run replaces the first one's output
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        assert "made 64x48, 5 frame(s), 2 steps, seed 0" in capfd.readouterr().err  # from rank 0's process
    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    assert (len(frames), frames[0].width, frames[0].height) == (5, 64, 48)
    assert len(json.loads(report.read_text())["ranks"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "report.json"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("wan2.1", ["--size", "big"], "--size big"),
        ("wan2.1", ["--size", "8x8"], "makes multiples of 16"),
        ("wan2.1", ["--image", "given.png"], "takes no pictures"),
        ("qwen-image", ["--num-frames", "5"], "makes pictures, expected 1"),
        ("qwen-image-edit", [], "takes one picture to start from"),
        ("wan2.1", ["--num-gpus", "2", "--ulysses-degree", "3"], "expected a product of 2"),
        ("wan2.1", ["--image", "missing.png"], "cannot be read"),
        ("wan2.1", ["--model-path", "."], "expected a pipeline's folder"),
    ],
)
def test_invalid_requests_are_refused(
    name: str, words: list[str], message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    words = [str(picture(tmp_path)) if word == "given.png" else word for word in words]
    call = ["generate", "a cat", "--model-path", str(models(name)), "-o", str(tmp_path / "out"), *words]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_a_made_model_replaces_only_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").touch()
    done = CliRunner().invoke(app, ["make-model", "wan2.1", "-o", str(tmp_path / "mine")])
    assert done.exit_code == 2
    assert "holds no pipeline" in done.output
    assert (tmp_path / "mine" / "precious.txt").exists()


@pytest.mark.parametrize(("name", "start"), [("qwen-image", 34), ("qwen-image-edit", 64), ("qwen-image-edit-plus", 64)])
def test_templates_have_the_tokens_that_the_pipelines_cut(name: str, start: int, models: Callable[[str], Path]) -> None:
    generator = Generator(models(name), torch.float32, torch.float32)
    pipeline = generator.pipeline
    before, _ = pipeline.prompt_template_encode.split("{}")
    before = before.split("<|vision_start|>")[0]
    assert len(pipeline.tokenizer(before).input_ids) == start

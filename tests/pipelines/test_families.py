"""Pipelines that decode within their own call: on two ranks they make what diffusers makes in one process."""

import base64
import inspect
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving.server import Server
from torch import Tensor
from typer.testing import CliRunner

from halovae.cli.main import app
from halovae.cli.make_model import NAMES
from halovae.distributed.ranks import Ranks
from halovae.errors import PromptError
from halovae.models.classes import tiles_only
from halovae.pipelines import tiny
from halovae.pipelines.diffusers import do_without_torchvision
from halovae.pipelines.families import FAMILIES
from halovae.pipelines.generator import Generator
from halovae.pipelines.specs import Pipeline, Prompt

SLOW = ("hunyuan-video-1.5", "allegro", "kandinsky-6", "flux.2", "ltx-2")
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in tiny.FAMILIES]
SIZE = (96, 64)


def prompt_for(folder: Path) -> Prompt:
    kind = Pipeline.read(folder)
    size = (max(SIZE[0], kind.widths.least), max(SIZE[1], kind.heights.least))
    frames = max(kind.lengths.step + 1, kind.lengths.least) if kind.makes_video else 1
    return kind.fitted(Prompt("a cat, playing", size, frames, 2, seed=3))


def generated(folder: Path, prompt: Prompt, ulysses: int) -> tuple[Tensor | None, str, list[int], bool]:
    """Return frames in [0, 1], the decode's grid, each rank's messages, and whether the transformer is shared."""
    generator = Generator(folder, torch.float32, torch.float32, ulysses)
    made = generator.make(prompt, dtype=torch.float32, options={"mode": "parallel"})
    shared = getattr(getattr(generator.pipeline, "transformer", None), "_parallel_config", None) is not None
    return made.frames, made.report.grid, [rank.messages for rank in made.report.ranks], shared


def by_diffusers(folder: Path, prompt: Prompt) -> Tensor:
    """Return the result of diffusers' own pipeline, `[B, 3, T, H, W]` in [0, 1], on white."""
    from diffusers import DiffusionPipeline

    import halovae.pipelines.tiny.safety  # noqa: F401 Cosmos' tiny pipeline names a class in it

    do_without_torchvision()
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if tiles_only(pipeline.vae):
        pipeline.vae.enable_tiling()
    assert prompt.size is not None
    given = {"width": prompt.size[0], "height": prompt.size[1], "num_frames": prompt.frames}
    takes = inspect.signature(pipeline.__call__).parameters
    given = {name: value for name, value in given.items() if name in takes}
    frames: Tensor = pipeline(
        prompt=prompt.text, num_inference_steps=prompt.steps, generator=torch.Generator().manual_seed(prompt.seed),
        output_type="pt", return_dict=False, **given, **FAMILIES[type(pipeline).__name__].always,
    )[0]  # fmt: skip
    frames = frames.movedim(1, 2) if frames.ndim == 5 else frames.unsqueeze(2)
    if frames.shape[1] == 4:  # Qwen-Image-2.1's have an alpha channel
        frames = frames[:, :3] * frames[:, 3:] + 1 - frames[:, 3:]
    return frames


@pytest.mark.parametrize("name", EACH)
def test_two_ranks_make_what_diffusers_makes(
    name: str, models: Callable[[str], Path], ranks: Callable[[int], Ranks]
) -> None:
    folder = models(name)
    prompt = prompt_for(folder)
    (frames, grid, messages, shared), (nothing, *_) = ranks(2).run(generated, folder, prompt, 2)
    assert nothing is None
    assert frames is not None
    assert grid == "2x1"
    assert shared == name.startswith("flux")
    assert min(messages) > 5  # halos, not only shards of the result
    expected = by_diffusers(folder, prompt)
    assert frames.shape == expected.shape
    assert list(frames.shape[2:]) == [prompt.frames, *reversed(prompt.size or ())]
    assert expected.std() > 0.05
    difference = (frames - expected).abs()
    if name == "cosmos":  # its safety check rounds to 255 steps
        assert (difference > 1e-4).double().mean() <= 1e-3
        assert difference.max() <= 1.01 / 255
    else:
        assert difference.max() <= 1e-4


def test_a_prompt_counts(models: Callable[[str], Path]) -> None:
    folder = models("kandinsky-5")
    generator = Generator(folder, torch.float32, torch.float32)
    made = [
        generator.make(generator.kind.fitted(Prompt(text, (32, 32), 1, 1)), dtype=torch.float32).frames
        for text in ("a cat, playing", "a dog")
    ]
    assert made[0] is not None
    assert made[1] is not None
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_all_names_can_be_made() -> None:
    assert list(NAMES) == list(tiny.MODELS)
    assert sorted(tiny.FAMILIES) == sorted(family.name for family in FAMILIES.values())


def test_the_docs_list_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    assert [name for name in tiny.MODELS if f"| `{name}` |" not in page] == []
    assert [name for name, family in FAMILIES.items() if f"| `{family.name}` | `{name}` |" not in page] == []


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["make-model", "flux.9", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "model 'flux.9': expected one of wan2.1," in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "request_fields", "field", "words"),
    [
        ("flux", {"negative": "blurred"}, "negative", "takes none"),
        ("hunyuan-image", {"guidance": 3.0}, "guidance", "takes none"),
        ("flux", {"frames": 5}, "frames", "makes pictures"),
        ("sd1.5", {"size": (4, 64)}, "size", "multiples of 8, from 8x8 on"),
        ("sd1.5", {"images": (b"",)}, "images", "takes no pictures"),
        ("allegro", {"size": (64, 64)}, "size", "makes 128x128 pixels, and 48 more cols"),
    ],
)
def test_invalid_requests_are_refused(
    name: str, request_fields: dict[str, Any], field: str, words: str, models: Callable[[str], Path]
) -> None:
    with pytest.raises(PromptError, match=words) as refused:
        Pipeline.read(models(name)).fitted(Prompt("a cat", **request_fields))
    assert refused.value.field == field


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_makes_and_generates(ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["make-model", "sdxl", "-o", str(tmp_path / "sdxl")]
    assert CliRunner().invoke(app, words).exit_code == 0
    words = ["generate", "a cat", "--model-path", str(tmp_path / "sdxl"), "-o", str(tmp_path / "out.png")]
    words += ["--size", "100x64", "--num-inference-steps", "2", "--num-gpus", str(ranks)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    output = done.output + capfd.readouterr().err  # of this process, or of rank 0's
    assert "made 96x64, 1 frame(s), 2 steps, seed 0" in output
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == SIZE


def check_served(folder: Path, output: Path) -> None:
    """Check that a server on two ranks makes what diffusers makes."""
    prompt = prompt_for(folder)
    assert prompt.size is not None
    body = {"prompt": prompt.text, "size": "{}x{}".format(*prompt.size), "num_inference_steps": 2, "seed": 3}
    expected = (by_diffusers(folder, prompt)[0].movedim(0, -1) * 255).round()
    with Server(folder, output, "--vae-parallel", "on") as server:
        server.wait()
        if Pipeline.read(folder).makes_video:
            doomed = server.submit(**{**body, "num_inference_steps": 1000})
            while server.video(doomed)["progress"] == 0:
                time.sleep(0.01)
            assert httpx.delete(f"{server.url}/v1/videos/{doomed}", timeout=30).json()["deleted"]
            shown = server.ended(server.submit(**body, num_frames=prompt.frames))
            assert shown["status"] == "completed", shown
            content = httpx.get(f"{server.url}/v1/videos/{shown['id']}/content", timeout=30).content
            with av.open(io.BytesIO(content), "r") as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert np.stack(frames).shape == expected.shape
        else:
            answer = httpx.post(f"{server.url}/v1/images/generations", json={**body, "n": 2}, timeout=60)
            assert answer.status_code == 200, answer.text
            shown = answer.json()
            first, second = (
                np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in shown["data"]
            )
            assert np.abs(first - expected[0].numpy()).max() <= 1
            assert not np.array_equal(first, second)
        assert shown["decode"]["plan"].startswith("2x1"), shown


@pytest.mark.parametrize("name", ["flux", "hunyuan-video"])
def test_a_server_makes_pictures_and_videos(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    check_served(models(name), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name not in ("flux", "hunyuan-video")])
def test_a_server_makes_the_others(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    check_served(models(name), tmp_path / "out")

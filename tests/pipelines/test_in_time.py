"""What `parallelize` says of a decode before a pipeline denoises."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import halovae
from halovae.errors import MemoryBudgetError
from halovae.pipelines.tiny import make_model

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("wan2.1", "qwen-image", "flux"):
        make_model(name, root / name)
    return root


def made(folder: Path, name: str) -> tuple[Any, dict[str, Any], list[int]]:
    """Return a pipeline, arguments of a call, and a list to which each step is added."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / name)
    pipe.set_progress_bar_config(disable=True)
    steps: list[int] = []

    def on_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    options = {"prompt": "a", "height": 64, "width": 96, "num_inference_steps": 1, "callback_on_step_end": on_step}
    return pipe, options | ({"num_frames": 5} if name == "wan2.1" else {}), steps


@pytest.mark.parametrize("name", ["wan2.1", "qwen-image", "flux"])
def test_a_decode_that_fits_nowhere_ends_before_denoising(folder: Path, name: str) -> None:
    pipe, options, steps = made(folder, name)
    halovae.parallelize(pipe, memory_budget=2**12)
    with pytest.raises(MemoryBudgetError, match="do not fit into a memory budget"):
        pipe(**options)
    assert steps == []
    halovae.restore(pipe)
    pipe(**options)
    assert steps == [0]


def test_a_decode_in_strips_is_told_before_denoising(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, options, steps = made(folder, "qwen-image")
    options |= {"width": 320}
    plan = halovae.load(pipe.vae).plan((1, 16, 1, 8, 40), memory_budget=2**40)
    assert plan is not None
    assert plan.chosen.peak is not None
    frames = pipe(**options, generator=torch.Generator().manual_seed(0), output_type="pt").images
    caplog.set_level(logging.INFO, "halovae")
    for budget, words in ((2**40, "at once"), (int(0.75 * plan.chosen.peak) + frames.nbytes, "strips of cols")):
        caplog.clear()
        halovae.parallelize(pipe, memory_budget=budget)
        found = pipe(**options, generator=torch.Generator().manual_seed(0), output_type="pt").images
        (told,) = (record for record in caplog.records if "will be decoded" in record.message)
        assert "[1, 16, 1, 8, 40]" in told.message
        assert words in told.message
        torch.testing.assert_close(found, frames, rtol=0, atol=1e-4)
    assert steps == [0, 0, 0]

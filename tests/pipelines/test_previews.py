"""Small pictures while a pipeline's steps run."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import halovae
from halovae import Preview
from halovae.distributed.ranks import Ranks
from halovae.pipelines.diffusers import do_without_torchvision
from halovae.pipelines.families import FAMILIES
from halovae.pipelines.previews import Previews, _sigma

SIZE = (96, 64)


def loaded(folder: Path) -> Any:
    do_without_torchvision()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, **options: Any) -> Any:
    """Return a pipeline's result after four steps, `[H, W, 3]`, uint8; the first frame of a video."""
    takes = inspect.signature(pipe.__call__).parameters
    given: dict[str, Any] = dict(FAMILIES[type(pipe).__name__].always) if type(pipe).__name__ in FAMILIES else {}
    if "num_frames" in takes:
        given["num_frames"] = 5
    if "image" in takes and "Edit" in type(pipe).__name__:
        given["image"] = Image.new("RGB", SIZE, "red")
    frames = pipe(
        prompt="a cat", width=SIZE[0], height=SIZE[1], num_inference_steps=4, output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(0), **given, **options,
    )[0]  # fmt: skip
    frame = (frames[0, 0] if frames.ndim == 5 else frames[0]).float()
    frame = frame[:3] * frame[3:] + 1 - frame[3:] if len(frame) == 4 else frame  # on white
    return frame.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize(
    "name",
    ["wan2.1", "wan2.2-5b", "qwen-image-edit", "flux", "flux.2-klein", "sd1.5", "sdxl", "sana", "qwen-image-2.1"],
)
def test_the_last_preview_is_the_picture(name: str, models: Callable[[str], Path]) -> None:
    """No noise is left after the last step, and this preview has full size."""
    pipe, seen = loaded(models(name)), list[Preview]()
    if name == "sd1.5":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    plain = made(pipe)
    watched = made(pipe, callback_on_step_end=halovae.previews(pipe, every=2, show=seen.append, side=96, size=SIZE))
    assert (plain == watched).all()
    assert [preview.step for preview in seen] == [2, 4]
    assert {preview.picture.size for preview in seen} == {SIZE}
    difference = np.abs(np.asarray(seen[-1].picture).astype(int) - plain)
    assert difference.max() <= 1
    assert plain.std() > 1


class Oracle:
    """A pipeline whose model knows the picture from the beginning."""

    num_timesteps = 6

    def __init__(self, scheduler: Any, picture: Tensor) -> None:
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        self.scheduler, self.picture = scheduler, picture
        self.vae = diffusers.AutoencoderKL(block_out_channels=(32, 32), **blocks).eval()

    def __call__(self, callback_on_step_end: Callable[..., Any]) -> None:
        self.scheduler.set_timesteps(self.num_timesteps)
        noise = torch.randn(self.picture.shape, generator=torch.Generator().manual_seed(1))
        sigma = self.scheduler.sigmas[0]
        is_flow = not isinstance(self.scheduler, diffusers.EulerDiscreteScheduler)
        x = (1 - sigma) * self.picture + sigma * noise if is_flow else self.picture + sigma * noise
        for index, step in enumerate(self.scheduler.timesteps):
            if not is_flow:
                self.scheduler.scale_model_input(x, step)
            x = self.scheduler.step(noise - self.picture if is_flow else noise, step, x, return_dict=False)[0]
            callback_on_step_end(self, index, step, {"latents": x})


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.EulerDiscreteScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("every", [1, 2])
def test_noise_is_removed(scheduler: Any, every: int) -> None:
    """With a model that is right at each step, each preview except the first step's equals the result."""
    picture = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    pipe, seen = Oracle(scheduler, picture), list[Preview]()
    pipe(callback_on_step_end=halovae.previews(pipe, every=every, show=seen.append))
    assert [one.step for one in seen] == list(range(every, 7, every))
    last = np.asarray(seen[-1].picture).astype(int)
    assert last.std() > 1
    for one in seen[1 if every == 1 else 0 :]:
        assert np.abs(np.asarray(one.picture) - last).max() <= 1


def test_pictures_have_the_requested_size() -> None:
    pipe = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 16, 24))
    factor, seen = 2 ** (len(pipe.vae.config.block_out_channels) - 1), list[Preview]()
    pipe(callback_on_step_end=halovae.previews(pipe, every=6, show=seen.append, side=12 * factor))
    assert seen[0].picture.size == (12 * factor, 8 * factor)
    small = torch.nn.functional.adaptive_avg_pool2d(pipe.picture, (8, 12))
    expected = pipe.vae.decode(small / pipe.vae.config.scaling_factor).sample[0].clamp(-1, 1).add(1).mul(127.5).round()
    assert np.abs(np.asarray(seen[0].picture) - expected.permute(1, 2, 0).detach().numpy()).max() <= 1


def test_a_tiny_autoencoder_may_decode() -> None:
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                     num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip
    pipe, seen = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 8, 12)), list[Preview]()
    pipe(callback_on_step_end=halovae.previews(pipe, every=6, show=seen.append, decoder=tiny))
    expected = tiny.decode(pipe.picture).sample[0].clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0)
    assert np.abs(np.asarray(seen[0].picture) - expected.detach().numpy()).max() <= 1


def test_a_pipeline_continues_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 8, 12)), list[Preview]()
    drawn = Previews._drawn

    def short(self: Previews, z: Tensor) -> Any:
        if len(seen) == 2:
            raise torch.OutOfMemoryError("too much")
        return drawn(self, z)

    monkeypatch.setattr(Previews, "_drawn", short)
    watch = halovae.previews(pipe, every=1, show=seen.append)
    with pytest.warns(RuntimeWarning, match="no more previews: out of memory"):
        pipe(callback_on_step_end=watch)
    assert [one.step for one in seen] == [1, 2]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(callback_on_step_end=watch)  # another call tries again
    assert len(seen) == 8


def test_a_clip_of_pictures_shows_its_first_frame() -> None:
    """As in AnimateDiff: latents of a clip, whose frames a decoder of pictures takes one by one."""
    clip = torch.randn(1, 4, 3, 8, 12)
    pipe, seen = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), clip), list[Preview]()
    pipe(callback_on_step_end=halovae.previews(pipe, show=seen.append))
    expected = pipe.vae.decode(clip[:, :, 0] / pipe.vae.config.scaling_factor).sample[0].clamp(-1, 1)
    expected = expected.add(1).mul(127.5).round().permute(1, 2, 0).detach().numpy()
    assert [one.step for one in seen] == [5, 6]  # and the last step, whatever `every` is
    assert np.abs(np.asarray(seen[-1].picture) - expected).max() <= 1


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        diffusers.UniPCMultistepScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.DDIMScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_noise_is_not_removed_if_steps_are_not_on_a_line(scheduler: Any) -> None:
    scheduler.set_timesteps(4)
    if hasattr(scheduler, "sigmas"):
        scheduler._step_index = 1
    assert _sigma(scheduler) is None


def test_a_failure_while_steps_run_is_reported_once() -> None:
    pipe = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 8, 12))

    def show(preview: Preview) -> None:
        raise OSError("no space")

    with pytest.warns(RuntimeWarning, match=r"no more previews: OSError \(no space\)") as warned:
        pipe(callback_on_step_end=halovae.previews(pipe, every=1, show=show))
    assert len(warned) == 1


def refusal(folder: Path) -> str:
    pipe = halovae.parallelize(loaded(folder))
    with pytest.raises(ValueError, match="previews of") as refused:
        made(pipe, callback_on_step_end=halovae.previews(pipe, show=print))
    return str(refused.value)


def test_all_ranks_refuse(models: Callable[[str], Path], ranks: Callable[[int], Ranks]) -> None:
    first, other = ranks(2).run(refusal, models("flux"))
    assert first == other
    assert "its latents are packed, expected size=(width, height)" in first


def plain_and_watched(folder: Path) -> tuple[list[int], Any, Any]:
    pipe, seen = halovae.parallelize(loaded(folder)), list[Preview]()
    plain = made(pipe)
    watched = made(pipe, callback_on_step_end=halovae.previews(pipe, every=1, show=seen.append, size=SIZE, side=48))
    return [preview.step for preview in seen], plain, watched


def test_rank_0_draws_and_nothing_else_changes(models: Callable[[str], Path], ranks: Callable[[int], Ranks]) -> None:
    (first, plain, watched), (other, *_) = ranks(2).run(plain_and_watched, models("flux"))
    assert (first, other) == ([1, 2, 3, 4], [])
    assert (plain == watched).all()


class Blind:
    vae = None


def test_what_cannot_be_drawn_is_refused(models: Callable[[str], Path]) -> None:
    pipe = Oracle(diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 8, 12))
    for options, words in (
        ({"every": 0}, "every=0: expected an integer of 1 or more"),
        ({"side": 0}, "side=0"),
        ({"size": (96,)}, r"size=\(96,\): expected width and height in pixels"),
        ({"size": (96, 0)}, r"size=\(96, 0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            halovae.previews(pipe, show=print, **options)
    with pytest.raises(TypeError, match="show='a.png': expected a function of a Preview"):
        halovae.previews(pipe, show="a.png")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a vae; got Blind"):
        halovae.previews(Blind(), show=print)
    with pytest.raises(TypeError, match="HunyuanVideo15Pipeline takes no callback_on_step_end"):
        halovae.previews(loaded(models("hunyuan-video-1.5")), show=print)
    watch = halovae.previews(pipe, show=print)
    with pytest.raises(ValueError, match="expected 'latents' in callback_on_step_end_tensor_inputs"):
        watch(pipe, 0, 0, {})
    pipe.picture = torch.randn(1, 5, 8, 12)
    with pytest.raises(ValueError, match=r"its latents are \[1, 5, 8, 12\], and how they become \[B, 4, H, W\]"):
        pipe(callback_on_step_end=watch)
    flux = loaded(models("flux"))
    with pytest.raises(ValueError, match="size 512x512 does not make latents of 96 tokens"):
        made(flux, callback_on_step_end=halovae.previews(flux, show=print, size=(512, 512)))
    for name, latents, words in (
        ("ltx-video", (1, 192, 8), "are unpacked is not known"),
        ("cogvideox", (1, 4, 4, 8, 12), "are .1, 4, 4, 8, 12., and how they become"),  # as many frames as channels
        ("kandinsky-5", (1, 4, 4, 8, 9), "are .1, 4, 4, 8, 9., and how they become"),
    ):
        pipe = loaded(models(name))
        with pytest.raises(ValueError, match=words):
            halovae.previews(pipe, show=print, size=SIZE)(pipe, 0, 0, {"latents": torch.zeros(latents)})
    with pytest.raises(TypeError, match="AutoencoderKLAllegro decodes tiles of one size"):
        halovae.previews(loaded(models("allegro")), show=print)

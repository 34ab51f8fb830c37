"""Pipelines of diffusers that decode through halovae on two ranks: same frames, same interface."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines.embedded import embeddings, qwen_image_edit, wan_image_to_video
from samples import FAMILIES, WIDTH, latents, vae
from torch import Tensor

import halovae
from halovae import Grid
from halovae.distributed.ranks import Ranks
from halovae.errors import CheckpointError
from halovae.models.architectures import random_vae
from halovae.pipelines.tiny import TEXT_DIM, make_model, transformer
from halovae.runtime.options import Choice, Sharing

BOUND = 1e-4
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    make_model("wan2.1", root / "wan")
    make_model("qwen-image", root / "qwen")
    return {"wan": root / "wan", "qwen": root / "qwen"}


def generate(pipe: Any, **options: Any) -> np.ndarray:
    """Return a pipeline's frames as numpy, without progress bars, from a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", **options)
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


def both_ways(pipe: Any, **options: Any) -> tuple[float, list[int], np.ndarray]:
    """Return the largest difference between halovae's and diffusers' frames, the shape, and halovae's frames."""
    wanted = generate(pipe, **options)
    try:
        frames = generate(halovae.parallelize(pipe, grid=Grid(rows=2)), **options)
    finally:
        halovae.restore(pipe)
    assert np.isfinite(wanted).all()
    assert wanted.std() > 1e-3
    return float(np.abs(frames - wanted).max()), list(frames.shape), frames


def wan_text_to_video(folder: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    return both_ways(pipe, prompt="a cat", negative_prompt="", height=64, width=48, num_frames=9)


def qwen_text_to_image(folder: Path) -> Any:
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(folder)
    return both_ways(pipe, prompt="a cat", height=64, width=96)


def wan_from_an_image() -> Any:
    image = torch.rand(3, 64, 48, generator=torch.Generator().manual_seed(1))
    prompts = {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=1)}
    return both_ways(wan_image_to_video(), image=image, height=64, width=48, num_frames=5, **prompts)


def qwen_edit() -> Any:
    from PIL import Image

    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    mask = torch.ones(1, 12, dtype=torch.long)
    return both_ways(
        qwen_image_edit(), image=image, height=96, width=64, prompt_embeds=embeddings(), prompt_embeds_mask=mask
    )


def clip(frames: int) -> list[Any]:
    """Frames to start from."""
    from PIL import Image

    ramp = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
    return [Image.fromarray(ramp + 20 * index) for index in range(frames)]


def wan_from_a_video() -> Any:
    from diffusers import UniPCMultistepScheduler, WanVideoToVideoPipeline

    pipe = WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer("wan"), vae=vae("wan2.1"),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    prompts = {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=1)}
    return both_ways(pipe, video=clip(5), height=64, width=48, **prompts)


def wan_under_control() -> Any:
    """A clip whose right half is to be replaced, as WanVACE takes it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel
    from PIL import Image

    torch.manual_seed(0)
    control = WanVACETransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2,
        vace_layers=[0], vace_in_channels=96,
    )  # fmt: skip
    pipe = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=vae("wan2.1"), scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=control.eval(),
    )  # fmt: skip
    mask = Image.fromarray(np.repeat(np.repeat([[0, 255]], 24, 1), 64, 0).astype(np.uint8))
    prompts = {"prompt_embeds": embeddings(), "negative_prompt_embeds": embeddings(seed=1)}
    return both_ways(pipe, video=clip(5), mask=[mask] * 5, height=64, width=48, num_frames=5, **prompts)


def qwen_inpaint() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageInpaintPipeline
    from PIL import Image

    pipe = QwenImageInpaintPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae("qwen-image"), text_encoder=None, tokenizer=None,
        transformer=transformer("qwen-image"),
    )  # fmt: skip
    (image,) = clip(1)
    mask = Image.fromarray(np.repeat(np.repeat([[0, 255]], 24, 1), 64, 0).astype(np.uint8))
    return both_ways(
        pipe, image=image, mask_image=mask, height=64, width=48, strength=1.0,
        prompt_embeds=embeddings(), prompt_embeds_mask=torch.ones(1, 12, dtype=torch.long),
    )  # fmt: skip


def qwen_layers(folder: Path) -> Any:
    """A picture split into two layers with alpha."""
    import diffusers

    components = diffusers.QwenImagePipeline.from_pretrained(folder).components
    torch.manual_seed(0)
    components["vae"] = diffusers.AutoencoderKLQwenImage(base_dim=8, input_channels=4, num_res_blocks=1).eval()
    components["transformer"] = diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6), use_additional_t_cond=True, use_layer3d_rope=True,
    ).eval()  # fmt: skip
    pipe = diffusers.QwenImageLayeredPipeline(**components, processor=None)
    (image,) = clip(1)
    return both_ways(pipe, image=image.convert("RGBA"), prompt="a cat", layers=2)


def check(results: list[Any], shape: list[int]) -> None:
    for difference, found, frames in results:
        assert difference <= BOUND
        assert found == shape
        assert np.array_equal(frames, results[0][2])


def test_wan_text_to_video(ranks: Callable[[int], Ranks], folders: dict[str, Path]) -> None:
    check(ranks(2).run(wan_text_to_video, folders["wan"]), [1, 9, 64, 48, 3])


def test_wan_image_to_video(ranks: Callable[[int], Ranks]) -> None:
    check(ranks(2).run(wan_from_an_image), [1, 5, 64, 48, 3])


def test_qwen_image(ranks: Callable[[int], Ranks], folders: dict[str, Path]) -> None:
    check(ranks(2).run(qwen_text_to_image, folders["qwen"]), [1, 64, 96, 3])


def test_wan_video_to_video(ranks: Callable[[int], Ranks]) -> None:
    check(ranks(2).run(wan_from_a_video), [1, 5, 64, 48, 3])


def test_wan_control(ranks: Callable[[int], Ranks]) -> None:
    check(ranks(2).run(wan_under_control), [1, 5, 64, 48, 3])


def test_qwen_inpaint(ranks: Callable[[int], Ranks]) -> None:
    check(ranks(2).run(qwen_inpaint), [1, 64, 48, 3])


@pytest.mark.slow
def test_qwen_layered(ranks: Callable[[int], Ranks], folders: dict[str, Path]) -> None:
    """Slow: its pictures have at least 640 x 640 pixels."""
    check(ranks(2).run(qwen_layers, folders["qwen"]), [1, 2, 736, 544, 4])


def test_qwen_image_edit(ranks: Callable[[int], Ranks]) -> None:
    check(ranks(2).run(qwen_edit), [1, 96, 64, 3])


@pytest.mark.parametrize(
    ("script", "model", "output", "options"),
    [
        ("wan_text_to_video.py", "wan", "clip.mp4", ["--size", "48x64", "--frames", "9"]),
        pytest.param("qwen_image.py", "qwen", "picture.png", ["--size", "96x64"], marks=pytest.mark.slow),
    ],
)
def test_examples_run_under_torchrun(
    folders: dict[str, Path], tmp_path: Path, script: str, model: str, output: str, options: list[str]
) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / script)),
        *("--model", str(folders[model]), "--prompt", "a cat", "--steps", "2", "--dtype", "float32"),
        *("--compare", "-o", str(tmp_path / output), *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / output).stat().st_size > 0
    difference = float(done.stdout.split("largest difference to diffusers:")[1].split()[0])
    assert difference <= BOUND


def results_of_decode(family: str, z: Tensor) -> dict[str, Any]:
    """Return what `vae.decode` returns in its several forms, before, during, and after `parallelize`."""
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    vae = random_vae(family, WIDTH)
    with torch.no_grad():
        wanted = vae.decode(z).sample
        clip = wanted[:, :, :1].contiguous()
        encoded = vae.encode(clip).latent_dist.mode()
        config = dict(vae.config)
        assert halovae.parallelize(vae, gather="rank0") is vae
        halovae.parallelize(vae)  # again, with other settings
        whole, (plain,) = vae.decode(z), vae.decode(z, return_dict=False)
        assert isinstance(whole, DecoderOutput)
        assert dict(vae.config) == config
        shared, (posterior,) = vae.encode(clip), vae.encode(clip, return_dict=False)
        assert isinstance(shared, AutoencoderKLOutput)
        assert torch.equal(posterior.mode(), shared.latent_dist.mode())
        assert (posterior.mode() - encoded).abs().max() <= BOUND * encoded.abs().max()
        halovae.parallelize(vae, gather="rank0", grid=Grid(cols=2))
        lean = vae.decode(z).sample
        halovae.restore(vae)
        restored = vae.decode(z).sample
        halovae.restore(vae)
    return {"wanted": wanted, "whole": whole.sample, "plain": plain, "lean": lean, "restored": restored}


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_keeps_its_interface(ranks: Callable[[int], Ranks], family: str) -> None:
    first, second = ranks(2).run(results_of_decode, family, latents(family))
    for seen in (first, second):
        for name in ("whole", "plain", "restored"):
            assert seen[name].dtype == seen["wanted"].dtype
            assert (seen[name] - seen["wanted"]).abs().max() <= BOUND
    assert (first["lean"] - first["wanted"]).abs().max() <= BOUND
    assert second["lean"].shape == second["wanted"].shape
    assert (second["lean"] == -1).all()


def test_black_frames_take_no_memory() -> None:
    z, call = latents("wan2.1"), halovae.load(random_vae("wan2.1", WIDTH)).calls["decode"]
    for _ in call.stream(z, Choice(Grid(), 1), Sharing(), {}):
        pass
    assert call.blank(z).untyped_storage().nbytes() == 4


def test_dtype_of_the_sample_is_the_models() -> None:
    vae = halovae.parallelize(random_vae("wan2.1", WIDTH).bfloat16())
    assert vae.decode(latents("wan2.1").bfloat16()).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("switch", ["enable_tiling", "enable_slicing"])
def test_tiling_and_slicing_are_ignored_with_a_warning(switch: str) -> None:
    vae = random_vae("wan2.1", WIDTH)
    z = latents("wan2.1", frames=1, height=40, width=4, batch=2)
    with torch.no_grad():
        wanted = vae.decode(z).sample
    getattr(vae, switch)()
    halovae.parallelize(vae)
    with pytest.warns(UserWarning, match="not needed with halovae"):
        frames = vae.decode(z).sample
    assert (frames - wanted).abs().max() <= BOUND


@pytest.mark.parametrize("thing", [object(), "wan", None])
def test_what_has_no_vae_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a vae"):
        halovae.parallelize(thing)
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a vae"):
        halovae.restore(thing)


def test_a_vae_of_another_class_is_shared_too() -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip
    latents = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        expected = vae.decode(latents).sample
    halovae.parallelize(vae)
    assert torch.equal(vae.decode(latents).sample, expected)


def test_a_module_without_a_decode_is_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear has neither decode nor encode"):
        halovae.load(torch.nn.Linear(1, 1))


def test_a_pipeline_needs_whole_frames() -> None:
    with pytest.raises(ValueError, match="gather='none'"):
        halovae.parallelize(random_vae("wan2.1", WIDTH), gather="none")

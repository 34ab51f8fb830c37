"""VAEs in single files of their authors' layouts: recognition, and decodes that equal the original module's."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import original_layouts as layouts
from models.original_layouts import ENTRIES, KL, MODULES, original, tiny, written
from safetensors.torch import save_file
from samples import latents, vae
from torch import Tensor, nn
from typer.testing import CliRunner

import halovae
from halovae.bench.run import subject_of
from halovae.cli.main import app
from halovae.errors import CheckpointError
from halovae.io import latents as latents_file
from halovae.models import load as checkpoints
from halovae.models import zoo
from halovae.models.architectures import meta_vae
from halovae.models.checkpoint import recognize
from halovae.models.layouts import LAYOUTS
from halovae.models.registry import families
from halovae.models.wan import WanConfig
from halovae.models.weights import Weights
from halovae.runtime.vae import VAE

diffusers = pytest.importorskip("diffusers")

WAN = {"wan2.1": layouts.wan21, "qwen-image": layouts.wan21, "wan2.2-5b": layouts.wan22}


def latents_of(name: str, module: nn.Module) -> Tensor:
    vae: Any = module
    frames = [] if name in ("sd", "flux") or "flux.2" in name else [2]
    return torch.randn(1, vae.config.latent_channels, *frames, 5, 7, generator=torch.Generator().manual_seed(1))


def check(path: Path, name: str, module: nn.Module, dtype: torch.dtype = torch.float32) -> VAE:
    """Check that the file's module decodes as `module` does, bit for bit."""
    loaded = halovae.load(path, dtype=dtype, device="cpu")
    assert type(loaded.module) is type(module)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    z = latents_of(name, module).to(dtype)
    with torch.no_grad():
        assert torch.equal(zoo.decode(loaded.module, z), zoo.decode(module, z))
    return loaded


def check_wan(path: Path, module: nn.Module, family: str) -> WanConfig:
    """As `check`, for a Wan file; return its sizes."""
    loaded = halovae.load(path, device="cpu")
    z = latents(family, frames=2, height=3, width=4)
    frames, expected = loaded.decode(z), halovae.load(module).decode(z)
    assert frames is not None
    assert expected is not None
    assert torch.equal(frames, expected)
    sizes = loaded.calls["decode"].sizes
    assert sizes is not None
    return sizes


@pytest.mark.parametrize("name", MODULES)
def test_an_original_file_decodes_as_the_module_it_was_written_from(name: str, tmp_path: Path) -> None:
    module = MODULES[name]()
    save_file(original(name, module), tmp_path / "file")
    check(tmp_path / "file", name, module)


@pytest.mark.parametrize("family", WAN)
def test_wans_original_file_decodes_as_the_module_it_was_written_from(family: str, tmp_path: Path) -> None:
    save_file(written(vae(family), WAN[family]), tmp_path / "file")
    sizes = check_wan(tmp_path / "file", vae(family), family)
    assert sizes.family == ("wan2.1" if family == "qwen-image" else family)  # their files cannot be distinguished
    if family != "wan2.2-5b":  # its true means are in diffusers' config.json, not in the defaults
        config = halovae.load(tmp_path / "file", device="cpu").config
        assert tuple(config.latents_mean) == tuple(vae(family).config.latents_mean)


@pytest.mark.parametrize("name", ["flux", "ltx-video 0.9.0", "hunyuan-video"])
def test_a_file_with_diffusers_names_needs_no_config(name: str, tmp_path: Path) -> None:
    module = MODULES[name]()
    save_file(module.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    check(tmp_path / "diffusion_pytorch_model.safetensors", name, module)


@pytest.mark.parametrize("family", ["qwen-image", "wan2.2-5b"])
def test_a_wan_file_with_diffusers_names_needs_no_config(family: str, tmp_path: Path) -> None:
    save_file(written(vae(family), layouts.same_names), tmp_path / "file")
    check_wan(tmp_path / "file", vae(family), family)


def test_older_names_of_attention(tmp_path: Path) -> None:
    module = MODULES["sd"]()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in module.state_dict().items():
        for new, old in older.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[key] = tensor
    save_file(state, tmp_path / "file")
    check(tmp_path / "file", "sd", module)


STORED = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_is_cast(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    module = MODULES["flux"]()
    save_file({key: one.to(stored) for key, one in original("flux", module).items()}, tmp_path / "file")
    for parameter in module.parameters():
        parameter.data = parameter.data.to(stored).to(dtype)
    assert check(tmp_path / "file", "flux", module, dtype).dtype == dtype


@pytest.mark.parametrize("stored", STORED)
def test_wans_storage_is_cast(stored: torch.dtype, tmp_path: Path) -> None:
    save_file({key: one.to(stored) for key, one in written(vae("wan2.1"), layouts.wan21).items()}, tmp_path / "file")
    module = diffusers.AutoencoderKLWan(**{**vae("wan2.1").config, "_class_name": None}).eval()
    module.load_state_dict({key: one.to(stored).float() for key, one in vae("wan2.1").state_dict().items()})
    check_wan(tmp_path / "file", module, "wan2.1")


@pytest.mark.parametrize(
    ("name", "beside", "factor", "shift"),
    [
        ("sd", "cond_stage_model.transformer.text_model.embeddings.position_ids", 0.18215, None),
        ("sd", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", 0.13025, None),
        ("flux", "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", 0.3611, 0.1159),
        ("flux", "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", 1.5305, 0.0609),
    ],
)
@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_of_a_full_checkpoint_only_the_vae_is_read(
    name: str,
    beside: str,
    factor: float,
    shift: float | None,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = MODULES[name]()
    own = {prefix + key: one for key, one in original(name, module).items()}
    others = {beside: torch.ones(3, dtype=torch.uint8), "model.diffusion_model.out.2.weight": torch.ones(4, 4)}
    save_file(own | others | {f"{prefix}loss.logvar": torch.ones(())}, tmp_path / "file")
    requested: list[str] = []
    read = Weights.read

    def recorded(self: Weights, names: Any) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        requested.extend(names)
        return read(self, names)

    monkeypatch.setattr(Weights, "read", recorded)
    config = check(tmp_path / "file", name, module).config
    assert sorted(requested) == sorted(own)
    assert (config.scaling_factor, config.shift_factor) == (factor, shift)


def test_a_pipelines_file_of_ltx_has_its_vae_under_a_prefix(tmp_path: Path) -> None:
    module = MODULES["ltx-video 0.9.1"]()
    state = {f"vae.{key}": one for key, one in original("ltx-video 0.9.1", module).items()}
    state["vae.per_channel_statistics.channel"] = torch.arange(8.0)  # statistics that no decode uses
    state["vae.per_channel_statistics.mean-of-stds"] = torch.ones(8)
    save_file(state | {"model.diffusion_model.patchify_proj.weight": torch.ones(2, 2)}, tmp_path / "file")
    check(tmp_path / "file", "ltx-video 0.9.1", module)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(zipped: bool, tmp_path: Path) -> None:
    save: dict[str, Any] = {"_use_new_zipfile_serialization": zipped}
    torch.save(written(vae("wan2.1"), layouts.wan21), tmp_path / "Wan2.1_VAE.pth", **save)
    check_wan(tmp_path / "Wan2.1_VAE.pth", vae("wan2.1"), "wan2.1")
    module = MODULES["hunyuan-video"]()
    nested = {"state_dict": {f"vae.{key}": one for key, one in module.state_dict().items()}, "step": 3}
    torch.save(nested, tmp_path / "model.ckpt", **save)
    check(tmp_path / "model.ckpt", "hunyuan-video", module)


def test_other_widths_and_depths(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    module = diffusers.AutoencoderKLWan(base_dim=8, decoder_base_dim=4, **sizes).eval()
    state = written(module, layouts.wan21)
    save_file(state, tmp_path / "pruned")
    sizes_found = check_wan(tmp_path / "pruned", module, "wan2.1")
    assert (sizes_found.base_dim, sizes_found.dim_mult) == (4, (1, 2, 3))
    save_file({key: one for key, one in state.items() if not key.startswith("encoder.")}, tmp_path / "half")
    check_wan(tmp_path / "half", module, "wan2.1")
    wider = tiny("AutoencoderKL", **KL | {"block_out_channels": (64, 32, 96)}, layers_per_block=2)
    save_file(original("sd", wider), tmp_path / "wider")
    check(tmp_path / "wider", "sd", wider)


def test_means_of_other_latents_are_not_invented(tmp_path: Path) -> None:
    module = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1).eval()
    save_file(written(module, layouts.wan21), tmp_path / "file")
    decoder = halovae.load(tmp_path / "file", device="cpu")
    z = torch.zeros(1, 4, 1, 2, 2)
    assert decoder.decode(z) is not None
    with pytest.raises(ValueError, match="no latents_mean and latents_std are known for this AutoencoderKLWan"):
        decoder.decode(z, denormalize=True)


def test_shapes_that_disagree_are_named_and_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("weights were read"))
    state = written(vae("wan2.1"), layouts.wan21)
    state["decoder.upsamples.2.residual.2.weight"] = torch.ones(5, 32, 3, 3, 3)
    del state["decoder.head.2.bias"]
    save_file(state | {"decoder.extra": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(CheckpointError) as caught:
        halovae.load(tmp_path / "file")
    for words in (
        "not weights of wan2.1;",
        "missing: decoder.conv_out.bias",
        "unexpected: decoder.extra",
        "decoder.upsamples.2.residual.2.weight is [5, 32, 3, 3, 3], not [32, 32, 3, 3, 3]",
    ):
        assert words in str(caught.value)
    save_file(MODULES["sd"]().state_dict() | {"quantize.embedding.weight": torch.ones(4, 4)}, tmp_path / "vq")
    with pytest.raises(CheckpointError, match="unexpected: quantize.embedding.weight"):  # as a VQModel has
        halovae.load(tmp_path / "vq")


def test_a_layout_that_diffusers_converts_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(original("sd", MODULES["sd"]()), tmp_path / "file")
    monkeypatch.setitem(sys.modules, "diffusers.loaders.single_file_utils", None)
    with pytest.raises(CheckpointError, match="FLUX.1 needs pip install 'halovae.diffusers.'"):
        recognize(tmp_path / "file")


def test_a_missing_outer_layer_is_named(tmp_path: Path) -> None:
    state = original("flux", MODULES["flux"]())
    del state["decoder.conv_out.weight"]
    save_file(state, tmp_path / "file")
    with pytest.raises(CheckpointError, match="has keys of .*FLUX.1, but others are missing .*decoder.conv_out.weight"):
        halovae.load(tmp_path / "file")


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file(zoo.build(ENTRIES["AutoencoderKL"]).state_dict(), tmp_path / "file")  # 4 groups of 8 channels
    with pytest.raises(CheckpointError, match="no AutoencoderKL has these sizes"):
        halovae.load(tmp_path / "file")


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    state = original("flux", MODULES["flux"]())
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].to(torch.uint8)
    save_file(state, tmp_path / "file")
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias is no floating-point number"):
        halovae.load(tmp_path / "file")


def test_an_unknown_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    state = written(vae("wan2.1"), layouts.wan21)
    save_file({key: one for key, one in state.items() if not key.startswith("decoder.upsamples.")}, tmp_path / "file")
    with pytest.raises(CheckpointError) as caught:
        halovae.load(tmp_path / "file")
    assert "no VAE of a known layout. The nearest is Wan2.1 or Qwen-Image by Wan-AI's" in str(caught.value)
    assert "lacks decoder.upsamples.0.residual.0.gamma, and has conv1.bias" in str(caught.value)
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2)}, tmp_path / "text")
    with pytest.raises(CheckpointError) as caught:
        halovae.load(tmp_path / "text")
    assert "has text_model.encoder.layers.0.mlp.fc1.weight" in str(caught.value)
    assert all(layout.family in str(caught.value) for layout in LAYOUTS)


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_file(written(vae("wan2.1"), layouts.wan21), tmp_path / "short")
    torch.save(written(vae("wan2.1"), layouts.wan21), tmp_path / "short.pth")
    for path in (tmp_path / "short", tmp_path / "short.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=f"{path}: .* is it complete"):
            halovae.load(path)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty: cannot be read as safetensors"):
        halovae.load(tmp_path / "empty")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(
        CheckpointError, match="expected tensors by name, by themselves or in state_dict.*; found Tensor"
    ):
        halovae.load(tmp_path / "tensor.pth")
    torch.save({"state_dict": {}, "callback": Path("x")}, tmp_path / "object.ckpt")
    with pytest.raises(CheckpointError, match="holds more than tensors, and loading it could run code"):
        halovae.load(tmp_path / "object.ckpt")
    with pytest.raises(CheckpointError, match="is a file, so subfolder='vae' is not in it"):
        halovae.load(tmp_path / "short", subfolder="vae")


def write_sparse(module: nn.Module, pairs: Callable[[nn.Module], layouts.Pairs] | None, path: Path) -> None:
    """Write a file of true size that takes no space on disk: names and shapes, then a hole."""
    state = module.state_dict() if pairs is None else layouts.with_convolutions(written(module, pairs))
    header, end = {}, 0
    for key, tensor in state.items():
        size = tensor.numel() * 2
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("named", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("wan2.1", layouts.wan21),
        ("wan2.2-5b", layouts.wan22),
        ("qwen-image", layouts.wan21),
        ("sd", layouts.latent_diffusion),
        ("flux", layouts.latent_diffusion),
        ("flux.2", layouts.flux2),
        ("hunyuan-video", layouts.same_names),
        ("ltx-video", layouts.ltx),
        ("ltx-2", layouts.ltx),
    ],
)
def test_true_sizes_are_read_from_names_and_shapes(
    name: str, pairs: Callable[[nn.Module], layouts.Pairs], named: str, tmp_path: Path
) -> None:
    module: Any = meta_vae(name, torch.float32)
    write_sparse(module, pairs if named == "original" else None, tmp_path / "file")
    found = recognize(tmp_path / "file")
    assert {key: one.shape for key, one in module.state_dict().items()} == {
        key: shape for key, (_, shape) in found.keys.items()
    }
    for key, value in found.config.items():
        if key in ("_class_name", "sample_size", "decoder_base_dim", "latents_mean", "latents_std"):
            continue
        if key in module.config and not (name == "flux" and key in ("scaling_factor", "shift_factor")):
            expected = module.config[key]
            assert value == (list(expected) if isinstance(expected, tuple) else expected), key
    if name != "qwen-image":
        assert found.config["_class_name"] == families()[name].class_name
    assert dict(found.facts())["stored as"] == "bf16"


def test_diffusers_converter_of_wan_agrees_where_it_serves(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    module = meta_vae("wan2.1", torch.float32)
    state = written(module, layouts.wan21)
    write_sparse(module, layouts.wan21, tmp_path / "file")
    theirs = {name: id(one) for name, one in convert_wan_vae_to_diffusers(state).items()}
    ours = {name: id(state[key]) for name, (key, _) in recognize(tmp_path / "file").keys.items()}
    assert ours == theirs


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], terminal_width=200)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_inspect_says_what_a_file_is(tmp_path: Path) -> None:
    save_file({key: one.half() for key, one in written(vae("wan2.1"), layouts.wan21).items()}, tmp_path / "file")
    output = run("inspect", tmp_path / "file")
    assert "file Wan2.1 or Qwen-Image, Wan-AI's and ComfyUI's names stored as fp16 family wan2.1" in output
    state = {f"first_stage_model.{key}": one for key, one in original("sd", MODULES["sd"]()).items()}
    save_file(state | {"conditioner.x": torch.ones(1), "conditioner.embedders.0": torch.ones(1)}, tmp_path / "full")
    output = run("inspect", tmp_path / "full", "--size", "64x64")
    assert "Stable Diffusion, SDXL, SD3 or FLUX.1, latent diffusion's names" in output
    assert "2 tensors; its keys begin with 'first_stage_model.'" in output
    assert "scaling SDXL's scaling_factor 0.13025 class AutoencoderKL" in output
    save_file(original("flux", MODULES["flux"]()), tmp_path / "ae")
    with torch.inference_mode():
        assert recognize(tmp_path / "ae").keys["decoder.mid_block.attentions.0.to_q.weight"] == (
            "decoder.mid.attn_1.q.weight",
            (64, 64),
        )
    output = run("inspect", tmp_path / "ae", "--size", "64x64")
    assert "(or Stable Diffusion 3's scaling_factor 1.5305, shift_factor 0.0609: the file does not say)" in output


def test_commands_take_a_file(tmp_path: Path) -> None:
    vae("qwen-image").save_pretrained(tmp_path / "folder")
    save_file(written(vae("qwen-image"), layouts.wan21), tmp_path / "file")
    z = latents("qwen-image", frames=1, height=4, width=4)
    latents_file.save(tmp_path / "z.safetensors", z, "qwen-image", scaled=True, fps=1.0)
    for model in ("folder", "file"):
        run("decode", tmp_path / "z.safetensors", "--model", tmp_path / model, "-o", tmp_path / f"{model}.png")
        run("encode", tmp_path / "folder.png", "--model", tmp_path / model, "-o", tmp_path / f"{model}.safetensors")
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "folder.png").read_bytes()
    both = [latents_file.read(tmp_path / f"{model}.safetensors") for model in ("folder", "file")]
    assert torch.equal(*both)
    assert checkpoints.read_alike(tmp_path / "file") == ("qwen-image",)
    sizes = [checkpoints.open_checkpoint(tmp_path / model).nbytes for model in ("folder", "file")]
    assert sizes[0] == sizes[1] == sum(one.nbytes for one in vae("qwen-image").state_dict().values())
    assert torch.equal(
        *(subject_of(tmp_path / model, (64, 64), 1, clips=False).latents for model in ("folder", "file"))
    )
    output = run("plan", "--model", tmp_path / "file", "--size", "64x64", "--num-gpus", "2")
    assert "AutoencoderKLWan, latents 1x16x" in output

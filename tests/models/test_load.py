"""Checkpoints in diffusers layout, whole and broken, and live modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import FAMILIES, latents, reference, vae

import halovae
from halovae.errors import CheckpointError
from halovae.models import load as checkpoints

WEIGHTS = checkpoints.WEIGHTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vae("wan2.1").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def change(folder: Path, **changes: Any) -> None:
    """Rewrite the weights: a tensor replaces or adds a weight, None removes one."""
    state = load_file(folder / WEIGHTS)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / WEIGHTS)


def family_of(decoder: halovae.VAE) -> str:
    sizes = decoder.calls["decode"].sizes
    assert sizes is not None
    return sizes.family


def check(decoder: halovae.VAE, family: str) -> None:
    """Check that it decodes as diffusers does."""
    frames = decoder.decode(latents(family))
    assert frames is not None
    assert (frames - reference(family, latents(family))).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_decodes_as_the_module_it_was_saved_from(tmp_path: Path, family: str) -> None:
    vae(family).save_pretrained(tmp_path)
    decoder = halovae.load(tmp_path, device="cpu")
    assert family_of(decoder) == family
    check(decoder, family)


def test_a_live_modules_weights_are_shared() -> None:
    decoder = halovae.load(vae("wan2.2-5b"))
    assert decoder.module is vae("wan2.2-5b")
    before = [parameter.data_ptr() for parameter in decoder.module.parameters()]
    decoder.decode(latents("wan2.2-5b", frames=1))
    assert [parameter.data_ptr() for parameter in decoder.module.parameters()] == before


def test_weights_follow_a_module_that_is_converted_later() -> None:
    from halovae.models.architectures import random_vae

    module = random_vae("wan2.1", 8)
    decoder = halovae.load(module)
    module.bfloat16()
    assert decoder.dtype == torch.bfloat16


def test_a_pipelines_folder_is_searched_for_its_vae(folder: Path) -> None:
    assert family_of(halovae.load(folder.parent)) == "wan2.1"
    assert family_of(halovae.load(folder.parent, subfolder="vae")) == "wan2.1"
    with pytest.raises(CheckpointError, match="no config.json"):
        halovae.load(folder.parent, subfolder="unet")


def test_weights_get_the_requested_dtype(folder: Path) -> None:
    module = halovae.load(folder, dtype=torch.bfloat16).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [("encoder.", "quant_conv."), ("encoder.",)])
def test_a_folder_with_only_the_decoder_decodes(tmp_path: Path, family: str, dropped: tuple[str, ...]) -> None:
    vae(family).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: tensor for key, tensor in state.items() if not key.startswith(dropped)}, tmp_path / WEIGHTS)
    decoder = halovae.load(tmp_path)
    assert list(decoder.calls) == ["decode"]
    check(decoder, family)
    with pytest.raises(TypeError, match="has no encode, or was loaded without"):
        decoder.encode(torch.zeros(1, 3, 1, 32, 32))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_encoder_a_folder_decodes_and_takes_less(tmp_path: Path, family: str) -> None:
    vae(family).save_pretrained(tmp_path)
    whole, half = halovae.load(tmp_path), halovae.load(tmp_path, encoder=False)
    assert (list(whole.calls), list(half.calls)) == (["decode", "encode"], ["decode"])
    assert sum(one.numel() for one in half.module.parameters()) < sum(one.numel() for one in whole.module.parameters())
    check(half, family)


def test_an_index_of_several_files_is_followed(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {key: file for file, keys in files.items() for key in keys}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert family_of(halovae.load(folder)) == "wan2.1"


def test_a_hub_id_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    requests: list[Any] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        requests.append((repo, allow_patterns))
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert family_of(halovae.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")) == "wan2.1"
    ((repo, patterns),) = requests
    assert repo == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert "vae/config.json" in patterns


def test_a_name_that_is_neither_a_folder_nor_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="neither a directory or file here"):
        halovae.load("no/such/model/anywhere")


def test_missing_unexpected_and_misshapen_weights_are_named(folder: Path) -> None:
    change(
        folder,
        decoder__conv_in__weight=None,
        decoder__conv_in__scale=torch.ones(1),
        decoder__conv_out__bias=torch.ones(7),
    )
    with pytest.raises(CheckpointError) as caught:
        halovae.load(folder)
    message = str(caught.value)
    assert "missing: decoder.conv_in.weight" in message
    assert "unexpected: decoder.conv_in.scale" in message
    assert "wrong shape: decoder.conv_out.bias is [7], not [3]" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [("AutoencoderOobleck", "audio has no plane"), ("AutoencoderUnheardOf", "is no autoencoder of diffusers")],
)
def test_a_class_that_cannot_be_loaded_is_named(folder: Path, name: str, reason: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    with pytest.raises(CheckpointError, match=f"{name}.*{reason}"):
        halovae.load(folder)
    with pytest.raises(CheckpointError, match="Linear"):
        halovae.load(torch.nn.Linear(1, 1))


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: cannot be read as safetensors, is it complete"):
        halovae.load(folder)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_broken_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        halovae.load(folder)


def test_a_config_that_lacks_a_field_names_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["z_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="z_dim"):
        halovae.load(folder)


def test_a_folder_without_weights_says_what_was_expected(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="found none"):
        halovae.load(folder)


def test_weights_in_several_files_beside_their_index_are_loaded(tmp_path: Path) -> None:
    vae("wan2.1").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    z = latents("wan2.1", frames=1)
    found, expected = halovae.load(tmp_path).decode(z), halovae.load(vae("wan2.1")).decode(z)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)

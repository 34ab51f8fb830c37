"""Latents files, ours and from elsewhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halovae.io import latents as latents_file

Z = torch.randn(1, 16, 2, 3, 4)


def test_a_file_keeps_the_tensor_and_what_is_said_of_it(tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    latents_file.save(path, Z.bfloat16(), "wan2.1", scaled=True, fps=23.976)
    header = latents_file.read_header(path)
    assert header.shape == (1, 16, 2, 3, 4)
    assert (header.dtype, header.family, header.scaled, header.fps) == (torch.bfloat16, "wan2.1", True, 23.976)
    assert torch.equal(latents_file.read(path), Z.bfloat16())
    assert [p.name for p in tmp_path.iterdir()] == ["z.safetensors"]


def test_a_file_from_elsewhere_says_nothing(tmp_path: Path) -> None:
    save_file({"samples": Z}, tmp_path / "z.safetensors")
    header = latents_file.read_header(tmp_path / "z.safetensors")
    assert (header.name, header.family, header.scaled, header.fps) == ("samples", None, None, None)
    save_file({"a": Z, "latents": Z + 1}, tmp_path / "z.safetensors")
    assert torch.equal(latents_file.read(tmp_path / "z.safetensors"), Z + 1)


def test_several_unnamed_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": Z, "b": Z.clone()}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="found a, b"):
        latents_file.read_header(tmp_path / "z.safetensors")


@pytest.mark.parametrize(("key", "value"), [("scaled", "maybe"), ("fps", "fast"), ("fps", "-1"), ("fps", "nan")])
def test_metadata_that_make_no_sense_are_named(tmp_path: Path, key: str, value: str) -> None:
    save_file({"latents": Z}, tmp_path / "z.safetensors", {key: value})
    with pytest.raises(ValueError, match=f"{key}='{value}'"):
        latents_file.read_header(tmp_path / "z.safetensors")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    latents_file.save(path, Z, "wan2.1", scaled=False, fps=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="z.safetensors: cannot be read as safetensors, is it complete"):
        latents_file.read(path)

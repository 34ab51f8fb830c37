"""Loading a VAE: finding its files, reading its config, and building its diffusers module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from halovae.errors import CheckpointError
from halovae.models.checkpoint import Checkpoint, check_weights, recognize
from halovae.models.registry import class_named
from halovae.models.wan import WanConfig
from halovae.models.weights import Weights

# diffusers' classes whose sizes `WanConfig` describes.
CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
# Other autoencoders of diffusers that cannot be partitioned, and why.
_NO_PLANE = {
    "AutoencoderOobleck": "audio has no plane of rows and cols",
    "AutoencoderSAME": "audio has no plane of rows and cols",
    "LTX2VideoDiffusionDecoderModel": "it is built on flex_attention",
    "RFD4ProteinaAutoencoder": "proteins have no plane of rows and cols",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENCODER = ("encoder", "quant_conv")  # submodules that only encode


def config_of(config: Mapping[str, Any], source: str) -> WanConfig:
    """Read a diffusers VAE config.

    Raises:
        CheckpointError: the class is another one, or the config lacks a field.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(f"{source}: VAE class {name!r}; expected one of {', '.join(CLASSES)}")
    try:
        return WanConfig.from_diffusers(config)
    except KeyError as error:
        raise CheckpointError(f"{source}: the config of {name} lacks {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a VAE's folder or file, without reading weights.

    Raises:
        CheckpointError: the folder has no readable `config.json` or no weights, or the file is not recognized.
    """
    if path.is_file():
        return recognize(path)
    weights = Weights(_weight_files(path))
    keys = {key: (key, tensor.shape) for key, tensor in weights.stored.items()}
    return Checkpoint(str(path), read_diffusers_config(path), weights, keys)


def read_diffusers_config(path: Path) -> dict[str, Any]:
    """Read the diffusers config of the VAE in a folder or file, without reading its weights.

    Raises:
        CheckpointError: there is no readable `config.json`, or the file is not recognized.
    """
    return recognize(path).config if path.is_file() else read_json(path / "config.json")


def read_config(path: Path) -> WanConfig:
    """Read the sizes of the VAE in a folder or file, without reading its weights.

    Raises:
        CheckpointError: there is no readable `config.json`, or it belongs to an unsupported VAE.
    """
    return config_of(read_diffusers_config(path), _config_source(path))


def read_class(path: Path) -> str:
    """Read the name of the diffusers class of the VAE in a folder or file.

    Raises:
        CheckpointError: there is no readable `config.json`, or the file is not recognized.
    """
    return str(read_diffusers_config(path).get("_class_name"))


def read_alike(path: Path) -> tuple[str, ...]:
    """Return other families that a file may belong to, since files cannot distinguish them; none for a folder.

    Raises:
        CheckpointError: the file is not recognized.
    """
    layout = recognize(path).layout if path.is_file() else None
    return layout.alike if layout is not None else ()


class NoEncoder(nn.Module):
    """Replaces the encoder of an autoencoder that was loaded without it."""


def diffusers_module(path: Path, dtype: torch.dtype, encoder: bool = True) -> nn.Module:
    """Load a VAE of any diffusers class.

    Args:
        path: a folder with `config.json` and `.safetensors` files, or a single file in one of `registry.layouts()`.
        dtype: the dtype of the weights.
        encoder: whether to keep submodules that only encode. Wan's and Qwen-Image's files may lack them.

    Raises:
        CheckpointError: diffusers is not installed, has no autoencoder of this class, or cannot load the files.
    """
    name = read_class(path)
    found = _class_of(path, name)
    if path.is_file() or name in CLASSES:
        return _module_of(open_checkpoint(path), found, dtype, encoder)
    check_indices(path)
    try:
        loads: Any = found
        vae: nn.Module = loads.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: diffusers cannot load this {name} ({error})") from error
    if not encoder:
        _drop_encoder(vae)
    return vae.eval().requires_grad_(False)


def _drop_encoder(vae: nn.Module) -> None:
    for name in _ENCODER:
        if isinstance(getattr(vae, name, None), nn.Module):
            setattr(vae, name, NoEncoder())


def _class_of(path: Path, name: str) -> type[nn.Module]:
    if name in _NO_PLANE or "Audio" in name:
        reason = _NO_PLANE.get(name, "audio has no plane of rows and cols")
        raise CheckpointError(f"{path}: VAE class {name!r} cannot be partitioned: {reason}")
    try:
        found = class_named(name)
    except (ImportError, AttributeError) as error:
        lacks = isinstance(error, ImportError) and error.name == "diffusers"
        reason = "needs pip install 'halovae[diffusers]'" if lacks else f"cannot be imported ({error})"
        raise CheckpointError(f"{path}: VAE class {name!r} {reason}") from error
    if found is None:
        known = f"no autoencoder of diffusers {version('diffusers')}"
        raise CheckpointError(f"{path}: VAE class {name!r} is {known}, and no package registers it")
    return found


def _module_of(checkpoint: Checkpoint, kind: type[nn.Module], dtype: torch.dtype, encoder: bool) -> nn.Module:
    """Build a diffusers module with the weights of a checkpoint."""
    makes: Any = kind
    try:
        with torch.device("meta"):
            module: nn.Module = makes.from_config(checkpoint.config).eval().requires_grad_(False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.source}: no {kind.__name__} has these sizes ({error})") from error
    ours = kind.__name__ in CLASSES
    half = not encoder or (ours and not any(key.startswith("encoder.") for key in checkpoint.keys))
    if half:
        _drop_encoder(module)
    needed = module.state_dict()
    keys = {name: key for name, key in checkpoint.keys.items() if name in needed or not _encodes(name)}
    label = config_of(checkpoint.config, checkpoint.source).family if ours else kind.__name__
    label += " decoder" * half
    check_weights(checkpoint.source, label, {key: tensor.shape for key, tensor in needed.items()}, keys)
    checkpoint.check_dtypes(keys)
    counters = {key: torch.zeros((), dtype=one.dtype) for key, one in needed.items() if not one.is_floating_point()}
    state = counters | {
        name: tensor.to(dtype if needed[name].is_floating_point() else needed[name].dtype, copy=True)
        for name, tensor in checkpoint.read(keys)
    }
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _encodes(name: str) -> bool:
    """Whether a parameter belongs to a submodule that only encodes."""
    return name.partition(".")[0] in _ENCODER


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def find_model(source: str | Path, subfolder: str | None = None) -> Path:
    """Return the folder or the file of a VAE.

    Args:
        source: a file; a directory that holds a VAE, itself or in `vae/`; or a hub id, which is downloaded.
        subfolder: the VAE's folder in the directory or repository; None tries the top and `vae/`.

    Raises:
        CheckpointError: `source` is neither a file, nor a directory with a VAE, nor a hub id that can be fetched.
    """
    root = Path(source)
    if root.is_file():
        if subfolder:
            raise CheckpointError(f"{source}: is a file, so subfolder={subfolder!r} is not in it; expected None")
        return root
    if not root.is_dir():
        root = _download(str(source), subfolder or "vae")
    candidates = [root / subfolder] if subfolder else [root, root / "vae"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{source}: no config.json in {' or '.join(map(str, candidates))}; expected diffusers layout, or a file's path"
    )


def _download(repo: str, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{folder}{name}" for folder in ("", f"{subfolder}/") for name in ("config.json", "*.safetensors*")]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo!r}: neither a directory or file here, nor a model on the hub ({error})"
        ) from error


def check_indices(folder: Path) -> None:
    """Check that the indices of sharded weights in a folder and its subfolders name only files beside them.

    Raises:
        CheckpointError: an index names a file elsewhere, or cannot be read.
    """
    for index in sorted(folder.rglob("*.index.json")):
        weights = read_json(index).get("weight_map", {})
        for name in sorted({str(one) for one in (weights.values() if isinstance(weights, dict) else weights)}):
            if not name or Path(name).name != name:
                raise CheckpointError(f"{index}: weight_map names {name[:80]!r}; expected the name of a file beside it")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        check_indices(folder)
        names = set(read_json(index).get("weight_map", {}).values())
        return [folder / name for name in sorted(names)]
    found = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS in found:
        return [folder / WEIGHTS]
    if len(found) != 1:
        present = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder}: expected {WEIGHTS}, its index, or one .safetensors file; found {present}")
    return found


def _config_source(path: Path) -> str:
    return str(path if path.is_file() else path / "config.json")

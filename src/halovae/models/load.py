"""A VAE's files: where they are, what they hold, and the diffusers module that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from halovae.errors import CheckpointError
from halovae.models.checkpoint import Checkpoint, check_weights, recognize
from halovae.models.wan import WanConfig
from halovae.models.weights import Weights

# diffusers' classes whose sizes `WanConfig` describes.
CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
# Of diffusers' other autoencoders, those that have no plane of rows and cols, or that no rank can share, and why.
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
        CheckpointError: another class, or a config that lacks a field.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(f"{source}: VAE class {name!r}; expected one of {', '.join(CLASSES)}")
    try:
        return WanConfig.from_diffusers(config)
    except KeyError as error:
        raise CheckpointError(f"{source}: the config of {name} lacks {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """What is in a VAE's folder or file, without reading weights.

    Raises:
        CheckpointError: a folder without a readable `config.json` or weights, or a file that is not recognized.
    """
    if path.is_file():
        return recognize(path)
    weights = Weights(_weight_files(path))
    keys = {key: (key, one.shape) for key, one in weights.stored.items()}
    return Checkpoint(str(path), read_diffusers_config(path), weights, keys)


def read_diffusers_config(path: Path) -> dict[str, Any]:
    """The config of the VAE in a folder or file, as diffusers has it, without reading its weights.

    Raises:
        CheckpointError: there is no readable `config.json`, or a file that is not recognized.
    """
    return recognize(path).config if path.is_file() else read_json(path / "config.json")


def read_config(path: Path) -> WanConfig:
    """The sizes of the VAE in a folder or file, without reading its weights.

    Raises:
        CheckpointError: there is no readable `config.json`, or it is not a supported VAE's.
    """
    return config_of(read_diffusers_config(path), _config_source(path))


def read_class(path: Path) -> str:
    """The name of the diffusers class of the VAE in a folder or file.

    Raises:
        CheckpointError: there is no readable `config.json` that names one, or a file that is not recognized.
    """
    return str(read_diffusers_config(path).get("_class_name"))


def read_alike(path: Path) -> tuple[str, ...]:
    """Families that a file may be of as well, because it cannot be told from theirs; of folders, none.

    Raises:
        CheckpointError: a file that is not recognized.
    """
    layout = recognize(path).layout if path.is_file() else None
    return layout.alike if layout is not None else ()


class NoEncoder(nn.Module):
    """Stands for the encoder of an autoencoder that was loaded without it."""


def diffusers_module(path: Path, dtype: torch.dtype, encoder: bool = True) -> nn.Module:
    """Load a VAE of any class by diffusers.

    Args:
        path: a folder with `config.json` and `.safetensors` files, or a single file of a layout in `layouts.LAYOUTS`.
        dtype: what the weights are converted to.
        encoder: whether to keep what only encodes. Wan's and Qwen-Image's files may lack it.

    Raises:
        CheckpointError: diffusers is not installed, has no autoencoder of this class, or cannot load the files.
    """
    name = read_class(path)
    found = _diffusers_class(path, name)
    if path.is_file() or name in CLASSES:
        return _module_of(open_checkpoint(path), found, dtype, encoder)
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


def _diffusers_class(path: Path, name: str) -> type[nn.Module]:
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(f"{path}: VAE class {name!r} needs pip install 'halovae[diffusers]'") from error
    if name in _NO_PLANE or "Audio" in name:
        reason = _NO_PLANE.get(name, "audio has no plane of rows and cols")
        raise CheckpointError(f"{path}: VAE class {name!r} cannot be partitioned: {reason}")
    found: Any = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "decode")):
        raise CheckpointError(f"{path}: VAE class {name!r} is no autoencoder of diffusers {diffusers.__version__}")
    return found


def _module_of(checkpoint: Checkpoint, kind: type[nn.Module], dtype: torch.dtype, encoder: bool) -> nn.Module:
    """A diffusers module with the weights of files."""
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
    check_weights(checkpoint.source, label, {key: one.shape for key, one in needed.items()}, keys)
    checkpoint.check_dtypes(keys)
    counters = {key: torch.zeros((), dtype=one.dtype) for key, one in needed.items() if not one.is_floating_point()}
    state = counters | {
        name: tensor.to(dtype if needed[name].is_floating_point() else needed[name].dtype, copy=True)
        for name, tensor in checkpoint.read(keys)
    }
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _encodes(name: str) -> bool:
    """Whether a parameter is of what only encodes."""
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
    """The folder or the file of a VAE.

    Args:
        source: a file; a directory that is a VAE's or has one as `vae/`; or a hub id, which is downloaded.
        subfolder: where in the directory or the repository the VAE is; None tries the top and `vae/`.

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


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
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

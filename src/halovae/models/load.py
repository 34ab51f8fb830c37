"""Build a decoder, or an encoder, from a live diffusers VAE, a directory in diffusers layout, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from halovae.models.wan import WanConfig, WanDecoder
from halovae.models.wan_encoder import WanEncoder
from halovae.platform import Platform

# Which of diffusers' VAE classes each of our decoders can stand in for.
CLASSES = {"AutoencoderKLWan": WanDecoder, "AutoencoderKLQwenImage": WanDecoder}
# Of diffusers' other autoencoders, those that have no plane of rows and cols, or that no rank can share, and why.
_NO_PLANE = {
    "AutoencoderOobleck": "audio has no plane of rows and cols",
    "AutoencoderSAME": "audio has no plane of rows and cols",
    "LTX2VideoDiffusionDecoderModel": "it is built on flex_attention",
    "RFD4ProteinaAutoencoder": "proteins have no plane of rows and cols",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENCODER = ("encoder.", "quant_conv.")
Half = TypeVar("Half", WanDecoder, WanEncoder)


class CheckpointError(ValueError):
    """A model that cannot be loaded: which file, what is wrong with it, and what would be accepted."""


def config_of(config: Mapping[str, Any], source: str) -> WanConfig:
    """Read a diffusers VAE config.

    Raises:
        CheckpointError: a VAE class that no decoder here stands in for, or a config that lacks a field.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(
            f"{source}: VAE class {name!r} is not supported; supported are {', '.join(sorted(CLASSES))} "
            "(in Python, halovae.load, parallelize and shard take others of diffusers too)"
        )
    try:
        return WanConfig.from_diffusers(config)
    except KeyError as error:
        raise CheckpointError(f"{source}: the config of {name} lacks {error}") from error


def from_module(vae: nn.Module) -> WanDecoder:
    """Build a decoder over a live diffusers VAE.

    The parameters are the same objects. Those of convolutions are laid out anew in memory, one after the other: their
    values stay, and what diffusers makes of them changes by rounding at most.

    Raises:
        CheckpointError: the module's class is not supported.
    """
    return _over(vae, WanDecoder)


def encoder_from_module(vae: nn.Module) -> WanEncoder:
    """Build an encoder over a live diffusers VAE, as `from_module` builds a decoder.

    Raises:
        CheckpointError: the module's class is not supported.
    """
    return _over(vae, WanEncoder)


def _over(vae: nn.Module, half: type[Half]) -> Half:
    name = type(vae).__name__
    config = config_of({**getattr(vae, "config", {}), "_class_name": name}, f"module {name}")
    state = vae.state_dict(keep_vars=True)
    state = {key: state[key] for key in state if key.startswith(_ENCODER) == (half is WanEncoder)}
    with torch.inference_mode(False), torch.no_grad():  # parameters stay ones that can be trained
        for parameter in state.values():
            layout = Platform(parameter.device).layout(parameter.ndim)
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return _filled(half, config, state, name)


def from_directory(folder: Path, dtype: torch.dtype, device: torch.device) -> WanDecoder:
    """Load the decoder's half of a checkpoint in diffusers layout; the encoder's weights are not read.

    Args:
        folder: the VAE's folder, with `config.json` and one `.safetensors` file or an index of several.
        dtype: what the weights are converted to.
        device: where they go.

    Raises:
        CheckpointError: the files are missing, damaged, or not those of a supported VAE.
    """
    config = read_config(folder)
    state = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping: it has keys but cannot be iterated)
                    if not key.startswith(_ENCODER):
                        state[key] = _packed(file.get_tensor(key).to(dtype))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors, is it complete? ({error})") from error
    return _filled(WanDecoder, config, state, str(folder)).requires_grad_(False)


def read_config(folder: Path) -> WanConfig:
    """The sizes of the VAE in a folder, without reading its weights.

    Raises:
        CheckpointError: there is no readable `config.json`, or it is not a supported VAE's.
    """
    path = folder / "config.json"
    return config_of(read_json(path), str(path))


def read_class(folder: Path) -> str:
    """The name of the diffusers class of the VAE in a folder.

    Raises:
        CheckpointError: there is no readable `config.json` that names one.
    """
    return str(read_json(folder / "config.json").get("_class_name"))


def diffusers_module(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a VAE of any class by diffusers.

    Args:
        folder: with `config.json` and `.safetensors` files.
        dtype: what the weights are converted to.

    Raises:
        CheckpointError: diffusers is not installed, has no autoencoder of this class, or cannot load the files.
    """
    name = read_class(folder)
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(f"{folder}: VAE class {name!r} needs pip install 'halovae[diffusers]'") from error
    if name in _NO_PLANE or "Audio" in name:
        reason = _NO_PLANE.get(name, "audio has no plane of rows and cols")
        raise CheckpointError(f"{folder}: VAE class {name!r} cannot be partitioned: {reason}")
    found: Any = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "decode")):
        raise CheckpointError(f"{folder}: VAE class {name!r} is no autoencoder of diffusers {diffusers.__version__}")
    try:
        loads: Any = found
        vae: nn.Module = loads.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: diffusers cannot load this {name} ({error})") from error
    return vae.eval().requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def find_folder(source: str | Path, subfolder: str | None = None) -> Path:
    """The folder of a VAE: `source` itself or its `vae/` if it is a directory, else a download of the hub's `source`.

    Raises:
        CheckpointError: `source` is neither a directory with a VAE nor a hub id that can be fetched.
    """
    root = Path(source)
    if not root.is_dir():
        root = _download(str(source), subfolder or "vae")
    candidates = [root / subfolder] if subfolder else [root, root / "vae"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{source}: no config.json in {' or '.join(map(str, candidates))}; expected diffusers layout")


def _download(repo: str, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{folder}{name}" for folder in ("", f"{subfolder}/") for name in ("config.json", "*.safetensors*")]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{repo!r}: not a directory here, nor a model that the hub gave ({error})") from error


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


def _renamed(key: str) -> str:
    """Our name of a diffusers parameter: `upsamplers.0.resample.1` (Wan2.1) and `upsampler.resample.1` (Wan2.2).

    The encoder's downsamplers likewise.
    """
    return key.replace(".upsamplers.0.", ".upsampler.").replace(".resample.1.", ".")


def _filled(half: type[Half], config: WanConfig, state: Mapping[str, Tensor], source: str) -> Half:
    """A decoder or encoder whose parameters are the tensors of `state`."""
    with torch.device("meta"):
        model = half(config)
    wanted = model.state_dict()
    given = {_renamed(key): (key, tensor) for key, tensor in state.items()}
    missing = [key for key in wanted if key not in given]
    unexpected = [key for name, (key, _) in given.items() if name not in wanted]
    misshapen = [
        f"{key} is {list(tensor.shape)}, not {list(wanted[name].shape)}"
        for name, (key, tensor) in given.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = [
        f"{label}: {_some(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        kind = "decoder" if half is WanDecoder else "encoder"
        raise CheckpointError(f"{source}: not the weights of a {config.family} {kind}; " + "; ".join(problems))
    model.load_state_dict({name: tensor for name, (_, tensor) in given.items()}, assign=True)
    return model


def _packed(weight: Tensor) -> Tensor:
    """A copy in the layout of the activations that it meets; a view would keep the whole file in memory."""
    return weight.clone(memory_format=Platform(weight.device).layout(weight.ndim))


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

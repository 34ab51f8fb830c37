"""Latents files: one tensor in a safetensors file, with metadata that a decoder needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LatentsHeader:
    """The header of a latents file. A field is None if a file that halovae did not write lacks it.

    Attributes:
        name: the tensor's name in the file.
        shape: `[B, C, T, H, W]`, or `[B, C, H, W]` of pictures.
        dtype: as stored; a dtype that is not floating point is reported as int64.
        family: the model family that the latents belong to.
        scaled: True if they are normalized by the model's latents_mean and latents_std, as diffusion models use them.
        fps: frames per second of the clip.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    family: str | None = None
    scaled: bool | None = None
    fps: float | None = None


def save(path: Path, latents: Tensor, family: str, scaled: bool, fps: float) -> None:
    """Write latents `[B, C, T, H, W]`. An existing file is replaced once the new one is complete."""
    metadata = {"format": "halovae.io.latents.1", "family": family, "scaled": str(scaled).lower(), "fps": f"{fps:g}"}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({"latents": latents.contiguous()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(path: Path) -> LatentsHeader:
    """Read the header of a latents file, without the tensor.

    Raises:
        ValueError: the file is missing or damaged, does not hold exactly one tensor, or has invalid metadata.
    """
    with _opened(path) as file:
        names = list(file.keys())
        name = "latents" if "latents" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"{path}: expected one tensor, or one named 'latents'; found {', '.join(names) or 'none'}")
        tensor, metadata = file.get_slice(name), file.metadata() or {}
        dtype = _DTYPES.get(tensor.get_dtype(), torch.int64)
        return LatentsHeader(name, tuple(tensor.get_shape()), dtype, **_described(path, metadata))


def read(path: Path) -> Tensor:
    """Read the latents `[B, C, T, H, W]` of a file. Raises what `read_header` raises."""
    name = read_header(path).name
    with _opened(path) as file:
        latents: Tensor = file.get_tensor(name)
    return latents


def _described(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    scaled, fps = metadata.get("scaled"), metadata.get("fps")
    if scaled not in (None, "true", "false"):
        raise ValueError(f"{path}: metadata scaled={scaled!r}; expected 'true' or 'false'")
    try:
        rate = None if fps is None else float(fps)
    except ValueError:
        rate = math.nan
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"{path}: metadata fps={fps!r}; expected a number above 0")
    return {"family": metadata.get("family"), "scaled": None if scaled is None else scaled == "true", "fps": rate}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors, is it complete? ({error})") from error

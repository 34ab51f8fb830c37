"""Weight files: names, shapes, and dtypes without reading data, and tensors one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halovae.errors import CheckpointError

# The format's dtypes that a VAE's weights may have: https://github.com/huggingface/safetensors.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,  # a counter of BatchNorm
}
_OTHER = torch.uint8  # stands for all other dtypes
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# Keys under which training scripts store the weights.
_NESTED = ("state_dict", "model", "module")


class Weights:
    """Tensors by name, in one file or several.

    Only names, shapes, and dtypes are read at first. Files are mapped into memory, so a tensor only takes memory of its
    own when it is copied.

    Args:
        files: safetensors files, or files of `torch.save` with a mapping of tensors, by itself or as `state_dict` of a
            training checkpoint. The format is recognized by content, not by name.

    Attributes:
        stored: maps names to meta tensors of the stored shape and dtype; uint8 stands for all other dtypes.

    Raises:
        CheckpointError: a file is missing, incomplete, or holds something other than tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.stored: dict[str, Tensor] = {}
        self._where: dict[str, Path] = {}
        self._loaded: dict[Path, Mapping[str, Tensor]] = {}
        for path in files:
            found = self._safetensors(path) if _is_safetensors(path) else self._saved_by_torch(path)
            self.stored |= found
            self._where |= dict.fromkeys(found, path)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors on the CPU as stored. Each is a view of its file if the format allows that.

        Raises:
            CheckpointError: a file cannot be read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name], []).append(name)
        for path, own in by_file.items():
            if path in self._loaded:
                yield from ((name, self._loaded[path][name]) for name in own)
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    for name in own:
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _incomplete(path, error) from error

    @staticmethod
    def _safetensors(path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (has keys, is no mapping)
                return {
                    key: torch.empty(one.get_shape(), dtype=_DTYPES.get(one.get_dtype(), _OTHER), device="meta")
                    for key, one in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise _incomplete(path, error) from error

    def _saved_by_torch(self, path: Path) -> dict[str, Tensor]:
        held = _torch_load(path)
        for name in _NESTED:
            if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
                held = held[name]
        tensors = {}
        if isinstance(held, Mapping):
            tensors = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
        if not tensors:
            raise CheckpointError(
                f"{path}: expected tensors by name, by themselves or in {', '.join(_NESTED)}; found {_found(held)}"
            )
        self._loaded[path] = tensors
        return {
            key: torch.empty(one.shape, dtype=one.dtype if one.dtype in _DTYPES.values() else _OTHER, device="meta")
            for key, one in tensors.items()
        }


def _found(held: Any) -> str:
    return f"a mapping of {some(map(str, held), 3)}" if isinstance(held, Mapping) else type(held).__name__


def dtype_names(tensors: Iterable[Tensor]) -> str:
    """Return the dtypes of tensors as text, most bytes first: `fp16`, or `bf16 and fp32`."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
    ordered = sorted(sizes, key=lambda dtype: -sizes[dtype])
    return " and ".join(short.get(dtype, str(dtype).removeprefix("torch.")) for dtype in ordered)


def some(names: Iterable[str], most: int = 8) -> str:
    """Return the first few of many names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _incomplete(path, error) from error
    return start[8:] == b"{" or not start.startswith((_ZIP, _PICKLE))  # a header in JSON, after 8 bytes with its length


def _torch_load(path: Path) -> Any:
    load: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == _ZIP  # torch's older format cannot be mapped: it is read as a whole
        return torch.load(path, mmap=mapped, **load)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and loading it could run code; save its state_dict as .safetensors "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: torch cannot read it, is it complete? ({reason})") from error


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read as safetensors, is it complete? ({error})")

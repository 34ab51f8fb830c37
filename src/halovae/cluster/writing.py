"""Write latents in the formats that trainers read, and read them back."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from halovae.cluster.encode import DTYPES
from halovae.cluster.journal import Line, Store

# The names of the files of each format.
NAMES = {
    "safetensors": r".*\.\d{5,}\.safetensors",
    "parquet": r"part-[0-9a-f]{16}\.parquet",
    "webdataset": r"part-[0-9a-f]{16}\.tar",
    "mp4": r".*\.\d{5,}\.(mp4|png)",
}
Sample = tuple[Line, dict[str, Tensor]]
COLUMNS = ("read_s", "decode_s", "encode_s")


@dataclass(frozen=True)
class Output:
    """Where and how samples are written.

    Attributes:
        folder: of the dataset.
        format: one of `SUFFIXES`.
        dtype: of the stored latents.
        common: what the metadata says of all samples.
        scaled: whether latents are normalized.
    """

    folder: str
    format: str
    dtype: str
    common: Mapping[str, Any]
    scaled: bool


def write(batch: Mapping[str, Any], output: Output) -> dict[str, Any]:
    """Write the samples of a batch. For Ray Data's `map_batches`.

    Args:
        batch: what `reading.read` made, with `latents` (and `latents_std`) instead of frames, and with `encode_s`.
        output: where and how.

    Returns:
        A column `line`, JSON, with the lines for the journal; and the seconds of each stage.
    """
    begin = time.perf_counter()
    lines: list[Line] = []
    samples: list[Sample] = []
    for index in range(len(batch["item"])):
        row = {key: values[index] for key, values in batch.items()}
        line = {"item": str(row["item"]), "index": int(row["index"]), "last": bool(row["last"])}
        line |= json.loads(row["meta"])
        lines.append(line)
        if row["reason"]:
            line["reason"] = str(row["reason"])
            continue
        tensors = {"latents": _tensor(row["latents"], output.dtype)}
        if "latents_std" in row:
            tensors["std"] = _tensor(row["latents_std"], output.dtype)
        line |= {**output.common, "shape": list(tensors["latents"].shape), "sha256": digest(tensors)}
        samples.append((line, tensors))
    if samples:
        _FORMATS[output.format](Store(output.folder), output, samples)
    share = (time.perf_counter() - begin) / len(lines)
    return {
        "line": [json.dumps(line) for line in lines],
        **{key: [float(one) for one in batch[key]] for key in COLUMNS},
        "write_s": [share] * len(lines),
    }


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DTYPES[dtype])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the bytes of a sample's tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stem(line: Line) -> str:
    """The name of a sample: its input's, and which of its clips it is."""
    return f"{line['name']}.{line['clip']:05d}"


def _latents_file(line: Line, tensors: Mapping[str, Tensor], output: Output) -> bytes:
    """A latents file, as `halovae encode` writes it and `halovae decode` reads it: with a batch of one."""
    known = {key: value if isinstance(value, str) else json.dumps(value) for key, value in line.items()}
    known |= {"format": "halovae.io.latents.1", "scaled": str(output.scaled).lower(), "fps": f"{line['fps']:g}"}
    return save({name: tensor[None].contiguous() for name, tensor in tensors.items()}, known)


def _write_safetensors(store: Store, output: Output, samples: Sequence[Sample]) -> None:
    for line, tensors in samples:
        line["file"] = f"{stem(line)}.safetensors"
        store.write(line["file"], _latents_file(line, tensors, output))


def _shard(samples: Sequence[tuple[Line, Any]], suffix: str) -> str:
    """The name of a file with several samples: equal for the same samples, so that one written again replaces it."""
    names = "\n".join(f"{line['item']}\n{line['index']}" for line, _ in samples)
    return f"part-{hashlib.sha256(names.encode()).hexdigest()[:16]}{suffix}"


def _write_parquet(store: Store, output: Output, samples: Sequence[Sample]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    name = _shard(samples, ".parquet")
    rows = []
    for line, tensors in samples:
        line["file"] = name
        row = {"id": stem(line), **{f"{key}_bytes": _bytes(tensor) for key, tensor in tensors.items()}}
        texts = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in line.items()}
        rows.append({**row, **{key: value for key, value in texts.items() if key not in ("file", "last")}})
    names = dict.fromkeys(key for row in rows for key in row)
    content = io.BytesIO()
    parquet.write_table(pa.table({key: [row.get(key) for row in rows] for key in names}), content)
    store.write(name, content.getvalue())


def _write_tar(store: Store, output: Output, samples: Sequence[Sample]) -> None:
    name, content = _shard(samples, ".tar"), io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for line, tensors in samples:
            line["file"] = name
            folder, base = posixpath.split(stem(line))  # WebDataset's keys end at the first dot of the file's name
            key = posixpath.join(folder, base.replace(".", "_"))
            bodies = {"json": json.dumps(line).encode(), "safetensors": _latents_file(line, tensors, output)}
            if "txt" in line.get("columns", {}):
                bodies["txt"] = line["columns"]["txt"].encode()
            for suffix, body in bodies.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    store.write(name, content.getvalue())


_FORMATS = {"safetensors": _write_safetensors, "parquet": _write_parquet, "webdataset": _write_tar}


def damage(lines: Sequence[Line], folder: str) -> Iterator[tuple[Line, str]]:
    """Read samples of one file back, and say which are not what their lines say, and why."""
    store, name = Store(folder), lines[0]["file"]
    try:
        content, suffix = store.read(name), posixpath.splitext(name)[1]
        if suffix in (".mp4", ".png"):
            (line,) = lines
            if hashlib.sha256(content).hexdigest() != line["sha256"]:
                yield line, f"{name} is not what was written: its checksum differs"
            return
        found = {(line["item"], int(line["index"])): digest(tensors) for line, tensors in read_samples(content, suffix)}
    except Exception as error:  # whatever a damaged file does to those that read it
        yield from ((line, f"{name} cannot be read ({error})") for line in lines)
        return
    for line in lines:
        known = found.get((line["item"], line["index"]))
        if known is None:
            yield line, f"{name} does not hold it"
        elif known != line["sha256"]:
            yield line, f"{name} holds other values: their checksum differs"


def read_samples(content: bytes, suffix: str) -> Iterator[Sample]:
    """Read the samples of a file in one of the formats: what is known of each, and its tensors without a batch.

    Raises:
        ValueError: it is damaged, or has no latents.
    """
    if suffix == ".parquet":
        yield from _read_parquet(content)
    elif suffix == ".tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                body = tar.extractfile(member) if member.name.endswith(".safetensors") else None
                if body is not None:
                    yield from _read_safetensors(body.read())
    else:
        yield from _read_safetensors(content)


def _read_safetensors(content: bytes) -> Iterator[Sample]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    tensors = load(content)
    if "latents" not in tensors:
        raise ValueError(f"holds {', '.join(tensors) or 'nothing'}: expected a tensor 'latents'")
    for index in range(len(tensors["latents"])):
        yield {"index": index, **header}, {name: one[index] for name, one in tensors.items()}


def _read_parquet(content: bytes) -> Iterator[Sample]:
    from pyarrow import parquet

    for row in parquet.read_table(io.BytesIO(content)).to_pylist():
        stored = {key.removesuffix("_bytes"): value for key, value in row.items() if key.endswith("_bytes")}
        line = {key: value for key, value in row.items() if not key.endswith("_bytes")}
        line["scaled"] = str(line.get("normalized", False)).lower()
        yield (
            line,
            {
                key: torch.frombuffer(bytearray(value), dtype=DTYPES[row["dtype"]]).view(row["shape"])
                for key, value in stored.items()
            },
        )

"""Decode a dataset of latents to videos and pictures."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.core import url_to_fs

from halovae.cluster.encode import DTYPES, ragged
from halovae.cluster.journal import Line, Store
from halovae.cluster.reading import Row, inside, numbered, rejected, said
from halovae.cluster.run import Stages
from halovae.cluster.writing import COLUMNS, read_samples, stem
from halovae.device.kinds import Device
from halovae.io import media
from halovae.runtime.vae import load


def decoding(folder: str, decoder: Mapping[str, Any], fps: float | None) -> Stages:
    """The stages of a decode.

    Args:
        folder: where videos go.
        decoder: options of `DecodeRows`.
        fps: frames per second of videos; None for what the latents say, or 16.
    """
    return Stages(read_latents, DecodeRows, decoder, 1, partial(write_media, folder=folder, fps=fps))


def read_latents(batch: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    """Read files of latents. As `reading.read`, with `latents` instead of frames."""
    for path, name, done in zip(batch["path"], batch["name"], batch["done"], strict=True):
        yield from numbered(_samples(str(path), str(name)), str(path), json.loads(done))


def _samples(path: str, name: str) -> Iterator[Row]:
    begin = time.perf_counter()
    nothing = np.zeros((1, 1, 1), np.float32)
    try:
        files, own = url_to_fs(path)
        for number, (line, tensors) in enumerate(read_samples(files.cat_file(own), posixpath.splitext(path)[1])):
            latents = tensors["latents"].float().numpy()
            known = {"clip": int(line["clip"]), "name": inside(line["name"])} if "clip" in line else {}
            sample = stem(known or {"clip": number, "name": name})
            meta = {"source": path, "name": sample, "scaled": line.get("scaled") == "true", "fps": line.get("fps")}
            meta["dims"] = latents.shape  # in Arrow, all have as many dims
            row = {
                "reason": "",
                "meta": json.dumps(meta),
                "latents": latents.reshape(len(latents), -1, latents.shape[-1]),
            }
            yield {**row, "read_s": time.perf_counter() - begin}
            begin = time.perf_counter()
    except Exception as error:
        row = rejected(said(error), {"source": path, "name": name})
        yield {**{key: value for key, value in row.items() if key != "frames"}, "latents": nothing}


class DecodeRows:
    """Decodes rows of `read_latents`.

    Args:
        model: a VAE's folder, file, or hub id.
        dtype: of computation.
        normalized: whether latents are as pipelines have them; None for what each file says.
    """

    def __init__(self, model: str, dtype: str, normalized: bool | None) -> None:
        device = Device.default().torch_device
        self._vae = load(model, dtype=DTYPES[dtype], device=device, encoder=False)
        self._normalized = normalized

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Decode a batch: `frames`, `[T, H, W, 3]`, uint8, instead of latents; `encode_s` are the seconds of each."""
        reasons, frames, seconds = list(map(str, batch["reason"])), [], []
        for index, (text, latents) in enumerate(zip(batch["meta"], batch["latents"], strict=True)):
            begin = time.perf_counter()
            made = np.zeros((1, 1, 1, 3), np.uint8)
            if not reasons[index]:
                meta = json.loads(str(text))
                try:
                    made = self._decoded(np.asarray(latents).reshape(meta["dims"]), meta["scaled"])
                except (ValueError, TypeError) as error:
                    reasons[index] = f"cannot be decoded ({error})"
            frames.append(made)
            seconds.append(time.perf_counter() - begin)
        rows = {key: values for key, values in batch.items() if key != "latents"}
        return {**rows, "reason": reasons, "encode_s": seconds, "frames": ragged(frames)}

    def _decoded(self, latents: np.ndarray, scaled: bool) -> np.ndarray:
        denormalize = scaled if self._normalized is None else self._normalized
        pictures = self._vae.decode(torch.from_numpy(latents.copy())[None], dtype=torch.uint8, denormalize=denormalize)
        assert pictures is not None
        clip = pictures[0] if pictures.ndim == 5 else pictures[0][:, None]
        return clip.permute(1, 2, 3, 0).cpu().numpy()


def write_media(batch: Mapping[str, Any], folder: str, fps: float | None) -> dict[str, Any]:
    """Write clips as mp4, and single frames as png. Returns lines and seconds, as `writing.write`."""
    lines: list[Line] = []
    seconds = []
    for index in range(len(batch["item"])):
        begin = time.perf_counter()
        line: Line = {key: kind(batch[key][index]) for key, kind in (("item", str), ("index", int), ("last", bool))}
        line |= json.loads(batch["meta"][index])
        if reason := str(batch["reason"][index]):
            line["reason"] = reason
        else:
            frames = np.asarray(batch["frames"][index])
            rate = fps or float(line["fps"] or 16)
            content, suffix = _encoded(frames, rate)
            line |= {"frames": len(frames), "fps": rate, "size": [frames.shape[2], frames.shape[1]]}
            line |= {"file": f"{line['name']}{suffix}", "sha256": hashlib.sha256(content).hexdigest()}
            Store(folder).write(line["file"], content)
        lines.append(line)
        seconds.append(time.perf_counter() - begin)
    times = {key: [float(one) for one in batch[key]] for key in COLUMNS}
    return {"line": [json.dumps(line) for line in lines], **times, "write_s": seconds}


def _encoded(frames: np.ndarray, fps: float) -> tuple[bytes, str]:
    suffix = ".png" if len(frames) == 1 else ".mp4"
    with tempfile.TemporaryDirectory(prefix="halovae-") as home:
        path = Path(home, f"made{suffix}")
        sink = media.Sink(path, fps)
        sink.write(torch.from_numpy(frames).permute(3, 0, 1, 2))
        sink.close(whole=True)
        return path.read_bytes(), suffix

"""Datasets for tests, and the stages of a run in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halovae.cluster.encode import EncodeRows, ragged
from halovae.cluster.journal import Line
from halovae.cluster.reading import read
from halovae.cluster.rules import Rules
from halovae.cluster.run import journal_of
from halovae.cluster.sources import Item, listed
from halovae.cluster.writing import Output, write
from halovae.io import media

COMMON = {"family": "wan2.1", "revision": "r", "dtype": "fp32"}


def make_clip(path: Path, frames: int, width: int, height: int, seed: int = 0, fps: float = 16) -> None:
    """Write a clip of a texture that moves."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 4 + 2, width // 4 + 2, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (height + frames, width + frames), mode="bilinear")[0]
    moved = torch.stack([texture[:, at : at + height, at : at + width] for at in range(frames)], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = media.Sink(path, fps)
    sink.write((moved * 255).to(torch.uint8))
    sink.close(whole=True)


def rows_of(source: str, rules: Rules, done: Mapping[str, list[int]] | None = None) -> list[dict[str, Any]]:
    """What `reading.read` makes of a dataset: a dict for each sample or rejection."""
    return [row for item in listed(source).items for row in _read(item, rules, (done or {}).get(item.path, []))]


def _read(item: Item, rules: Rules, done: list[int]) -> Iterator[dict[str, Any]]:
    columns = {"path": [item.path], "name": [item.name], "columns": [json.dumps(dict(item.columns))]}
    for batch in read({**columns, "done": [json.dumps(done)]}, rules):
        yield {key: values[0] for key, values in batch.items()}


def run_here(
    source: str, out: str, rules: Rules, encoder: EncodeRows, stop_after: int | None = None,
    format_: str = "safetensors", dtype: str = "fp32",
) -> int:  # fmt: skip
    """Encode a dataset batch by batch. Returns how many inputs were read.

    Args:
        source: as of `listed`.
        out: the folder for samples.
        rules: how inputs become clips.
        encoder: encodes.
        stop_after: end as a crash would, between a batch's files and its lines, after so many batches.
        format_: of the files.
        dtype: of what is stored.
    """
    output = Output(out, format_, dtype, {**COMMON, "dtype": dtype}, scaled=False)
    settings = {**COMMON, "frames": rules.frames, "format": format_}
    read_now = 0
    with journal_of(out, settings) as journal:
        journal.sweep()
        for number, item in enumerate([one for one in listed(source).items if not journal.is_complete(one.path)]):
            read_now += 1
            rows = list(_read(item, rules, journal.done(item.path)))
            batch: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
            lines = write(encoder({**batch, "frames": ragged(batch["frames"])}), output)["line"]
            if number == stop_after:
                return read_now
            journal.add([json.loads(line) for line in lines])
        journal.sweep()
    return read_now


def lines_of(out: Path, name: str = "manifest.jsonl") -> list[Line]:
    """The lines of a dataset's file."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def pictures_of(path: Path) -> Tensor:
    """A clip as `VAE.encode` takes it, `[1, 3, T, H, W]`, read by another way than the dataset's."""
    return media.read_clip(path)[0][None].float() / 127.5 - 1

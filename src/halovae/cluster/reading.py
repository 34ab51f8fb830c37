"""Read, decode, cut, and scale the files of a dataset: one row for each clip, or for why there is none."""

from __future__ import annotations

import io
import json
import posixpath
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import fsspec
import numpy as np
from fsspec.core import url_to_fs
from PIL import Image, ImageOps

from halovae.cluster.facts import checksum
from halovae.cluster.rules import Bucket, Rejected, Rules, cropped, resampled, scaled
from halovae.cluster.sources import MEDIA, is_local
from halovae.io.media import IMAGES

Row = dict[str, Any]
NOTHING = np.zeros((1, 1, 1, 3), np.uint8)  # instead of frames, which Arrow wants in each row
_ATTEMPTS = 3  # to fetch a file that is elsewhere
_LOST = 0.02  # the share of a video's frames that may be missing; edits and broken counters leave some out


def read(batch: Mapping[str, Sequence[str]], rules: Rules) -> Iterator[Row]:
    """Read files. For Ray Data's `map_batches`.

    Args:
        batch: columns `path`, `name`, `columns` (JSON), and `done` (JSON: the numbers of samples to leave out).
        rules: how files become clips.

    Yields:
        Batches of one row: the sample's `item` (the file), `index` in it, whether it is the `last`, the `reason` if it
        is rejected, `meta` (JSON), `frames`, `[T, H, W, 3]`, uint8, and the seconds of reading and decoding.
    """
    for path, name, columns, done in zip(*(batch[key] for key in ("path", "name", "columns", "done")), strict=True):
        yield from numbered(samples(str(path), str(name), json.loads(columns), rules), str(path), json.loads(done))


def numbered(made: Iterator[Row], path: str, done: Sequence[int]) -> Iterator[Row]:
    """Make batches of one row: number samples, leave out those that are done, and mark the last one.

    A row is held until it is known whether another one follows.
    """
    begin = time.perf_counter()
    before: Row | None = None
    for index, row in enumerate(made):
        if before is not None and before["index"] not in done:
            yield _batch(before)
        now = time.perf_counter()
        before = {"item": path, "index": index, "last": False, **row, "decode_s": now - begin - row["read_s"]}
        begin = time.perf_counter()
    if before is None:
        nothing = rejected("holds no pictures or videos", {"source": path})
        before = {"item": path, "index": 0, "last": False, **nothing, "decode_s": 0.0}
    if before["index"] not in done:
        yield _batch(before | {"last": True})


def _batch(row: Row) -> Row:
    """Columns of one row."""
    return {key: value[None] if isinstance(value, np.ndarray) else [value] for key, value in row.items()}


def rejected(reason: str, meta: Mapping[str, Any]) -> Row:
    """A row that says why there is no sample."""
    return {"reason": reason, "meta": json.dumps(meta), "frames": NOTHING, "read_s": 0.0}


def samples(path: str, name: str, columns: Mapping[str, Any], rules: Rules) -> Iterator[Row]:
    """Read the clips of one file, or of the files in a tar. What cannot be read is a row with the reason."""
    meta = {"source": path, "name": name, "clip": 0, **({"columns": dict(columns)} if columns else {})}
    begin = time.perf_counter()
    try:
        with _fetched(path, rules.max_bytes) as file:
            if open_ := _INSIDE.get(posixpath.splitext(path)[1].lower()):
                yield from _members(open_(file), meta, rules, time.perf_counter() - begin)
            else:
                yield from _media(file, meta, rules, begin)
    except Exception as error:  # whatever is wrong with an input, the others can still be read
        yield rejected(said(error), meta)


def said(error: Exception) -> str:
    """The reason to reject an input that raised an error."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, Rejected) else f"cannot be read ({type(error).__name__}: {text})"


@contextmanager
def _fetched(path: str, most: int) -> Iterator[Path]:
    """A local copy of a file, or the file itself.

    Raises:
        Rejected: it is not there, empty, or too large.
        OSError: it cannot be read.
    """
    files, own = url_to_fs(path)
    if not files.exists(own):
        raise Rejected("there is no such file")
    size = files.size(own)
    if not size or (size > most and posixpath.splitext(path)[1].lower() not in _INSIDE):
        raise Rejected("is empty" if not size else f"has {size:,} bytes, more than {most:,}")
    if is_local(files):
        yield Path(own)
        return
    with tempfile.TemporaryDirectory(prefix="halovae-") as folder:
        copy = Path(folder, posixpath.basename(own))
        for attempt in range(_ATTEMPTS):
            try:
                files.get_file(own, str(copy))
                break
            except OSError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(2**attempt)
        yield copy


@dataclass(frozen=True)
class Member:
    """A video or a picture in a file that holds several.

    Attributes:
        name: its path in the file, or one that is made up.
        content: the bytes.
        columns: what the file says of it, such as a caption.
    """

    name: str
    content: IO[bytes]
    columns: Mapping[str, Any]


def _members(found: Iterator[Member], meta: Mapping[str, Any], rules: Rules, fetching: float) -> Iterator[Row]:
    """Read what is in a file. `fetching`: the seconds that it took to fetch."""
    seen: set[str] = set()
    for member in found:
        name = f"{meta['name']}/{inside(member.name)}"
        own = {**meta, "member": member.name, "name": name, **({"columns": member.columns} if member.columns else {})}
        begin = time.perf_counter() - fetching
        fetching = 0.0
        try:
            if name in seen:
                raise Rejected("its name is there twice")
            seen.add(name)
            with tempfile.NamedTemporaryFile(suffix=posixpath.splitext(member.name)[1]) as copy:
                shutil.copyfileobj(member.content, copy)
                copy.flush()
                yield from _media(Path(copy.name), own, rules, begin)
        except Exception as error:
            yield rejected(said(error), own)


def inside(name: str) -> str:
    """A path that a file gives, without what would lead out of a folder."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _in_tar(path: Path) -> Iterator[Member]:
    """The media in a tar of WebDataset: files of one name and several suffixes belong together."""
    with tarfile.open(path) as tar:
        groups: dict[str, list[tarfile.TarInfo]] = {}
        for member in tar:
            if member.isfile():
                folder, base = posixpath.split(member.name)
                groups.setdefault(posixpath.join(folder, base.partition(".")[0]), []).append(member)
        for members in groups.values():
            texts: dict[str, Any] = {}
            for member in members:
                suffix = posixpath.basename(member.name).partition(".")[2]
                if suffix in ("txt", "json", "cls"):
                    text = _content(tar, member).read().decode(errors="replace")
                    texts[suffix] = json.loads(text) if suffix == "json" else text
            for member in members:
                if member.name.lower().endswith(MEDIA):
                    yield Member(member.name, _content(tar, member), texts)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None
    return content


def _in_arrow(path: Path) -> Iterator[Member]:
    """The media in a file of a folder that Hugging Face's `save_to_disk` wrote: columns of bytes and a path."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        number = 0
        for batch in pa.ipc.open_stream(file):
            for row in batch.to_pylist():
                media = [value for value in row.values() if isinstance(value, dict) and "bytes" in value]
                if not media:
                    raise Rejected(f"has columns {', '.join(row)}: expected one of pictures or videos, with bytes")
                columns = {key: value for key, value in row.items() if isinstance(value, (str, int, float))}
                name = posixpath.basename(media[0].get("path") or "picture.png")
                content = media[0]["bytes"]
                if content is None:
                    with fsspec.open(media[0]["path"], "rb") as other:
                        content = other.read()
                yield Member(f"{number:06d}-{name}", io.BytesIO(content), columns)
                number += 1


_INSIDE = {".tar": _in_tar, ".arrow": _in_arrow}


def _media(path: Path, meta: Mapping[str, Any], rules: Rules, begin: float) -> Iterator[Row]:
    """Read the clips of a picture or a video. `begin` is when it began to be fetched."""
    if path.stat().st_size > rules.max_bytes:
        raise Rejected(f"has {path.stat().st_size:,} bytes, more than {rules.max_bytes:,}")
    with path.open("rb") as file:
        found = {**meta, "source_sha256": checksum(file)}
    seconds = time.perf_counter() - begin
    clips = _picture(path, rules) if path.suffix.lower() in IMAGES else _clips(path, rules)
    clip = 0
    try:
        for frames, own in clips:
            known = {"size": [frames.shape[2], frames.shape[1]], "frames": len(frames)}
            meta = {**found, "clip": clip, **known, **own}
            yield {"reason": "", "meta": json.dumps(meta), "frames": frames, "read_s": seconds}
            clip, seconds = clip + 1, 0.0
    except Exception as error:
        yield rejected(said(error), {**found, "clip": clip})


Clip = tuple[np.ndarray, dict[str, Any]]


def _picture(path: Path, rules: Rules) -> Iterator[Clip]:
    with Image.open(path) as file:
        size = (file.width, file.height)
        picture = ImageOps.exif_transpose(file).convert("RGB")
    bucket = rules.bucket(*picture.size)
    if (lengths := rules.lengths(bucket)) and 1 not in lengths:
        raise Rejected(f"is a picture: clips have {' or '.join(map(str, lengths))} frames")
    wanted = scaled(picture.size, bucket, not rules.buckets)
    if wanted != picture.size:
        picture = picture.resize(wanted, Image.Resampling.BICUBIC)
    yield cropped(np.asarray(picture), bucket)[None], {"fps": 1.0, "source_size": list(size), "start": 0}


def _clips(path: Path, rules: Rules) -> Iterator[Clip]:
    """Decode a video, and yield clips as soon as they are whole."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise Rejected("has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, seen = float(stream.average_rate or stream.guessed_rate or 16), 0
        held: list[np.ndarray] = []
        start = made = 0
        bucket: Bucket | None = None

        def frames() -> Iterator[tuple[Fraction, av.VideoFrame]]:
            nonlocal seen
            first = last = Fraction(0)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise Rejected(f"frame {seen} is damaged")
                at = Fraction(seen) / Fraction(rate).limit_denominator(1001)
                if frame.pts is not None and frame.time_base is not None:
                    at = frame.pts * frame.time_base
                first = at if seen == 0 else first
                last = max(last, at - first)
                seen += 1
                yield last, frame

        size = [0, 0]
        for frame in resampled(frames(), rules.fps):
            if bucket is None:
                size = [frame.width, frame.height]
                turned = round(frame.rotation / 90) % 2
                bucket = rules.bucket(*(size[::-1] if turned else size))
            held.append(_pixels(frame, bucket, rules))
            rules.check(len(held), bucket)
            for length in rules.cut(len(held), bucket, ended=False):
                yield np.stack(held[:length]), {"fps": rules.fps or rate, "source_size": size, "start": start}
                held, start, made = held[length:], start + length, made + 1
                if made == rules.most:
                    return
        if bucket is None:
            raise Rejected("has no frames")
        if seen < stream.frames - max(2, _LOST * stream.frames):
            raise Rejected(f"is truncated: {seen} of {stream.frames} frames are there")
        for length in rules.cut(len(held), bucket, ended=True):
            if made == rules.most:
                return
            yield np.stack(held[:length]), {"fps": rules.fps or rate, "source_size": size, "start": start}
            held, start, made = held[length:], start + length, made + 1
        if not made:
            least = min(rules.lengths(bucket), default=rules.facts.first or rules.facts.temporal)
            raise Rejected(f"has {len(held)} frames, fewer than {least}")


def _pixels(frame: av.VideoFrame, bucket: Bucket, rules: Rules) -> np.ndarray:
    """A frame as it is to be shown, `[H, W, 3]`, in the size of the bucket."""
    turns = round(frame.rotation / 90) % 4
    shown = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    width, height = scaled(shown, bucket, not rules.buckets)
    if turns % 2:
        width, height = height, width
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return cropped(np.rot90(pixels, turns) if turns else pixels, bucket)

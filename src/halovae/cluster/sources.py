"""What a dataset is read from: folders, globs, manifests, tars; local, or wherever fsspec reads."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from halovae.io.media import IMAGES

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
MEDIA = (*VIDEOS, *IMAGES)
MANIFESTS = (".csv", ".parquet", ".jsonl")
PATH_COLUMNS = ("path", "file_name", "file", "video", "image", "video_path", "image_path", "media_path")


@dataclass(frozen=True)
class Item:
    """One file of a dataset: a video, a picture, or a file that holds several.

    Attributes:
        path: where it is; fsspec's URL if it is not local.
        name: the path from the dataset's root, which is unique.
        columns: what else a manifest says of it, such as a caption.
    """

    path: str
    name: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """The files of a dataset.

    Attributes:
        root: what names are relative to.
        items: the files, in the order of their names, or of a manifest.
    """

    root: str
    items: Sequence[Item]


def listed(source: str, column: str | None = None, suffixes: Sequence[str] = (*MEDIA, ".tar")) -> Listing:
    """List a dataset.

    Args:
        source: a folder, all of whose media count, also in subfolders; a folder that Hugging Face's `save_to_disk`
            wrote; a glob; a `.csv`, `.parquet`, or `.jsonl` manifest; a `.tar`; or one file.
        column: of a manifest, which has the paths; None for the first of `PATH_COLUMNS` that there is.
        suffixes: of the files in a folder that count. With `.parquet` in it, such a file is no manifest.

    Raises:
        ValueError: nothing is there, or a manifest has no such column.
    """
    files, path = url_to_fs(source)
    if any(sign in path for sign in "*?["):
        found = [one for one in files.glob(path) if files.isfile(one) and not _is_hidden(one)]
        fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)]
        root = posixpath.dirname(fixed)
    elif files.isdir(path):
        every = files.find(path)
        saved = any(posixpath.basename(one) == "dataset_info.json" for one in every)
        found = [one for one in every if (one.endswith(".arrow") if saved else _counts(one, suffixes))]
        root = path.rstrip("/")
    elif not files.exists(path):
        raise ValueError(f"source {source}: there is no such file or folder")
    elif path.lower().endswith(tuple(one for one in MANIFESTS if one not in suffixes)):
        return _of_manifest(source, files, path, column)
    else:
        found, root = [path], posixpath.dirname(path)
    if not found:
        raise ValueError(f"source {source}: holds no files that end in {', '.join(suffixes)}")
    items = [Item(_url(files, one), _name(one, root), {}) for one in sorted(found)]
    return Listing(_url(files, root), items)


def whole_path(text: str) -> str:
    """A path as it is for processes in other folders, too; or a URL."""
    files, path = url_to_fs(text)
    return _url(files, path)


def _counts(path: str, suffixes: Sequence[str]) -> bool:
    return path.lower().endswith(tuple(suffixes)) and not _is_hidden(path)


def _is_hidden(path: str) -> bool:
    return posixpath.basename(path).startswith(".")


def _url(files: fsspec.AbstractFileSystem, path: str) -> str:
    return path if is_local(files) else str(files.unstrip_protocol(path))


def is_local(files: fsspec.AbstractFileSystem) -> bool:
    """Whether a filesystem is this machine's, with its files under their own paths."""
    protocol = files.protocol if isinstance(files.protocol, str) else files.protocol[0]
    return protocol in ("file", "local")


def _name(path: str, root: str) -> str:
    return path[len(root) :].lstrip("/") if path.startswith(f"{root.rstrip('/')}/") else path.lstrip("/")


def _of_manifest(source: str, files: fsspec.AbstractFileSystem, path: str, column: str | None) -> Listing:
    rows = _rows(source, files, path)
    names = list(rows[0]) if rows else []
    wanted = PATH_COLUMNS if column is None else (column,)
    column = next((name for name in wanted if name in names), None)
    if column is None:
        raise ValueError(
            f"source {source}: columns {', '.join(names) or 'none'}; expected one with paths: {', '.join(wanted)}"
        )
    folder = posixpath.dirname(path)
    paths = [_resolved(str(row[column]), files, folder) for row in rows]
    inside = all(one.startswith(f"{folder}/") for one in paths)
    root = folder if inside else ""
    seen: dict[str, Item] = {}
    for one, row in zip(paths, rows, strict=True):
        url = one if get_protocol(one) != "file" else _url(files, one)
        name = _name(one, root) if inside else one.replace("://", "/").lstrip("/")
        seen.setdefault(name, Item(url, name, {key: value for key, value in row.items() if key != column}))
    return Listing(_url(files, root) if root else "", list(seen.values()))


def _resolved(path: str, files: fsspec.AbstractFileSystem, folder: str) -> str:
    """A path of a manifest, without `..`. Those that are relative start at the manifest's folder."""
    if get_protocol(path) != "file" or path.startswith("file://"):
        other, own = url_to_fs(path)
        return own if type(other) is type(files) else path
    return posixpath.normpath(posixpath.join(folder, path))


def _rows(source: str, files: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    try:
        with files.open(path, "rb") as file:
            if path.lower().endswith(".jsonl"):
                return [dict(json.loads(line)) for line in file if line.strip()]
            if path.lower().endswith(".csv"):
                from pyarrow import csv

                rows: list[dict[str, Any]] = csv.read_csv(file).to_pylist()
            else:
                from pyarrow import parquet

                rows = parquet.read_table(file).to_pylist()
    except Exception as error:  # pyarrow's errors are of many classes
        raise ValueError(f"source {source}: cannot be read as a manifest ({error})") from error
    return rows

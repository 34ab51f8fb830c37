"""What a dataset's folder holds: which samples are done, which inputs are rejected, and how it was made.

A sample counts once `manifest.jsonl` has its line, which is written after the sample's file has its final name. A
process may end between any two steps: what has no line is made again, under the same name.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fsspec.core import url_to_fs

from halovae.cluster.sources import is_local

Line = dict[str, Any]
SETTINGS, MANIFEST, REJECTED = "dataset.json", "manifest.jsonl", "rejected.jsonl"


class Store:
    """A folder, local or where fsspec writes, in which files appear as a whole or not at all.

    Args:
        folder: its path or URL.
    """

    def __init__(self, folder: str) -> None:
        self.files, self.root = url_to_fs(folder)
        self.local = is_local(self.files)

    def path(self, name: str) -> str:
        """The path of a file in the folder."""
        return posixpath.join(self.root, name)

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        content: bytes = self.files.cat_file(self.path(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it. Object stores show an object once it is whole; elsewhere it is renamed.

        Raises:
            OSError: it cannot be written.
        """
        path = self.path(name)
        if not self.local:
            self.files.pipe_file(path, content)
            return
        folder, base = posixpath.split(path)
        os.makedirs(folder, exist_ok=True)
        partial = posixpath.join(folder, f".{base[:200]}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def names(self) -> list[str]:
        """The files, by their paths in the folder."""
        if not self.files.isdir(self.root):
            return []
        return [posixpath.relpath(path, self.root) for path in self.files.find(self.root)]

    def remove(self, name: str) -> None:
        """Remove a file."""
        self.files.rm_file(self.path(name))


class Lines:
    """A file of JSON lines that grows. A line that a crash cut short does not count, and is overwritten.

    Object stores cannot add to an object. There, each time that lines are added makes an object of its own beside the
    others: `manifest.jsonl`, `manifest.00001.jsonl`, and so on.

    Args:
        store: the folder.
        name: of the file, which ends in `.jsonl`.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._parts = store, name, 0

    def __iter__(self) -> Iterator[Line]:
        stem = self._name.removesuffix(".jsonl")
        if self._store.local:
            names = [self._name] if os.path.exists(self._store.path(self._name)) else []
        else:
            names = sorted(map(posixpath.basename, self._store.files.glob(self._store.path(f"{stem}*.jsonl"))))
        self._parts = max([0, *(int(name.split(".")[-2]) + 1 for name in names if name.count(".") == 2)], default=0)
        for name in names:
            content = self._store.read(name)
            whole = content.rfind(b"\n") + 1
            if self._store.local and whole < len(content):
                os.truncate(self._store.path(name), whole)
            for line in content[:whole].splitlines():
                yield json.loads(line)

    def add(self, lines: Sequence[Line]) -> None:
        """Add lines, and wait until the disk has them."""
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        if self._store.local:
            with open(self._store.path(self._name), "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        elif lines:
            self._parts += 1
            self._store.write(f"{self._name.removesuffix('.jsonl')}.{self._parts:05d}.jsonl", content)

    def replace(self, lines: Sequence[Line]) -> None:
        """Have these lines and no others."""
        parts = (
            []
            if self._store.local
            else self._store.files.glob(self._store.path(f"{self._name.removesuffix('.jsonl')}.*.jsonl"))
        )
        self._store.write(self._name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        for part in parts:
            self._store.files.rm_file(part)


class Journal:
    """The lines of a dataset that is being made.

    Args:
        folder: of the dataset; it is made if it is not there.
        settings: how samples are made. Samples of one dataset are made alike.
        pattern: of the names of files with samples. Others that are in the folder are left as they are.

    Attributes:
        samples: how many there are.
        refused: how many inputs, or parts of inputs, are rejected.

    Raises:
        ValueError: the folder has samples that were made otherwise, or holds something else.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], pattern: str) -> None:
        self.store = Store(folder)
        self.manifest, self.rejected = Lines(self.store, MANIFEST), Lines(self.store, REJECTED)
        self._pattern = re.compile(rf"{pattern}|(.*/)?\..*\.[0-9a-f]{{8}}\.partial")
        if self.store.local:
            os.makedirs(self.store.root, exist_ok=True)
        self._check(dict(settings))
        self.read()

    def _check(self, settings: Line) -> None:
        if not self.store.files.exists(self.store.path(SETTINGS)):
            others = [name for name in self.store.names() if not name.startswith(".")]
            if others:
                raise ValueError(f"output {self.store.root} holds files that are of no dataset, such as {others[0]}")
            self.store.write(SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
            return
        before = json.loads(self.store.read(SETTINGS))
        settings = json.loads(json.dumps(settings))
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ValueError(
                    f"output {self.store.root} was made with {key} {before.get(key)!r}, not {settings.get(key)!r}: "
                    "name another folder, or use the same options"
                )

    def read(self) -> None:
        """Read what is there. Of lines about one sample, the first counts."""
        self._done: dict[str, int] = {}  # a bit for each sample of an input: there may be millions of inputs
        self._count: dict[str, int] = {}
        self.samples = self.refused = 0
        for lines in (self.manifest, self.rejected):
            for line in lines:
                self._note(line)

    def _note(self, line: Line) -> bool:
        """Note a line. Returns whether it is about a sample without one."""
        known, bit = self._done.get(line["item"], 0), 1 << line["index"]
        if known & bit:
            return False
        self._done[line["item"]] = known | bit
        if line["last"]:
            self._count[line["item"]] = line["index"] + 1
        self.refused += "reason" in line
        self.samples += "reason" not in line
        return True

    def done(self, item: str) -> list[int]:
        """Which samples of an input have a line, by number in it."""
        known = self._done.get(item, 0)
        return [index for index in range(known.bit_length()) if known >> index & 1]

    def is_complete(self, item: str) -> bool:
        """Whether all samples of an input have a line."""
        return item in self._count and self._done[item] == (1 << self._count[item]) - 1

    def add(self, lines: Sequence[Line]) -> list[Line]:
        """Add lines about samples that have none yet. Returns those."""
        new = [line for line in lines if self._note(line)]
        samples = [line for line in new if "reason" not in line]
        rejected = [line for line in new if "reason" in line]
        if samples:
            self.manifest.add(samples)
        if rejected:
            self.rejected.add(rejected)
        return new

    def sweep(self) -> list[str]:
        """Remove files that a crash left, which no line names. Returns their names."""
        named = {line["file"] for line in self.manifest}
        left = [name for name in self.store.names() if self._pattern.fullmatch(name) and name not in named]
        for name in left:
            self.store.remove(name)
        return left

    def retry_rejected(self) -> None:
        """Forget what was rejected."""
        self.rejected.replace([])
        self.read()

    def drop(self, damaged: Callable[[Line], bool]) -> int:
        """Forget samples, so that they are made again. Returns how many."""
        lines = list(self.manifest)
        kept = [line for line in lines if not damaged(line)]
        self.manifest.replace(kept)
        self.read()
        return len(lines) - len(kept)

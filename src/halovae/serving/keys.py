"""The keys that clients send."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from pathlib import Path

log = logging.getLogger(__name__)
DEFAULT = "default"  # the name of the key of --api-key
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Keys:
    """The keys that clients may send, each with a name. A name may have several keys, so that one can be replaced.

    Only digests of keys are kept. Without a key and a file there are no keys, and everyone may use the server.

    Args:
        key: a key named `default`.
        file: a file with further keys: `NAME KEY` on each line. Blank lines, and lines that start with #, are ignored.

    Raises:
        ValueError: a line holds no valid key. The message names it.
        OSError: the file cannot be read.
    """

    def __init__(self, key: str | None = None, file: Path | None = None) -> None:
        self._key, self._file = key, file
        self._names = self._read()

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, sent: bytes) -> str | None:
        """Return the name of the key that a client sent; None if it is no key.

        The time that this takes says nothing about the keys.
        """
        digest, name = hashlib.sha256(sent).digest(), None
        for known, its_name in self._names.items():
            if hmac.compare_digest(known, digest):
                name = its_name
        return name

    @property
    def names(self) -> set[str]:
        """The names of the keys."""
        return {*self._names.values()}

    def reload(self) -> None:
        """Read the file again. If it cannot be read, the keys stay as they are, and the log says why."""
        try:
            self._names = self._read()
        except (OSError, ValueError) as error:
            log.error("the keys stay as they are: %s", error)
        else:
            log.info("keys were read again: %s", ", ".join(sorted(self.names)))

    def _read(self) -> dict[bytes, str]:
        """Return the names of keys by their digests."""
        names = {} if self._key is None else {_digest(self._key): DEFAULT}
        if self._file is None:
            return names
        lines = 0
        try:
            if self._file.stat().st_mode & stat.S_IROTH:
                log.warning("--api-key-file %s: other users of this machine can read it (chmod 600)", self._file)
            text = self._file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise OSError(f"--api-key-file {self._file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--api-key-file {self._file}: expected text in UTF-8") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            lines += 1
            where = f"--api-key-file {self._file}, line {number}"
            name, *rest = line.split()
            if len(rest) != 1:
                raise ValueError(f"{where}: expected NAME KEY, got {len(rest) + 1} word(s)")
            if not _NAME.fullmatch(name):
                raise ValueError(f"{where}: expected a name of up to 64 letters, digits, '.', '_', and '-'")
            if not rest[0].isprintable():
                raise ValueError(f"{where}: the key of {name} has characters that cannot be sent")
            if (digest := _digest(rest[0])) in names:
                raise ValueError(f"{where}: the key of {name} is given twice (first for {names[digest]})")
            names[digest] = name
        if not lines:
            raise ValueError(f"--api-key-file {self._file}: expected NAME KEY on each line, got no key")
        return names


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

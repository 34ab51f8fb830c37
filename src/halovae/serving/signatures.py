"""URLs of results that work without a key until they expire."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Request

_SECRET = 32  # bytes
_CONTENT = re.compile(r"/v1/(images|videos)/[^/]+/content")


class Signed(NamedTuple):
    """For whom a URL was signed."""

    owner: str | None


class Signatures:
    """Signs paths of results with a secret of this server. Whoever deletes the secret's file ends all signed URLs.

    Args:
        folder: the folder of the secret. It is made at the first start; only its user can read it.
    """

    def __init__(self, folder: Path) -> None:
        self._secret = _secret(folder / ".url-secret")

    def signed(self, path_and_query: str, owner: str | None, seconds: float) -> str:
        """Return the path and query of a result with a signature that holds for some seconds.

        Args:
            path_and_query: without the server's root path.
            owner: the job's owner. The URL stops working when no key has this name. It does not show the name.
            seconds: how long the signature holds.
        """
        url = urlsplit(path_and_query)
        query = [*parse_qsl(url.query), ("expires", str(int(time.time() + seconds)))]
        return f"{url.path}?{urlencode([*query, ('signature', self._signature(url.path, query, owner))])}"

    def signed_for(self, request: Request, owners: Iterable[str | None]) -> Signed | None:
        """Return for which of these owners this server signed the request's URL.

        None if the request is not for a result, or its URL was signed for nobody of them, was changed, or has expired.
        """
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        query = request.query_params.multi_items()
        if request.method not in ("GET", "HEAD") or not _CONTENT.fullmatch(path) or not query:
            return None
        *signed, (name, signature) = query
        if name != "signature":
            return None
        given = signature.encode(errors="replace")
        for owner in owners:
            if hmac.compare_digest(self._signature(path, signed, owner).encode(), given):
                return Signed(owner) if time.time() < int(dict(signed)["expires"]) else None
        return None

    def _signature(self, path: str, query: list[tuple[str, str]], owner: str | None) -> str:
        data = f"{owner or ''}\n{path}?{urlencode(query, errors='replace')}".encode()  # no owner has line breaks
        return hmac.new(self._secret, data, hashlib.sha256).hexdigest()


def _secret(path: Path) -> bytes:
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        kept = b""
    if len(kept) == _SECRET:
        return kept
    path.unlink(missing_ok=True)
    made = secrets.token_bytes(_SECRET)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(made)
    return made

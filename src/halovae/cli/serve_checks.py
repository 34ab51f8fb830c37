"""Checks and parsers of options of `halovae serve`."""

from __future__ import annotations

import base64
import ipaddress
import logging
import os
import re
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from halovae.cli.common import parse_size
from halovae.grid import Grid

if TYPE_CHECKING:
    from halovae.cli.serve_options import ServeOptions
    from halovae.serving.settings import Webhook

log = logging.getLogger(__name__)
KEY = "HALOVAE_API_KEY"
WEBHOOK_SECRET = "HALOVAE_WEBHOOK_SECRET"
_SECRET_PREFIX, _SECRET_BYTES = "whsec_", (24, 64)  # as Standard Webhooks has them


def key_of(options: ServeOptions) -> str | None:
    """Return the key of --api-key; None for none.

    Raises:
        ValueError: the key is blank or cannot be sent, or is missing where others could reach the server, or is given
            with --no-auth.
    """
    value = os.environ.get(KEY) if options.api_key is None else options.api_key  # typer takes a blank variable for none
    key = None if value is None else value.strip()
    if key is not None and not (key and key.isprintable()):
        raise ValueError(f"--api-key (or {KEY}) is blank, or has characters that cannot be sent")
    if options.no_auth and not (key is None and options.api_key_file is None):
        raise ValueError(f"--no-auth, but also a key (--api-key-file, --api-key, or {KEY}): omit one")
    if key is None and options.api_key_file is None and not (options.no_auth or _is_loopback(options.host)):
        give = f"give --api-key-file, --api-key or {KEY}, or --no-auth"
        raise ValueError(f"--host {options.host}: others could reach the server; {give}")
    return key


def webhook_of(url: str | None, file: Path | None) -> Webhook | None:
    """Return where events go, with the secret of a file or of the environment; None if they go nowhere.

    Raises:
        ValueError: one of the two is missing, given twice, or cannot be used. The message never shows the secret.
        OSError: the file cannot be read.
    """
    from halovae.serving.settings import Webhook

    variable = os.environ.get(WEBHOOK_SECRET)
    if file is not None and variable is not None:
        raise ValueError(f"--webhook-secret-file {file}, but also {WEBHOOK_SECRET}: omit one")
    source = WEBHOOK_SECRET if file is None else f"--webhook-secret-file {file}"
    text = variable if file is None else _read_secret(file)
    if url is None:
        if text is not None:
            raise ValueError(f"{source} without --webhook-url: give both or neither")
        return None
    _check_webhook_url(url)
    if text is None:
        raise ValueError(f"--webhook-url without a secret: give {WEBHOOK_SECRET} or --webhook-secret-file")
    return Webhook(url, _parse_secret(text.strip(), source))


def _read_secret(file: Path) -> str:
    try:
        if file.stat().st_mode & stat.S_IROTH:
            log.warning("--webhook-secret-file %s: other users of this machine can read it (chmod 600)", file)
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"--webhook-secret-file {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--webhook-secret-file {file}: expected text in UTF-8") from error


def _parse_secret(text: str, source: str) -> bytes:
    least, most = _SECRET_BYTES
    expected = f"expected {_SECRET_PREFIX} and {least} to {most} bytes in base64, as of `openssl rand -base64 32`"
    if not text:
        raise ValueError(f"{source} is blank: {expected}")
    if not text.startswith(_SECRET_PREFIX):
        raise ValueError(f"{source} does not begin with {_SECRET_PREFIX}: {expected}")
    try:
        secret = base64.b64decode(text.removeprefix(_SECRET_PREFIX).encode(), validate=True)
    except ValueError as error:
        raise ValueError(f"{source} is not in base64: {expected}") from error
    if not least <= len(secret) <= most:
        raise ValueError(f"{source} has {len(secret)} bytes: {expected}")
    return secret


def _check_webhook_url(url: str) -> None:
    import httpx

    wrong = ValueError(f"--webhook-url {url[:200]}: expected a URL such as https://example.com/events")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise wrong from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.fragment:
        raise wrong
    if parsed.userinfo:
        raise ValueError("--webhook-url: expected no user or password, which `ps` would show")


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    if certificate is None:
        if key is not None:
            raise ValueError(f"--ssl-keyfile {key}: expected also --ssl-certfile")
        return
    try:
        # A key that needs a password is refused: the server must start without a person.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        given = f"--ssl-certfile {certificate}" + (f" --ssl-keyfile {key}" if key else "")
        raise ValueError(f"{given}: cannot be used ({error})") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(item for item in map(str.strip, (text or "").split(",")) if item)


def parse_hosts(text: str) -> tuple[str, ...]:
    names = tuple(name.lower() for name in _list(text))
    for name in names:
        if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*", name):
            raise ValueError(
                f"{name[:80]!r}: expected names without scheme and port, such as example.com or *.example.com"
            )
    return names


def parse_origins(text: str) -> tuple[str, ...]:
    origins = tuple(origin.rstrip("/").lower() for origin in _list(text))  # as browsers send them
    for origin in origins:
        split = urlsplit(origin)
        whole = origin == f"{split.scheme}://{split.netloc}" and split.scheme in ("http", "https")
        if origin != "*" and (not whole or "*" in origin):
            raise ValueError("expected origins such as https://example.com, separated by commas")
    return origins


def parse_root(text: str) -> str:
    root = text.rstrip("/")
    if root and not root.startswith("/"):
        raise ValueError("expected a path that begins with /")
    return root


def parse_grid(text: str) -> Grid:
    rows, cols = parse_size(text)
    return Grid(rows=rows, cols=cols)


def parse_warmup(text: str) -> tuple[int, int, int]:
    size, frames = text.rsplit("x", 1) if text.count("x") == 2 else (text, "1")
    if not frames.isdigit() or int(frames) < 1:
        raise ValueError("expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES")
    return *parse_size(size), int(frames)


def parse_replicas(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if not (least.isdigit() and (most.isdigit() or not colon)) or int(least) < 1 or int(most or least) < int(least):
        raise ValueError("expected a number of 1 or more, such as 2, or LEAST:MOST, such as 1:8")
    return int(least), int(most or least)

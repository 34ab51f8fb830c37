"""Fetches URLs that clients send, on the public internet only, so that they do not reach the server's own network."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import anyio.to_thread
import httpx

from halovae.serving.errors import ApiError

_HOPS = 3
_TIMEOUT = 15.0


async def fetch(url: str, most: int, param: str) -> bytes:
    """Return the content of an http or https URL, of at most `most` bytes.

    Each hop's host name is resolved once, and the connection goes to the address that was checked.

    Raises:
        ApiError: the address is not public, the content cannot be fetched, or it is too large.
    """
    async with httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False) as client:
        for _ in range(_HOPS):
            host, address = await _public(url, param)
            target = httpx.URL(url).copy_with(host=address)
            headers = {"Host": urlsplit(url).netloc.rpartition("@")[2]}
            try:
                async with client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers.get("location", ""))
                        continue
                    answer.raise_for_status()
                    data = b""
                    async for piece in answer.aiter_bytes():
                        data += piece
                        if len(data) > most:
                            raise ApiError(400, f"{param}: more than {most} bytes", param)
                    return data
            except httpx.HTTPError as error:
                raise ApiError(400, f"{param}: cannot be fetched ({type(error).__name__})", param) from error
    raise ApiError(400, f"{param}: more than {_HOPS} redirects", param)


async def _public(url: str, param: str) -> tuple[str, str]:
    """Return the host of a URL and its address. All addresses of the host must be on the public internet."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ApiError(400, f"{param}: expected an http or https URL", param)
    try:
        resolved = await anyio.to_thread.run_sync(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise ApiError(400, f"{param}: no such host", param) from error
    addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in resolved]
    for address in addresses:
        plain = getattr(address, "ipv4_mapped", None) or address
        if not plain.is_global or plain.is_multicast:
            raise ApiError(400, f"{param}: not an address on the public internet", param)
    return host, str(addresses[0])

"""Fetches URLs that clients send, on the public internet only, so that they do not reach the server's own network."""

from __future__ import annotations

import socket
import ssl
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import anyio.to_thread
import httpx
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from halovae.serving.errors import ApiError

_HOPS = 3
_SECONDS = 30.0  # for all hops together
_LOOKUP_SECONDS = 5.0  # for a host's addresses
_AT_ONCE = 4  # fetches; others wait
_PORTS = (None, 80, 443)
_HEADERS = {"Accept": "image/png, image/jpeg, image/webp", "Accept-Encoding": "identity"}
_fetching: RunVar[CapacityLimiter | None] = RunVar("halovae fetches")

# IPv6 networks whose addresses lead to the IPv4 address in their last four bytes.
_EMBEDDING = [IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "64:ff9b::/96")]
_UNICAST = IPv6Network("2000::/3")  # what IANA assigns public IPv6 addresses from
_REFUSED = [
    ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's host agent
        "192.0.0.0/24",  # protocols of the IETF, and Oracle's metadata
        "192.88.99.0/24",  # relays of 6to4
        "3fff::/20",  # documentation
    )
]


async def fetch(url: str, most: int, param: str) -> bytes:
    """Return the content of an http or https URL, of at most `most` bytes.

    Each hop's host name is resolved once, and the connection goes to the address that was checked. All failures to
    connect give the same error, so that it does not tell what listens where.

    Raises:
        ApiError: the address is not public, the content cannot be fetched in time, or it is too large.
    """
    slots = _fetching.get(None)
    if slots is None:
        slots = CapacityLimiter(_AT_ONCE)
        _fetching.set(slots)
    with anyio.move_on_after(_SECONDS) as waiting:
        await slots.acquire()
    if waiting.cancelled_caught:
        message = f"{_AT_ONCE} other URLs are being fetched: try again"
        raise ApiError(503, message, param, "busy", {"Retry-After": "10"})
    try:
        with anyio.fail_after(_SECONDS):
            return await _fetched(url, most, param)
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:  # TimeoutError is an OSError
        message = f"{param}: cannot be fetched within {_SECONDS:g} s"
        raise ApiError(400, message, param, "invalid_value") from error
    finally:
        slots.release()


async def _fetched(url: str, most: int, param: str) -> bytes:
    certificates = await anyio.to_thread.run_sync(_certificates)
    async with httpx.AsyncClient(verify=certificates, trust_env=False, timeout=_SECONDS) as client:
        for _ in range(_HOPS):
            target = _parsed(url, param)
            host = target.raw_host.decode("ascii")
            to = target.copy_with(host=str(await _public(host, param)))
            headers = {**_HEADERS, "Host": target.netloc.decode("ascii")}
            async with client.stream("GET", to, headers=headers, extensions={"sni_hostname": host}) as answer:
                if answer.has_redirect_location:
                    url = str(target.join(answer.headers["location"]))
                    continue
                if answer.status_code != 200:
                    message = f"{param}: its server answered with the status {answer.status_code}, expected 200"
                    raise ApiError(400, message, param, "invalid_value")
                if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                    message = f"{param}: its content is compressed for the transfer (Content-Encoding), expected as is"
                    raise ApiError(400, message, param, "invalid_value")
                return await _content(answer, most, param)
    raise ApiError(400, f"{param}: more than {_HOPS - 1} redirects", param, "invalid_value")


async def _content(answer: httpx.Response, most: int, param: str) -> bytes:
    content = bytearray()
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > most:
            raise ApiError(400, f"{param}: more than {most} bytes", param, "invalid_value")
    return bytes(content)


@lru_cache(1)
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _parsed(url: str, param: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        valid = parsed.scheme in ("http", "https") and parsed.host and parsed.port in _PORTS and not parsed.userinfo
    except (httpx.InvalidURL, ValueError) as error:
        raise ApiError(400, f"{param}: expected an http or https URL", param, "invalid_value") from error
    if not valid:
        message = f"{param}: expected an http or https URL of the port 80 or 443, without a user"
        raise ApiError(400, message, param, "invalid_value")
    return parsed


async def _public(host: str, param: str) -> IPv4Address | IPv6Address:
    """Return an address of a host. All of its addresses must be on the public internet."""
    refused = ApiError(400, f"{param}: expected a host on the public internet", param, "invalid_value")
    try:
        with anyio.fail_after(_LOOKUP_SECONDS):
            found = await anyio.to_thread.run_sync(_addresses, host, abandon_on_cancel=True)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError, UnicodeError a ValueError
        raise refused from error
    if not found or not all(map(is_public, found)):
        raise refused
    return found[0]


def _addresses(host: str) -> list[IPv4Address | IPv6Address]:
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [ip_address(str(info[4][0]).partition("%")[0]) for info in infos]


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is on the public internet.

    An IPv6 address that leads to an IPv4 address (mapped, compatible, NAT64, or 6to4) is as public as that one. Other
    IPv6 addresses outside the range that IANA assigns from, and Teredo's, are not.
    """
    if isinstance(address, IPv6Address):
        if any(address in network for network in _EMBEDDING):
            return is_public(IPv4Address(address.packed[-4:]))
        if address.teredo is not None or address not in _UNICAST:
            return False
        if address.sixtofour is not None:
            return is_public(address.sixtofour)
    elsewhere = address.is_multicast or any(address in network for network in _REFUSED)
    return address.is_global and not elsewhere

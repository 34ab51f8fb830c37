"""What requests pass before they reach a route: their host, their origin, their method, the time that a body takes."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halovae.serving.errors import ApiError, short
from halovae.serving.settings import FrontSettings

PIECE, BODY = 60.0, 600.0  # seconds until the next byte of a body, and until its last
_PROBES = ("/livez", "/readyz")
_READING = ("GET", "HEAD", "OPTIONS")


class HostGuard:
    """Refuses requests that call the server by a name that is not its own, and changes from pages of other origins.

    Without keys, this keeps pages in a user's browser from using a server that only the user can reach: a page can
    point a name of its own to the server's address (DNS rebinding), or send it a form (CSRF). With keys, pages lack
    the key. Then only names are checked, and only if some are given.

    Args:
        app: what requests reach.
        host: the address that the server listens on.
        front: the front's settings.
        has_keys: whether clients must send a key.
    """

    def __init__(self, app: ASGIApp, host: str, front: FrontSettings, has_keys: bool) -> None:
        self._app, self._host, self._has_keys = app, host, has_keys
        self._trusted = tuple(name.lower() for name in front.trusted_hosts)
        self._origins = {origin.lower() for origin in front.cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(scope)):
            await refused.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> ApiError | None:
        if (
            scope["path"].removeprefix(scope.get("root_path", "")) in _PROBES
        ):  # they tell nothing, and know addresses only
            return None
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name(f"//{host}")
        if host and not self._serves(name):  # HTTP/1.0 may have none; browsers send it
            shown = short(ascii(host))
            message = f"Host {shown}: this server is not called so (--trusted-hosts would allow it)"
            return ApiError(421, message, "Host", "unknown_host")
        origin = headers.get("origin")
        if self._has_keys or origin is None or scope["method"] in _READING or origin.lower() in self._origins:
            return None
        split = urlsplit(origin) if _name(origin) else None
        if split is None or split.netloc.lower() != host.lower():
            message = f"Origin {short(ascii(origin))}: pages of other origins may not change anything (--cors-origins)"
            return ApiError(403, message, "Origin", "foreign_origin")
        return None

    def _serves(self, name: str) -> bool:
        if any(_matches(name, trusted) for trusted in self._trusted):
            return True
        if self._has_keys:
            return not self._trusted
        if name in ("localhost", self._host.lower()) or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # On all addresses, the server cannot know its own. A page cannot use an address as its name.
        return address.is_loopback or self._host in ("", "0.0.0.0", "::")


def _name(url: str) -> str:
    """Return the host of a URL in lower case; an empty string if it has none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _matches(name: str, trusted: str) -> bool:
    return trusted == "*" or name == trusted or (trusted.startswith("*.") and name.endswith(trusted[1:]))


class Heads:
    """Answers HEAD as GET, without the body. What makes the body is cancelled."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        as_get = {**scope, "method": "GET"}

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.start" and not cancelling.cancel_called:
                scope.update({name: as_get[name] for name in ("route", "path_params") if name in as_get})  # for the log
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                cancelling.cancel()

        with anyio.CancelScope() as cancelling:
            await self._app(as_get, receive, without_body)


class BodyDeadline:
    """Refuses bodies that take too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        until, complete = anyio.current_time() + BODY, False

        async def in_time() -> Message:
            nonlocal complete
            if complete:  # what follows tells that the client has left
                return await receive()
            seconds = min(PIECE, until - anyio.current_time())
            with anyio.move_on_after(seconds):
                message = await receive()
                complete = not message.get("more_body", False)
                return message
            text = f"the body stopped for {PIECE:g} s, or took more than {BODY:g} s"
            raise ApiError(408, text, code="body_timeout", headers={"Connection": "close"})

        await self._app(scope, in_time, send)

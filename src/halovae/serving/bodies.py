"""How large a request's body may be, and how much memory all of them may take."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halovae.serving.errors import ApiError


class _Memory:
    """Bytes that requests hold together, of which there may be `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0


class Held:
    """The bytes that one request holds: its body, then the pictures in it.

    The only request that holds any is never refused, so that no request is refused for good.
    """

    def __init__(self, memory: _Memory) -> None:
        self._memory, self._own = memory, 0

    def check(self, count: int) -> None:
        """Check that this request may hold `count` more bytes.

        Raises:
            ApiError: all requests together would hold too much.
        """
        memory = self._memory
        if count > 0 and memory.taken > self._own and memory.taken + count > memory.most:
            message = f"other requests take {memory.taken} of {memory.most} bytes (--max-body-memory): try again"
            raise ApiError(503, message, code="busy", headers={"Retry-After": "5"})

    def add(self, count: int) -> None:
        """Hold `count` more bytes, or less if it is negative.

        Raises:
            ApiError: all requests together would hold too much.
        """
        self.check(count)
        self._own += count
        self._memory.taken += count

    def release(self) -> None:
        """Hold nothing any more."""
        self._memory.taken -= self._own
        self._own = 0


def held_by(request: Request) -> Held:
    """Return what a request holds."""
    held: Held = request.state.held
    return held


class BodyLimit:
    """Refuses bodies of more than `most` bytes, and those that would take more than `most_together` with others.

    It refuses them at once if their length is declared. A request holds its bytes until it releases them or ends.
    """

    def __init__(self, app: ASGIApp, most: int, most_together: int) -> None:
        self._app, self._most, self._memory = app, most, _Memory(most_together)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body has more than {self._most} bytes (--max-body)", code="body_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self._most:
            await too_large.response()(scope, receive, send)
            return
        held = scope.setdefault("state", {})["held"] = Held(self._memory)
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            piece = len(message.get("body", b""))
            size += piece
            if size > self._most:
                raise too_large
            held.add(piece)
            return message

        try:
            held.check(int(declared))
        except ApiError as busy:
            await busy.response()(scope, receive, send)
            return
        try:
            await self._app(scope, counted, send)
        finally:
            held.release()

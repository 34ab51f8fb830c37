"""What every route depends on: the dispatcher, the front's settings, and whether the caller may use them."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request

from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.settings import FrontSettings


def dispatcher_of(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def front_of(request: Request) -> FrontSettings:
    front: FrontSettings = request.app.state.front
    return front


async def authorized(request: Request) -> str | None:
    """Return the name of the caller's key; None without keys.

    Raises:
        ApiError: the key is missing or wrong.
    """
    key = front_of(request).api_key
    if key is None:
        return None
    sent = request.headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer ")
    if not hmac.compare_digest(sent, key.encode()):
        raise ApiError(401, "the key is missing or wrong: send 'Authorization: Bearer KEY'", code="invalid_api_key")
    return "default"


Dispatching = Annotated[Dispatcher, Depends(dispatcher_of)]
Front = Annotated[FrontSettings, Depends(front_of)]
Caller = Annotated[str | None, Depends(authorized)]

"""What every route depends on: the dispatcher, the front's settings, and whether the caller may use them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from halovae.serving.dispatch import Dispatcher
from halovae.serving.errors import ApiError
from halovae.serving.keys import Keys
from halovae.serving.rates import Rates
from halovae.serving.settings import FrontSettings
from halovae.serving.signatures import Signatures

_BEARER = HTTPBearer(auto_error=False, description="A key of this server. Without keys, it is ignored.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


def dispatcher_of(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def front_of(request: Request) -> FrontSettings:
    front: FrontSettings = request.app.state.front
    return front


async def key_name(request: Request, bearer: Bearer) -> str | None:
    """Return the name of the key that the request holds; None if it holds no valid key."""
    keys: Keys = request.app.state.keys
    # Starlette decodes headers as Latin-1; keys are UTF-8.
    name = None if bearer is None else keys.name_of(bearer.credentials.encode("latin-1"))
    if name is not None:
        request.state.caller = name  # for the log
    return name


async def authorized(request: Request, name: Annotated[str | None, Depends(key_name)]) -> str | None:
    """Return the name of the caller's key; None without keys. A signed URL counts as the key of the job's owner.

    Raises:
        ApiError: the key is missing or wrong.
    """
    keys: Keys = request.app.state.keys
    if not keys:
        return None
    if name is not None:
        return name
    signatures: Signatures = request.app.state.signatures
    if signed := signatures.signed_for(request, (None, *keys.names)):
        request.state.caller = signed.owner
        return signed.owner
    sent = "wrong" if "authorization" in request.headers else "missing"
    message = f"the key is {sent}: send 'Authorization: Bearer KEY'"
    raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


Dispatching = Annotated[Dispatcher, Depends(dispatcher_of)]
Front = Annotated[FrontSettings, Depends(front_of)]
Caller = Annotated[str | None, Depends(authorized)]


async def rated(request: Request, response: Response, caller: Caller) -> None:
    """Count a submission of the caller, and say in the response how many are left.

    Raises:
        ApiError: the caller has submitted too much.
    """
    rates: Rates | None = request.app.state.rates
    if rates is not None:
        response.headers.update(rates.take(caller, request.client.host if request.client else ""))

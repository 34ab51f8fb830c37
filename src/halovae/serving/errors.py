"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: says what would be accepted.
        param: the field of the request that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        """The answer."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, self.headers)


def from_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """What a field's check says, for the first field that is wrong."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param, "unknown_parameter")
    given = "" if first["type"] == "missing" else f" (got {_short(first.get('input'))})"
    return ApiError(400, f"{param}: {first['msg']}{given}" if param else str(first["msg"]), param, "invalid_value")


def from_database(error: sqlite3.OperationalError) -> ApiError:
    """What a client is told when the jobs cannot be read or written: nothing was changed."""
    if "full" in str(error):
        return ApiError(507, "the disk is full: jobs cannot be kept", code="disk_full")
    message = f"the jobs cannot be reached at the moment ({error}): try again"
    return ApiError(503, message, code="database_unavailable", headers={"Retry-After": "2"})


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def install(app: FastAPI) -> None:
    """Let all errors of an app have the shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(sqlite3.OperationalError)
    async def database(request: Request, error: sqlite3.OperationalError) -> JSONResponse:
        return from_database(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger(__name__).error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed to answer; its log says why", code="internal_error").response()

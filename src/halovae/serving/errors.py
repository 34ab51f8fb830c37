"""Errors in the format that OpenAI's clients read."""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

_MOST_SHOWN = 60  # characters of a value
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    A 5xx without `Retry-After` tells clients not to retry: OpenAI's client would, twice.

    Args:
        status: HTTP status.
        message: what is wrong, and what would be accepted.
        param: the request field that is wrong.
        code: error code for programs.
        headers: HTTP headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        kind, headers = _TYPES.get(self.status, "invalid_request_error"), dict(self.headers or {})
        if self.status >= 500:
            kind = "server_error"
            if "Retry-After" not in headers:
                headers["x-should-retry"] = "false"
        param = None if self.param is None else short(self.param)
        body = {"message": _encodable(self.message), "type": kind, "param": param, "code": self.code}
        return JSONResponse({"error": body}, self.status, headers)


def from_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """Return the error for the first field that failed validation."""
    errors = error.errors(include_url=False) if isinstance(error, ValidationError) else error.errors()
    first = errors[0]
    path = [str(name) for name in first["loc"] if name not in ("body", "query", "path")]
    param = ".".join(path) or None
    got = "" if first["type"] == "missing" else f" (got {_shown(first.get('input'))})"
    return ApiError(400, f"{param}: {first['msg']}{got}" if param else str(first["msg"]), param, "invalid_value")


def from_database(error: sqlite3.OperationalError) -> ApiError:
    """Return the error for jobs that cannot be read or written. Nothing was changed."""
    if "full" in str(error):
        return ApiError(507, "the disk is full: jobs cannot be stored", code="disk_full")
    message = f"the jobs cannot be reached at the moment ({error}): try again"
    return ApiError(503, message, code="database_unavailable", headers={"Retry-After": "2"})


def unknown_field(name: str) -> ApiError:
    """Return the error for a field that the request does not have."""
    return ApiError(400, f"unknown field {short(ascii(name))}", name, "unknown_parameter")


def short(text: str) -> str:
    """Return the start of a text, without what UTF-8 cannot encode."""
    return _encodable(text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}...")


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()  # lone surrogates


def _shown(value: Any) -> str:
    """Return a value from a request as an error shows it. Lists and objects may be long and deep."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return short(ascii(value[:_MOST_SHOWN] if isinstance(value, str) else value))


def install(app: FastAPI) -> None:
    """Make an app answer with `ApiError.response` for all errors."""

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
        path = ascii(request.url.path)  # control characters would reach the terminal
        logging.getLogger(__name__).error("%s %s failed", request.method, path, exc_info=error)
        return ApiError(500, "the server failed to answer; its log says why", code="internal_error").response()

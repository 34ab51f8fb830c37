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

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

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
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, self.headers)


def from_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """Return the error for the first field that failed validation."""
    first = error.errors()[0]
    path = [str(name) for name in first["loc"] if name not in ("body", "query", "path")]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param, "unknown_parameter")
    got = "" if first["type"] == "missing" else f" (got {_short(first.get('input'))})"
    return ApiError(400, f"{param}: {first['msg']}{got}" if param else str(first["msg"]), param, "invalid_value")


def from_database(error: sqlite3.OperationalError) -> ApiError:
    """Return the error for jobs that cannot be read or written. Nothing was changed."""
    if "full" in str(error):
        return ApiError(507, "the disk is full: jobs cannot be stored", code="disk_full")
    message = f"the jobs cannot be reached at the moment ({error}): try again"
    return ApiError(503, message, code="database_unavailable", headers={"Retry-After": "2"})


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        logging.getLogger(__name__).error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed to answer; its log says why", code="internal_error").response()

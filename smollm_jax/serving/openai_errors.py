"""Errors in OpenAI's format, and the end of work whose client has left."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from smollm_jax.serving.jobs import ModelGone
from smollm_jax.serving.limits import QueueFull

Body = dict[str, Any]  # of a response
T = TypeVar("T")


def error_body(status: int, message: str) -> Body:
    """Return the JSON of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Build an error in OpenAI's format."""
    printable = message.encode(errors="backslashreplace").decode()  # the message may quote a lone surrogate
    return JSONResponse(error_body(status, printable), status_code=status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer errors in OpenAI's format."""

    async def explain(_: Request, error: Any) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:])
            if first["type"] == "json_invalid" or not where:
                return error_response(400, f"the body must be a JSON object: {first['msg'][:200]}")
            return error_response(400, f"{where[:100]}: {first['msg'][:200]}")
        if isinstance(error, StarletteHTTPException):  # the base class of FastAPI's own
            return error_response(error.status_code, str(error.detail))
        if isinstance(error, QueueFull):
            return error_response(429, str(error), {"Retry-After": "2"})
        status = 400 if isinstance(error, ValueError) else 503 if isinstance(error, ModelGone) else 500
        return error_response(status, str(error).replace("max_new_tokens", "max_tokens"))  # OpenAI's name

    for kind in (StarletteHTTPException, RequestValidationError, ValueError, QueueFull, RuntimeError):
        app.exception_handler(kind)(explain)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, or cancel it if the client disconnects first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left, working = asyncio.ensure_future(disconnected()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({left, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HTTPException(499, "the client disconnected")
    finally:
        left.cancel()
        working.cancel()
        await asyncio.wait({left, working})

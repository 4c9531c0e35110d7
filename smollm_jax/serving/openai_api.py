"""OpenAI-compatible routes over a `Scheduler`: /v1/models, /v1/completions and /v1/chat/completions.

Clients written for OpenAI's API work unchanged. Features that this server lacks (several choices, log
probabilities, tools) are refused in OpenAI's error format, never ignored. A client that disconnects cancels its
request. Only this file knows OpenAI's field names. The file knows nothing of the page.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, FailFast, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException

from smollm_jax.runtime.errors import UserError, require
from smollm_jax.serving.completion import TextChunk
from smollm_jax.serving.jobs import ModelGone
from smollm_jax.serving.limits import QueueFull, checked_stops
from smollm_jax.serving.scheduler import Scheduler
from smollm_jax.tokenizer.tokenizer import SpecialTokens

DEFAULT_TOKENS = 128
MOST_MESSAGES = 200
SAMPLING_FIELDS = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
FINISH = {"eos": "stop", "stop string": "stop", "cancelled": "stop", "length": "length", "context": "length"}
Body = dict[str, Any]  # of a response
Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]  # [] or {}
T = TypeVar("T")


class Lenient(BaseModel):
    """A model for which null is the same as no value, as in OpenAI's schema."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Strict(Lenient, extra="forbid"):
    """A model that refuses unknown fields."""


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    type: Literal["text"]


class BaseRequest(Strict):
    """The fields of both kinds of request.

    Lists are `Any` and checked by hand, because pydantic makes an error per wrong item and member of a union.
    """

    model: str | None = None
    max_tokens: Any = None
    temperature: Any = Field(1.0, description="0 (the likeliest token) to 2")
    top_p: Any = 1.0
    top_k: Any = Field(0, description="extension: keep the k likeliest tokens; 0: all")
    min_p: Any = Field(0.0, description="extension: keep tokens this likely relative to the likeliest")
    repetition_penalty: Any = Field(1.0, description="extension: above 1 makes repetition rarer")
    special_tokens: SpecialTokens | None = Field(None, description="extension: parse makes ids of those in a text")
    seed: Any = Field(None, description="the same seed gives the same text; default: random")
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Nothing | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    metadata: Nothing | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


class CompletionRequest(BaseRequest):
    prompt: Any
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    suffix: Literal[""] | None = None


class Message(Lenient):
    role: Literal["system", "user", "assistant"]
    content: Any

    def as_turn(self) -> dict[str, str]:
        """Return the turn of a text, or of a list of texts. Raises `UserError` for other content."""
        parts = [{"text": self.content}] if isinstance(self.content, str) else self.content
        require(isinstance(parts, list), "the content of a message must be a text or a list of texts")
        for part in parts:
            said = {k for k, v in part.items() if v is not None} if isinstance(part, dict) else set()
            is_text = {"text"} <= said <= {"type", "text"} and part.get("type") in (None, "text")
            require(is_text and isinstance(part["text"], str), "only parts of type text are read in a message")
        return {"role": self.role, "content": "".join(part["text"] for part in parts)}


class ChatRequest(BaseRequest):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Any = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools both mean none
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"]] | None = None


class Routes:
    """The route handlers of one scheduler and the public name of its model."""

    def __init__(self, scheduler: Scheduler, model: str):
        self.scheduler, self.model = scheduler, model
        self._created = int(time.time())

    async def models(self) -> Body:
        """List the model."""
        card = {"id": self.model, "object": "model", "created": self._created, "owned_by": "smollm-jax"}
        return {"object": "list", "data": [card | {"context_length": self.scheduler.completer.context}]}

    async def completions(self, asked: CompletionRequest, request: Request) -> Any:
        """Continue a prompt, which is a text or token ids."""
        match asked.prompt:
            case str(text) | [str(text)]:
                work = self.scheduler.in_turn(self.scheduler.encode, text, asked.special_tokens)
                ids = await unless_disconnected(request, work)
            case list(prompt):
                # a bool is an int to isinstance
                require({*map(type, prompt)} <= {int}, "send one prompt per request, a text or its token ids")
                ids = self.scheduler.completer.checked(prompt)
            case _:
                raise UserError("prompt must be a text or a list of token ids")
        return await self._answer(ids, asked, asked.max_tokens, request)

    async def chat_completions(self, asked: ChatRequest, request: Request) -> Any:
        """Write the assistant's next turn under the model's chat template."""
        messages = [message.as_turn() for message in asked.messages]
        work = self.scheduler.in_turn(self.scheduler.encode_chat, messages, asked.special_tokens, chat=True)
        ids = await unless_disconnected(request, work)
        longest = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        return await self._answer(ids, asked, longest, request, chat=True)

    async def no_chat(self) -> Any:
        """Refuse a chat with a model that has no chat template."""
        raise HTTPException(404, f"{self.model!r} has no chat template; its texts are at /v1/completions")

    async def _answer(
        self, ids: list[int], asked: BaseRequest, longest: Any, request: Request, *, chat: bool = False
    ) -> Any:
        if asked.model not in (None, "", self.model):
            raise HTTPException(404, f"model {asked.model!r:.100} is not served here; use {self.model!r}")
        longest = min(DEFAULT_TOKENS, self.scheduler.max_new_tokens) if longest is None else longest
        sampling = self.scheduler.sampling(max_new_tokens=longest, **asked.model_dump(include=SAMPLING_FIELDS))
        client = request.client.host if request.client else ""
        chunks = self.scheduler.stream(ids, sampling, checked_stops(asked.stop or None), client=client)
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}
        head["object"] = f"{kind}.chunk" if chat and asked.stream else kind
        if not asked.stream:
            return await unless_disconnected(request, _whole(head, chat, chunks))
        # wait for the first chunk before sending status 200, so that an error has its own status
        first = await unless_disconnected(request, anext(chunks))
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return StreamingResponse(_events(head, chat, first, chunks, with_usage), media_type="text/event-stream")


async def _whole(head: Body, chat: bool, chunks: AsyncGenerator[TextChunk, None]) -> Body:
    async with contextlib.aclosing(chunks):
        parts = [chunk async for chunk in chunks]
    text, last = "".join(chunk.text for chunk in parts), parts[-1]
    written = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return head | {"choices": [_choice(written, last.reason)], "usage": _usage(last)}


async def _events(
    head: Body, chat: bool, first: TextChunk, chunks: AsyncGenerator[TextChunk, None], with_usage: bool
) -> AsyncGenerator[str, None]:
    def event(data: Body) -> str:
        return f"data: {json.dumps(data)}\n\n"

    def event_of(chunk: TextChunk, **role: str) -> str:
        written = {"delta": role | {"content": chunk.text}} if chat else {"text": chunk.text}
        return event(head | {"choices": [_choice(written, chunk.reason)]})

    async with contextlib.aclosing(chunks):
        chunk = first
        yield event_of(chunk, role="assistant")
        try:
            async for chunk in chunks:
                yield event_of(chunk)
        except (RuntimeError, ValueError) as error:
            yield event(_error(500, str(error)))
            return
        if with_usage:
            yield event(head | {"choices": [], "usage": _usage(chunk)})
        yield "data: [DONE]\n\n"


def _choice(written: Body, reason: str | None) -> Body:
    return {"index": 0, **written, "logprobs": None, "finish_reason": reason and FINISH[reason]}


def _usage(last: TextChunk) -> dict[str, int]:
    total = last.prompt_tokens + last.tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}


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


def _error(status: int, message: str) -> Body:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Build an error in OpenAI's format."""
    printable = message.encode(errors="backslashreplace").decode()  # the message may quote a lone surrogate
    return JSONResponse(_error(status, printable), status_code=status, headers=headers)


def add_routes(app: FastAPI, scheduler: Scheduler, *, model: str, api_key: str | None) -> None:
    """Add the routes and OpenAI's error format to `app`. With a key, every route requires the key."""

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    routes, router = Routes(scheduler, model), APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    router.get("/models")(routes.models)
    router.post("/completions")(routes.completions)
    router.post("/chat/completions")(routes.chat_completions if scheduler.has_chat else routes.no_chat)
    app.include_router(router)

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

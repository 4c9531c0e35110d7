"""OpenAI-compatible routes over a `Scheduler`: /v1/models, /v1/completions and /v1/chat/completions.

Clients written for OpenAI's API work as they are; what this server does not do (several choices, log
probabilities, tools) is refused in their format, never ignored. A client that leaves takes its request with it.
Only this file knows of OpenAI's field names, and it knows nothing of the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from smollm_jax.runtime.errors import require
from smollm_jax.serving.completion import TextChunk
from smollm_jax.serving.scheduler import LONGEST_PROMPT, QueueFull, Scheduler, check_text
from smollm_jax.tokenizer.chat_template import chat_prompt

LARGEST_BODY = 4 * 2**20  # bytes: a prompt that is only too long for the model still gets an answer in words
DEFAULT_TOKENS = 128
MOST_MESSAGES = 200
FINISH = {"eos": "stop", "stop string": "stop", "cancelled": "stop", "length": "length", "context": "length"}
T = TypeVar("T")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request have in common; a field that is not here is refused."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: Any = None
    temperature: Any = Field(1.0, description="0 (the likeliest token) to 2")
    top_p: Any = 1.0
    top_k: Any = Field(0, description="not OpenAI's: keep the k likeliest, 0 keeps all")
    min_p: Any = Field(0.0, description="not OpenAI's: keep tokens this likely relative to the likeliest")
    repetition_penalty: Any = Field(1.0, description="not OpenAI's: above 1 makes repetition rarer")
    seed: Any = Field(None, description="the same seed gives the same text; drawn where none is given")
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None


class CompletionRequest(_Asked):
    prompt: str | list[str] | list[int]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Asked):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Any = None
    logprobs: Literal[False] | None = None


class ResponseFormat:
    """How a text is wrapped: as a completion or as a chat, whole or in pieces."""

    def __init__(self, *, chat: bool, model: str):
        self.chat = chat
        self._kind = "chat.completion" if chat else "text_completion"
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, last: TextChunk) -> dict[str, Any]:
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": FINISH[last.reason or "cancelled"]}
        return {**self._common, "object": self._kind, "choices": [choice], "usage": usage(last)}

    def part(self, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        body: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": reason and FINISH[reason]}
        return {**self._common, "object": self._part_kind, "choices": [choice]}

    def usage_part(self, last: TextChunk) -> dict[str, Any]:
        return {**self._common, "object": self._part_kind, "choices": [], "usage": usage(last)}

    @property
    def _part_kind(self) -> str:
        return f"{self._kind}.chunk" if self.chat else self._kind


def usage(last: TextChunk) -> dict[str, int]:
    total = last.prompt_tokens + last.tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}


class Routes:
    """The handlers, over one worker and the name that its model goes by."""

    def __init__(self, worker: Scheduler, model: str):
        self.worker, self.model = worker, model
        self._created = int(time.time())

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        card = {"id": self.model, "object": "model", "created": self._created, "owned_by": "smollm-jax"}
        return {"object": "list", "data": [card | {"context_length": self.worker.completer.context}]}

    async def completions(self, asked: CompletionRequest, request: Request) -> Any:
        """Continue a prompt: text, or token ids."""
        prompt: Any = asked.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, list):
            require(all(isinstance(i, int) for i in prompt), "one prompt a request; several came")
            return await self._answer(self.worker.fitting(prompt), asked, asked.max_tokens, request)
        ids = await asyncio.to_thread(self.worker.prompt, prompt)
        return await self._answer(ids, asked, asked.max_tokens, request)

    async def chat_completions(self, asked: ChatRequest, request: Request) -> Any:
        """The assistant's next turn, under the model's chat template."""
        messages = [message.plain() for message in asked.messages]
        ids = await asyncio.to_thread(conversation, self.worker, messages)
        longest = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        return await self._answer(ids, asked, longest, request, chat=True)

    async def _answer(
        self, ids: list[int], asked: _Asked, longest: Any, request: Request, *, chat: bool = False
    ) -> Any:
        if asked.model not in (None, self.model):
            raise HTTPException(
                404, f"there is no model {asked.model!r:.100} here; this server has {self.model!r}"
            )
        default = min(DEFAULT_TOKENS, self.worker.max_new_tokens)
        sampling = self.worker.sampling(
            max_new_tokens=default if longest is None else longest, temperature=asked.temperature,
            top_p=asked.top_p, top_k=asked.top_k, min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty, seed=asked.seed,
        )  # fmt: skip
        form = ResponseFormat(chat=chat, model=self.model)
        pieces = self.worker.pieces(ids, sampling, self.worker.stop_strings(asked.stop))
        if not asked.stream:
            return await unless_gone(request, _whole(form, pieces))
        # the first piece comes before the status is sent: a refusal is a refusal, not a broken stream
        first = await unless_gone(request, anext(pieces))
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return StreamingResponse(_events(form, first, pieces, with_usage), media_type="text/event-stream")


def conversation(worker: Scheduler, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation under the template; raises `ValueError` for what is too long or no text."""
    for message in messages:
        check_text(message["content"], "a message")
    length = sum(len(message["content"]) for message in messages)
    require(length <= LONGEST_PROMPT, f"the messages have {length:,} characters; {LONGEST_PROMPT:,} are the most")
    return worker.fitting(chat_prompt(worker.completer.tokenizer, messages))


async def _whole(form: ResponseFormat, pieces: AsyncGenerator[TextChunk, None]) -> dict[str, Any]:
    text = []
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            text.append(piece.text)
    return form.whole("".join(text), piece)


async def _events(
    form: ResponseFormat, first: TextChunk, pieces: AsyncGenerator[TextChunk, None], with_usage: bool
) -> AsyncGenerator[str, None]:
    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"

    async with contextlib.aclosing(pieces):
        piece = first
        yield event(form.part(piece.text, piece.reason, first=True))
        try:
            async for piece in pieces:
                yield event(form.part(piece.text, piece.reason, first=False))
        except (RuntimeError, ValueError) as error:
            yield event(_error(500, str(error)))
            return
        if with_usage:
            yield event(form.usage_part(piece))
        yield "data: [DONE]\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client leaves before that."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left, working = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({left, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HTTPException(499, "the client left")
    finally:
        left.cancel()
        working.cancel()
        await asyncio.wait({left, working})


def _error(status: int, message: str) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def add_routes(app: FastAPI, worker: Scheduler, *, model: str, api_key: str | None) -> None:
    """Put the routes and OpenAI's way to report errors on `app`; with a key, every route asks for it."""

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    routes, router = Routes(worker, model), APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    router.get("/models")(routes.models)
    router.post("/completions")(routes.completions)
    if worker.completer.tokenizer.chat_template:
        router.post("/chat/completions")(routes.chat_completions)
    app.include_router(router)

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        printable = message.encode(errors="backslashreplace").decode()  # it may quote half a character
        return JSONResponse(_error(status, printable), status_code=status, headers=headers)

    @app.exception_handler(StarletteHTTPException)  # FastAPI's own are of that kind too
    async def known(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def misshapen(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return answer(400, f"{where[:100]}: {first['msg'][:200]}")

    @app.exception_handler(ValueError)
    async def mistaken(_: Request, error: ValueError) -> JSONResponse:
        return answer(400, str(error).replace("max_new_tokens", "max_tokens"))  # their name for it

    @app.exception_handler(QueueFull)
    async def busy(_: Request, error: QueueFull) -> JSONResponse:
        return answer(429, str(error), {"Retry-After": "2"})

    @app.exception_handler(RuntimeError)
    async def failed(_: Request, error: RuntimeError) -> JSONResponse:
        return answer(500, str(error))


class BodyLimit:
    """ASGI middleware that answers 413 to a body above `LARGEST_BODY` bytes, announced or not."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > LARGEST_BODY:
            response = JSONResponse(_error(413, f"the body may have {LARGEST_BODY:,} bytes"), status_code=413)
            return await response(scope, receive, send)
        read = 0

        async def counted() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > LARGEST_BODY:
                return {"type": "http.disconnect"}
            return message

        return await self.app(scope, counted, send)

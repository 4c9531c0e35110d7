"""Request models and response bodies of OpenAI's API; only this file and the routes know its field names."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smollm_jax.serving.completion import TextChunk

MOST_MESSAGES = 200
FINISH = {"eos": "stop", "stop string": "stop", "cancelled": "stop", "length": "length", "context": "length"}


class Strict(BaseModel):
    """A model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool = False


class BaseRequest(Strict):
    """The fields of both kinds of request."""

    model: str | None = None
    max_tokens: Any = None
    temperature: Any = Field(1.0, description="0 (the likeliest token) to 2")
    top_p: Any = 1.0
    top_k: Any = Field(0, description="extension: keep the k likeliest tokens; 0: all")
    min_p: Any = Field(0.0, description="extension: keep tokens this likely relative to the likeliest")
    repetition_penalty: Any = Field(1.0, description="extension: above 1 makes repetition rarer")
    seed: Any = Field(None, description="the same seed gives the same text; default: random")
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None


class CompletionRequest(BaseRequest):
    prompt: str | list[str] | list[int]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def as_turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(BaseRequest):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Any = None
    logprobs: Literal[False] | None = None


class ResponseFormat:
    """Wraps a text as a completion or a chat, whole or in chunks."""

    def __init__(self, *, chat: bool, model: str):
        self.chat, name = chat, "chatcmpl" if chat else "cmpl"
        common = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._whole = common | {"object": "chat.completion" if chat else "text_completion"}
        self._chunk = common | {"object": "chat.completion.chunk" if chat else "text_completion"}

    def whole(self, text: str, last: TextChunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = _choice({"message": message} if self.chat else {"text": text}, last.reason)
        return self._whole | {"choices": [choice], "usage": usage(last)}

    def chunk(self, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        return self._chunk | {"choices": [_choice({"delta": delta} if self.chat else {"text": text}, reason)]}

    def usage_chunk(self, last: TextChunk) -> dict[str, Any]:
        return self._chunk | {"choices": [], "usage": usage(last)}


def _choice(body: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **body, "logprobs": None, "finish_reason": reason and FINISH[reason]}


def usage(last: TextChunk) -> dict[str, int]:
    total = last.prompt_tokens + last.tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}

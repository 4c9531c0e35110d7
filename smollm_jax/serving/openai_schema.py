"""The fields of requests to OpenAI's routes. What this server lacks is refused by name, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, model_validator

from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.tokenizer import SpecialTokens

MOST_MESSAGES = 200
SAMPLING_FIELDS = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "ignore_eos", "seed",
}  # fmt: skip
Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]  # [] or {}


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
    presence_penalty: Any = Field(0.0, description="off the score of a token that was generated before")
    frequency_penalty: Any = Field(0.0, description="off the score of a token, per time it was generated before")
    logit_bias: Any = Field(None, description="token ids, and what is added to their scores")
    ignore_eos: bool = Field(False, description="extension: an end-of-text token ends nothing")
    special_tokens: SpecialTokens | None = Field(None, description="extension: parse makes ids of those in a text")
    seed: Any = Field(None, description="the same seed gives the same text; default: random")
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Any = Field(1, description="texts per prompt, the i-th with seed + i")
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    metadata: Nothing | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


class CompletionRequest(BaseRequest):
    prompt: Any
    best_of: Any = None
    echo: bool = False
    logprobs: Any = Field(None, description="the likeliest tokens to tell beside each token, 0 to 5")
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
    logprobs: bool = False
    top_logprobs: Any = 0
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools both mean none
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"]] | None = None


class TokenizeRequest(Strict):
    prompt: Any
    model: str | None = None
    add_special_tokens: bool = Field(True, description="add what the tokenizer puts around a text")
    special_tokens: SpecialTokens = Field("parse", description="extension: what special tokens in a text become")


class DetokenizeRequest(Strict):
    tokens: Any
    model: str | None = None

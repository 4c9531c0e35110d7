"""Gradio handlers over a `Scheduler`: a growing text and a status line for the page and for /generate.

Gradio calls handlers with positional arguments and closes them when a visitor leaves. They check nothing, since
a request can bypass the page: the scheduler checks, and its errors are shown. This file knows no layout.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import gradio as gr

from smollm_jax.runtime.errors import require
from smollm_jax.serving.completion import TextChunk
from smollm_jax.serving.scheduler import QueueFull, Scheduler

UNDO_DEPTH = 20
REASONS = {
    "eos": "the model ended the text",
    "length": "length reached",
    "context": "the context of the model is full",
    "stop string": "stop string reached",
    "cancelled": "stopped by you",
}
Turn = dict[str, str]  # role and content
Numbers = tuple[Any, ...]  # temperature, top-p, top-k, repetition penalty, length, seed: as on the page
Growth = AsyncGenerator[tuple[Any, ...], None]
NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turn expected errors into messages that the page and Gradio's clients show."""
    try:
        yield
    except (ValueError, QueueFull, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def status_line(chunk: TextChunk, seed: int) -> str:
    """Format tokens, speed, seed and the reason of the end."""
    first, rest = chunk.seconds_to_first or 0.0, max(chunk.tokens - 1, 0)
    spent = chunk.seconds - first
    parts = [f"**{chunk.tokens:,} tokens**"]
    if rest and spent > 0:
        parts.append(f"{rest / spent:,.1f} tokens/s")
    reason = REASONS[chunk.reason] if chunk.reason else "writing…"
    parts += [f"first after {first:.2f} s", f"seed `{seed}`", reason]
    return " · ".join(parts)


class Handlers:
    """The handlers of the page and of /generate."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    async def grow(self, ids: list[int], numbers: Numbers, request: gr.Request) -> Growth:
        """Yield the continuation so far and the status line until the text ends or `stop` is called."""
        named = dict(zip(NAMES, numbers, strict=True))
        sampling = self.scheduler.sampling(**named | {"seed": _seed(named["seed"])})
        text, waiting = "", self.scheduler.waiting
        yield text, f"waiting, {waiting} before you…" if waiting else "reading the prompt…"
        async with contextlib.aclosing(self.scheduler.stream(ids, sampling, owner=request.session_hash)) as chunks:
            async for chunk in chunks:
                # no page can show a NUL, and no prompt may hold one
                text += chunk.text.replace("\0", "")
                yield text, status_line(chunk, sampling.seed)

    async def write(self, text: str, history: list[str], request: gr.Request, *numbers: Any) -> Growth:
        """Continue the text of the notebook and add the text before it to the history."""
        history = [*history, text][-UNDO_DEPTH:]
        with shown_errors():
            ids = await asyncio.to_thread(self.scheduler.encode, text)
            async with contextlib.aclosing(self.grow(ids, numbers, request)) as growing:
                async for grown, line in growing:
                    yield text + grown, line, history

    async def again(self, _: str, history: list[str], request: gr.Request, *numbers: Any) -> Growth:
        """Undo the last continuation and write another."""
        with shown_errors():
            require(bool(history), "there is nothing to write again; press Continue first")
        async with contextlib.aclosing(self.write(history[-1], history[:-1], request, *numbers)) as growing:
            async for step in growing:
                yield step

    async def answer(self, message: str, talk: list[Turn], request: gr.Request, *numbers: Any) -> Growth:
        """Answer `message`."""
        turns = [*talk, {"role": "user", "content": message}]
        with shown_errors():
            require(bool(message.strip()), "the message is empty; write something first")
            ids = await asyncio.to_thread(self.scheduler.encode_chat, turns)
            async with contextlib.aclosing(self.grow(ids, numbers, request)) as growing:
                async for grown, line in growing:
                    answered = [*turns, {"role": "assistant", "content": grown}]
                    yield escaped(answered), line, answered, ""  # clears the message box

    async def answer_again(self, _: str, talk: list[Turn], request: gr.Request, *numbers: Any) -> Growth:
        """Undo the last answer and write another."""
        *talk, message = talk if talk and talk[-1]["role"] == "user" else talk[:-1] or [{}]
        with shown_errors():
            require("content" in message, "there is nothing to answer again; send a message first")
        async with contextlib.aclosing(self.answer(message["content"], talk, request, *numbers)) as growing:
            async for step in growing:
                yield step

    def stop(self, request: gr.Request) -> None:
        """End the requests of this visitor's page."""
        self.scheduler.cancel(str(request.session_hash))

    async def generate(  # noqa: PLR0917 - Gradio passes positional arguments
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 50,
        repetition_penalty: float = 1.1,
        seed: int | None = None,
        stop: list[str] | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Continue `prompt`; yields text, seed, tokens, seconds and stop reason so far."""
        with shown_errors():
            sampling = self.scheduler.sampling(
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed,
            )  # fmt: skip
            stops = self.scheduler.stop_strings(stop)
            ids, text = await asyncio.to_thread(self.scheduler.encode, prompt), ""
            async with contextlib.aclosing(self.scheduler.stream(ids, sampling, stops)) as chunks:
                async for chunk in chunks:
                    text += chunk.text
                    yield as_json(text, chunk, sampling.seed)


def as_json(text: str, chunk: TextChunk, seed: int) -> dict[str, Any]:
    """Build the answer of /generate."""
    return {
        "text": text,
        "seed": seed,
        "tokens": chunk.tokens,
        "prompt_tokens": chunk.prompt_tokens,
        "seconds": round(chunk.seconds, 3),
        "seconds_to_first_token": chunk.seconds_to_first and round(chunk.seconds_to_first, 3),
        "stop_reason": chunk.reason,
    }


def _seed(typed: Any) -> Any:
    """Parse the seed field: None if empty, an int if possible; else unchanged for the scheduler to refuse."""
    typed = typed.strip() if isinstance(typed, str) else typed
    if typed in ("", None):
        return None
    return int(typed) if isinstance(typed, str) and typed.isdecimal() and len(typed) < 20 else typed


def escaped(talk: list[Turn]) -> list[Turn]:
    """Escape a conversation, because the chatbot renders HTML and would fetch images in it."""
    return [{"role": turn["role"], "content": html.escape(turn["content"], quote=False)} for turn in talk]

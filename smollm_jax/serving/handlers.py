"""What the page and /generate do with a `Scheduler`: texts and numbers in, growing text and a line about it out.

Handlers for Gradio, which calls them by place and closes them when a visitor goes. They check nothing themselves,
since a page can be gone around: numbers go to the worker as they came, and what the worker says against them is
shown in words. Nothing here knows how the page looks.
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
from smollm_jax.serving.openai_api import conversation
from smollm_jax.serving.scheduler import QueueFull, Scheduler

UNDO_DEPTH = 20
ENDS = {
    "eos": "the model ended the text",
    "length": "length reached",
    "context": "the context of the model is full",
    "stop string": "stop string reached",
    "cancelled": "stopped by you",
}
WRITING = "writing…"
Turn = dict[str, str]  # role and content
Numbers = tuple[Any, ...]  # temperature, top-p, top-k, repetition penalty, length, seed: as on the page
NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turn what can go wrong into a message that the page and Gradio's clients show."""
    try:
        yield
    except (ValueError, QueueFull, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def status(piece: TextChunk, seed: int) -> str:
    """One line on how far a text has come, how fast, and why it ended."""
    first, rest = piece.seconds_to_first or 0.0, max(piece.tokens - 1, 0)
    spent = piece.seconds - first
    parts = [f"**{piece.tokens:,} tokens**"]
    if rest and spent > 0:
        parts.append(f"{rest / spent:,.1f} tokens/s")
    parts += [f"first after {first:.2f} s", f"seed `{seed}`", ENDS[piece.reason] if piece.reason else WRITING]
    return " · ".join(parts)


class Handlers:
    """The page's handlers, and the one behind /generate."""

    def __init__(self, worker: Scheduler):
        self.worker = worker

    def before(self) -> str:
        waiting = self.worker.waiting
        return f"waiting, {waiting} before you…" if waiting else "the model reads…"

    async def grow(
        self, ids: list[int], numbers: Numbers, request: gr.Request
    ) -> AsyncGenerator[tuple[str, str], None]:
        """The continuation so far and the status, again and again, until it ends or `stop` ends it."""
        named = dict(zip(NAMES, numbers, strict=True))
        sampling = self.worker.sampling(**named | {"seed": _seed(named["seed"])})
        text = ""
        yield text, self.before()
        async with contextlib.aclosing(self.worker.pieces(ids, sampling, owner=request.session_hash)) as pieces:
            async for piece in pieces:
                # no page can show a NUL, and no prompt may hold one
                text += piece.text.replace("\0", "")
                yield text, status(piece, sampling.seed)

    async def write(
        self, text: str, history: list[str], request: gr.Request, *numbers: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Continue the sheet; the text before it joins the history."""
        history = [*history, text][-UNDO_DEPTH:]
        with in_words():
            ids = await asyncio.to_thread(self.worker.prompt, text)
            async with contextlib.aclosing(self.grow(ids, numbers, request)) as growing:
                async for grown, line in growing:
                    yield text + grown, line, history

    async def again(
        self, _: str, history: list[str], request: gr.Request, *numbers: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Take the last continuation back and write another."""
        with in_words():
            require(bool(history), "there is nothing to write again; press Continue first")
        async with contextlib.aclosing(self.write(history[-1], history[:-1], request, *numbers)) as growing:
            async for step in growing:
                yield step

    async def say(
        self, message: str, talk: list[Turn], request: gr.Request, *numbers: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Answer `message`."""
        turns = [*talk, {"role": "user", "content": message}]
        with in_words():
            require(bool(message.strip()), "the message is empty; write something first")
            ids = await asyncio.to_thread(conversation, self.worker, turns)
            async with contextlib.aclosing(self.grow(ids, numbers, request)) as growing:
                async for grown, line in growing:
                    answered = [*turns, {"role": "assistant", "content": grown}]
                    yield shown(answered), line, answered, ""  # the box is emptied

    async def say_again(
        self, _: str, talk: list[Turn], request: gr.Request, *numbers: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Take the last answer back and give another."""
        *talk, message = talk if talk and talk[-1]["role"] == "user" else talk[:-1] or [{}]
        with in_words():
            require("content" in message, "there is nothing to answer again; send a message first")
        async with contextlib.aclosing(self.say(message["content"], talk, request, *numbers)) as growing:
            async for step in growing:
                yield step

    def stop(self, request: gr.Request) -> None:
        """End what this visitor's page has asked for."""
        self.worker.cancel(str(request.session_hash))

    async def generate(  # noqa: PLR0917 - Gradio passes them by place
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
        """Continue `prompt`: the new text, the seed, tokens, seconds and why it stopped, as they grow."""
        with in_words():
            sampling = self.worker.sampling(
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed,
            )  # fmt: skip
            stops = self.worker.stop_strings(stop)
            ids, text = await asyncio.to_thread(self.worker.prompt, prompt), ""
            async with contextlib.aclosing(self.worker.pieces(ids, sampling, stops)) as pieces:
                async for piece in pieces:
                    text += piece.text
                    yield facts(text, piece, sampling.seed)


def facts(text: str, piece: TextChunk, seed: int) -> dict[str, Any]:
    return {
        "text": text,
        "seed": seed,
        "tokens": piece.tokens,
        "prompt_tokens": piece.prompt_tokens,
        "seconds": round(piece.seconds, 3),
        "seconds_to_first_token": piece.seconds_to_first and round(piece.seconds_to_first, 3),
        "stop_reason": piece.reason,
    }


def _seed(typed: Any) -> Any:
    """What was typed as a number, None for nothing; the worker says what it thinks of the rest."""
    typed = typed.strip() if isinstance(typed, str) else typed
    if typed in ("", None):
        return None
    return int(typed) if isinstance(typed, str) and typed.isdecimal() and len(typed) < 20 else typed


def shown(talk: list[Turn]) -> list[Turn]:
    """The conversation for a chatbot, which takes its text for HTML: an image in it would be fetched."""
    return [{"role": turn["role"], "content": html.escape(turn["content"], quote=False)} for turn in talk]

"""Gradio handlers over a `Scheduler`: a growing text and a status line for the page and for /generate.

Gradio calls handlers with positional arguments and closes them when a visitor leaves. They check nothing, since
a request can bypass the page: the scheduler checks, and its errors are shown. This file knows no layout.
"""

import contextlib
import html
from collections.abc import AsyncGenerator, Callable, Iterator
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
NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")  # as on the page
Turn = dict[str, str]  # role and content
Values = tuple[Any, ...]  # for the components that a handler changes
Growth = AsyncGenerator[Values, None]
Prompt = tuple[list[int], Callable[[str, str], Values]]  # its ids, and how new text and status line are shown


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
    speed = [f"{rest / spent:,.1f} tokens/s"] if rest and spent > 0 else []
    reason = REASONS[chunk.reason] if chunk.reason else "writing…"
    parts = f"**{chunk.tokens:,} tokens**", *speed, f"first after {first:.2f} s", f"seed `{seed}`", reason
    return " · ".join(parts)


class Handlers:
    """The handlers of the page and of /generate.

    Notebook and chat each have a text box and a past: the texts before each continuation, or the turns so far,
    which alternate between user and assistant.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def writer(self, prepare: Callable[[str, list[Any]], Prompt]) -> Callable[..., Growth]:
        """Return a handler that shows a growing text until it ends or `stop` is called.

        `prepare` makes the prompt of the text box and the past.
        """

        chat = prepare in {self.answer, self.answer_again}

        async def write(typed: str, past: list[Any], request: gr.Request, *numbers: Any) -> Growth:
            with shown_errors():
                ids, show = await self.scheduler.in_turn(prepare, typed, past, chat=chat)
                named = dict(zip(NUMBERS, numbers, strict=True))
                sampling = self.scheduler.sampling(**named | {"seed": _seed(named["seed"])})
                text, waiting = "", self.scheduler.waiting
                yield show(text, f"waiting, {waiting} before you…" if waiting else "reading the prompt…")
                stream = self.scheduler.stream(ids, sampling, **_of(request))
                async with contextlib.aclosing(stream) as chunks:
                    async for chunk in chunks:
                        # no page can show a NUL, and no prompt may hold one
                        text += chunk.text.replace("\0", "")
                        yield show(text, status_line(chunk, sampling.seed))

        return write

    def stop(self, request: gr.Request) -> None:
        """End the requests of this visitor's page."""
        self.scheduler.cancel(str(request.session_hash))

    def continue_text(self, text: str, past: list[str]) -> Prompt:
        ids, past = self.scheduler.encode(text), [*past, text][-UNDO_DEPTH:]
        return ids, lambda grown, line: (text + grown, line, past)

    def rewrite_text(self, _: str, past: list[str]) -> Prompt:
        require(bool(past), "there is nothing to write again; press Continue first")
        return self.continue_text(past[-1], past[:-1])

    def undo_text(self, text: str, past: list[str]) -> Values:
        return (past[-1], "", past[:-1]) if past else (text, "nothing to undo", [])

    def answer(self, message: str, talk: list[Turn]) -> Prompt:
        require(bool(message.strip()), "the message is empty; write something first")
        turns = [*talk, {"role": "user", "content": message}]

        def show(grown: str, line: str) -> Values:
            answered = [*turns, {"role": "assistant", "content": grown}]
            return escaped(answered), line, answered, ""  # clears the message box

        return self.scheduler.encode_chat(turns), show

    def answer_again(self, _: str, talk: list[Turn]) -> Prompt:
        require(bool(talk), "there is nothing to answer again; send a message first")
        return self.answer(talk[-2]["content"], talk[:-2])

    def undo_answer(self, message: str, talk: list[Turn]) -> Values:
        if not talk:
            return [], "nothing to undo", [], message
        return escaped(talk[:-2]), "", talk[:-2], talk[-2]["content"]

    async def generate(  # noqa: PLR0917 - Gradio passes positional arguments
        self,
        request: gr.Request,
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
            ids, text = await self.scheduler.in_turn(self.scheduler.encode, prompt), ""
            stream = self.scheduler.stream(ids, sampling, stops, **_of(request))
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    text += chunk.text
                    yield {
                        "text": text,
                        "seed": sampling.seed,
                        "tokens": chunk.tokens,
                        "prompt_tokens": chunk.prompt_tokens,
                        "seconds": round(chunk.seconds, 3),
                        "seconds_to_first_token": chunk.seconds_to_first and round(chunk.seconds_to_first, 3),
                        "stop_reason": chunk.reason,
                    }


def _of(request: gr.Request) -> dict[str, Any]:
    """Return whose request it is: the session, which can cancel it, and the client's address."""
    return {"owner": str(request.session_hash), "client": request.client.host if request.client else ""}


def _seed(typed: str | None) -> Any:
    """Parse the seed field: None if empty, an int if possible; else unchanged for the scheduler to refuse."""
    typed = (typed or "").strip()
    return int(typed) if typed.isdecimal() and len(typed) < 20 else typed or None


def escaped(talk: list[Turn]) -> list[Turn]:
    """Escape a conversation, because the chatbot renders HTML and would fetch images in it."""
    return [{"role": turn["role"], "content": html.escape(turn["content"], quote=False)} for turn in talk]

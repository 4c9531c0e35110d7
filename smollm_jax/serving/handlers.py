"""Gradio handlers of the page and /generate: a growing text and a status line.

Gradio calls handlers with positional arguments and closes them when a visitor leaves. Handlers check the text's
and the conversation's past, and the `Scheduler` all else. The page may be bypassed. Errors are shown. The browser
keeps the text's history and the conversation, so a restart of the server loses neither. This file knows no layout.
"""

import asyncio
import contextlib
import html
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.serving.completion import TextChunk
from smollm_jax.serving.limits import LONGEST_PROMPT, QueueFull, check_length, checked_stops
from smollm_jax.serving.scheduler import Scheduler
from smollm_jax.serving.talk import Turn, checked_talk, escaped
from smollm_jax.serving.tokens import described

SILENCE_SECONDS = 1.0  # after this the page shows what a request waits for
REASONS = {
    "eos": "the model ended the text",
    "length": "length reached",
    "context": "the context of the model is full",
    "stop string": "stop string reached",
    "cancelled": "stopped by you",
}
# in the order of the page's inputs
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_new_tokens",
    "seed",
    "min_p",
    "stop",
    "weights",
)
LOOKS = "looks up "  # of a page's owner: writing goes before
END = object()
Values = tuple[Any, ...]  # new values of the components that a handler changes
Growth = AsyncGenerator[Values, None]
Prompt = tuple[list[int], Callable[[str, str], Values]]  # ids, and a function that shows new text and status


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turn expected errors into messages that the page and Gradio's clients show."""
    try:
        yield
    except (ValueError, QueueFull, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def status_line(chunk: TextChunk, seed: int) -> str:
    """Format tokens, speed, seed and the reason why the text ended."""
    first, rest = chunk.seconds_to_first or 0.0, max(chunk.tokens - 1, 0)
    spent = chunk.seconds - first
    speed = [f"{rest / spent:,.1f} tokens/s"] if rest and spent > 0 else []
    reason = REASONS[chunk.reason] if chunk.reason else "writing…"
    weights = [f"step {key:,}" if isinstance(key, int) else key] if (key := chunk.weights) is not None else []
    parts = (
        f"**{counted(chunk.tokens)}**",
        *speed,
        f"first after {first:.2f} s",
        *weights,
        f"seed `{seed}`",
        reason,
    )
    return " · ".join(parts)


def counted(tokens: int) -> str:
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"


class Handlers:
    """The handlers of the page and of /generate.

    Notebook and chat each get a text box and a past from the browser. The notebook's past is the text before the
    last continuation. The chat's past is the turns so far, which alternate between user and assistant.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def writer(self, prepare: Callable[[str, list[Any]], Prompt]) -> Callable[..., Growth]:
        """Return a handler that shows a growing text until it ends or `stop` is called.

        `prepare` makes the prompt from the text box and the past.
        """

        chat = prepare in {self.answer, self.answer_again, self.answer_edited}

        async def write(typed: str, past: Any, request: gr.Request, *numbers: Any) -> Growth:
            with shown_errors():
                system = numbers[len(NUMBERS) :]  # of a chat
                ids, show = await self.scheduler.in_turn(prepare, typed, past, *system, chat=chat)
                # Continue asks for at least one more token, even if the model has ended the text
                sampling, stops, weights = self.checked(numbers[: len(NUMBERS)], min_new_tokens=0 if chat else 1)
                text, waiting = "", self.scheduler.waiting
                yield show(text, f"waiting, {waiting} before you…" if waiting else "reading the prompt…")
                owner = of(request)
                stream = self.scheduler.stream(ids, sampling, stops, **owner, weights=weights)
                async with contextlib.aclosing(with_silences(stream, SILENCE_SECONDS)) as chunks:
                    async for chunk in chunks:
                        if chunk is None:
                            if not text:
                                yield show(text, self.waiting_line(owner["owner"]))
                            continue
                        # no page can show a NUL, and no prompt may hold one
                        text += chunk.text.replace("\0", "")
                        yield show(text, status_line(chunk, sampling.seed))

        return write

    def checked(self, numbers: Sequence[Any], **more: int) -> tuple[Sampling, tuple[str, ...], str]:
        """Check the page's inputs, which are in the order of `NUMBERS`: settings, stop strings, and weights."""
        named = dict(zip(NUMBERS, numbers, strict=True))
        stops, weights = checked_stops(_stops(named.pop("stop"))), named.pop("weights")
        return self.scheduler.sampling(**named | more | {"seed": _seed(named["seed"])}), stops, weights

    def begin(self, request: gr.Request) -> None:
        """Announce the request of a button that writes. Stop may be pressed before the request comes."""
        self.scheduler.cancel(f"{LOOKS}{request.session_hash}")
        self.scheduler.announce(str(request.session_hash))

    def stop(self, request: gr.Request) -> None:
        """End the requests of this visitor's page."""
        self.scheduler.cancel(str(request.session_hash))

    def waiting_line(self, owner: str) -> str:
        """Return what a request waits for before its first token."""
        before = self.scheduler.before(owner)
        if before:
            return f"waiting, {before} before you…"
        return "compiling for longer texts, once…" if self.scheduler.is_compiling else "reading the prompt…"

    def continue_text(self, text: str, _: str | None) -> Prompt:
        return self.scheduler.encode(text), lambda grown, line: (text + grown, line)

    def rewrite_text(self, _: str, before: str | None) -> Prompt:
        require(before is not None, "there is nothing to regenerate; press Continue first")
        return self.continue_text(before or "", None)

    def answer(self, message: str, talk: Any, system: str | None = None, unsent: Any = "") -> Prompt:
        require(bool(message.strip()), "the message is empty; write something first")
        turns = [*checked_talk(talk), {"role": "user", "content": message}]
        first = [{"role": "system", "content": system}] if system and system.strip() else []

        def show(grown: str, line: str) -> Values:
            answered = [*turns, {"role": "assistant", "content": grown}]
            return escaped(answered), line, answered, unsent

        return self.scheduler.encode_chat([*first, *turns]), show

    def answer_again(self, unsent: str, talk: Any, system: str | None = None) -> Prompt:
        talk = checked_talk(talk)
        require(bool(talk), "there is nothing to regenerate; send a message first")
        return self.answer(talk[-2]["content"], talk[:-2], system, unsent)

    def answer_edited(self, edit: Any, talk: Any, system: str | None = None) -> Prompt:
        """Answer a message that was changed. The turns after it are dropped."""
        talk, number = checked_talk(talk), edit.get("number") if isinstance(edit, dict) else None
        good = isinstance(number, int) and 0 <= number < len(talk) and number % 2 == 0
        require(good and isinstance(edit.get("text"), str), "there is no such message; reload the page")
        return self.answer(edit["text"], talk[:number], system, gr.skip())

    def edited(self, edit: gr.EditData) -> dict[str, Any]:
        """Return number and new text of a message. The chatbot holds HTML, so its editor does too."""
        number = edit.index[0] if isinstance(edit.index, list | tuple) else edit.index
        return {"number": number, "text": html.unescape(str(edit.value))}

    def undo_answer(self, message: str, talk: Any) -> Values:
        with shown_errors():
            talk = checked_talk(talk)
        if not talk:
            return [], "nothing to undo", [], message
        return escaped(talk[:-2]), "", talk[:-2], message or talk[-2]["content"]

    async def look_up(self, text: str, weights: str, request: gr.Request) -> AsyncGenerator[str, None]:
        """Yield the probabilities of a text's tokens as JSON, or the error that prevented it."""
        scheduler, completer, sender = self.scheduler, self.scheduler.completer, of(request)
        yield ""  # a look-up that is cancelled must not show the one before
        try:
            check_length(text or "", "the text has")
            ids = (await scheduler.in_turn(completer.tokenizer.encode, text or "")).tolist()
            scores = await scheduler.score(ids, **sender | {"owner": LOOKS + sender["owner"]}, weights=weights)
            if scores is not None:
                yield await scheduler.in_turn(described, completer.tokenizer, ids, scores)
        except (ValueError, QueueFull, RuntimeError) as error:
            yield json.dumps({"error": str(error)})

    async def count(self, text: str) -> str:
        """Return how much of the context a text takes."""
        with shown_errors():
            context = self.scheduler.completer.context
            try:
                ids = await self.scheduler.in_turn(
                    self.scheduler.completer.tokenizer.encode, (text or "")[:LONGEST_PROMPT]
                )
            except UserError:
                return ""
            full = "; too long to continue" if len(ids) >= context else ""
            return f"{counted(len(ids))} of {context:,}{full}"

    def show_talk(self, talk: Any) -> list[Turn]:
        """Return a conversation that the browser has kept, as the chatbot shows it."""
        with shown_errors():
            return escaped(checked_talk(talk))

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
        """Continue `prompt` and yield text, seed, tokens, seconds and stop reason so far."""
        with shown_errors():
            sampling = self.scheduler.sampling(
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed,
            )  # fmt: skip
            stops = checked_stops(stop)
            ids, text = await self.scheduler.in_turn(self.scheduler.encode, prompt), ""
            stream = self.scheduler.stream(ids, sampling, stops, **of(request))
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


def of(request: gr.Request) -> dict[str, Any]:
    """Return a request's session, which can cancel the request, and the client's address."""
    return {"owner": str(request.session_hash), "client": request.client.host if request.client else ""}


def _seed(typed: str | None) -> Any:
    """Parse the seed field: None if empty, an int if possible. The scheduler refuses any other text."""
    typed = (typed or "").strip()
    return int(typed) if typed.isdecimal() and len(typed) < 20 else typed or None


def _stops(typed: str | None) -> list[str]:
    r"""Parse the field of stop strings, one per line. In a line, \n is a line break."""
    return [line.replace("\\n", "\n") for line in (typed or "").splitlines() if line]


async def with_silences(chunks: AsyncGenerator[TextChunk, None], seconds: float) -> AsyncGenerator[Any, None]:
    """Yield the chunks, and None for each `seconds` without a chunk. Closing the iterator closes `chunks`."""
    async with contextlib.aclosing(chunks):
        while True:
            following = asyncio.ensure_future(anext(chunks, END))
            try:
                while not (await asyncio.wait({following}, timeout=seconds))[0]:
                    yield None
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.wait({following})
            if (chunk := following.result()) is END:
                return
            yield chunk

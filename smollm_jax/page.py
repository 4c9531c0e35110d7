"""The Gradio page over a `Worker`: a notebook whose text grows in place, and a chat where there is a template.

A base model completes text, so the page is one sheet that the model writes on with: Continue, Stop, Undo, Write
again. It checks nothing itself, since a page can be gone around: numbers go to the worker as they came, and what
the worker says against them is shown in words.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr

from smollm_jax.api import conversation
from smollm_jax.completion import Piece
from smollm_jax.config import require
from smollm_jax.worker import RANGES, Busy, Worker

UNDO_DEPTH = 20
GRADIO_QUEUE = 64
OPENINGS = (
    "Photosynthesis is the process by which",
    "Once upon a time, in a small village by the sea,",
    "Chapter 3: The Water Cycle\n\nWater is always on the move.",
    "A step-by-step guide to growing tomatoes at home\n\nStep 1:",
    "The reason why the sky looks blue is",
)
# temperature, top-p, top-k, repetition penalty
PRESETS = {"Textbook": (0.6, 0.9, 50, 1.1), "Story": (0.9, 0.95, 0, 1.1), "Likeliest": (0.0, 1.0, 0, 1.0)}
START = "Textbook"
ENDS = {
    "eos": "the model ended the text",
    "length": "length reached",
    "context": "the context of the model is full",
    "stop string": "stop string reached",
    "cancelled": "stopped",
}
WRITING, STOPPED = "writing…", "stopped by you"
STYLE = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#sheet textarea { font: 1.08rem/1.7 Georgia, 'Times New Roman', serif; padding: 1rem 1.15rem; }
#title h1 { margin: 0 0 .1rem; font-size: 1.4rem; } #title p { margin: 0; opacity: .7; }
#status { min-height: 1.7rem; font-variant-numeric: tabular-nums; }
#top { align-items: center; flex-wrap: nowrap; } #dark { flex: 0 0 7rem; min-width: 7rem; }
@media (max-width: 640px) { #buttons button { min-width: 45%; } #sheet textarea { max-height: 50vh; } }
"""
DARK = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('dark', dark ? 'yes' : 'no');
}"""
REMEMBERED = """() => {
  const dark = localStorage.getItem('dark');
  if (dark) document.body.classList.toggle('dark', dark === 'yes');
}"""
HELP = """
**Gradio:** `Client("{url}").predict("Once upon a time", api_name="/generate")` with `gradio_client`; its
parameters are listed under *Use via API* at the foot of the page.

**OpenAI:** `/v1/completions`{chat} and `/v1/models`, streaming too:

```
curl {url}v1/completions -H 'Content-Type: application/json'{key} \\
  -d '{{"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0.7, "seed": 1}}'
```
"""
Numbers = tuple[Any, ...]  # temperature, top-p, top-k, repetition penalty, length, seed: as on the page
NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turn what can go wrong into a message that the page and Gradio's clients show."""
    try:
        yield
    except (ValueError, Busy, RuntimeError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def status(piece: Piece, seed: int) -> str:
    """One line on how far a text has come, how fast, and why it ended."""
    first, rest = piece.seconds_to_first or 0.0, max(piece.tokens - 1, 0)
    spent = piece.seconds - first
    parts = [f"**{piece.tokens:,} tokens**"]
    if rest and spent > 0:
        parts.append(f"{rest / spent:,.1f} tokens/s")
    parts += [f"first after {first:.2f} s", f"seed `{seed}`", ENDS[piece.reason] if piece.reason else WRITING]
    return " · ".join(parts)


class Writer:
    """The page's handlers, and the one behind /generate."""

    def __init__(self, worker: Worker):
        self.worker = worker

    async def grow(self, ids: list[int], numbers: Numbers) -> AsyncIterator[tuple[str, str]]:
        """The continuation so far and the status, again and again."""
        named = dict(zip(NAMES, numbers, strict=True))
        sampling = self.worker.sampling(**named | {"seed": _seed(named["seed"])})
        text = ""
        async with contextlib.aclosing(self.worker.pieces(ids, sampling)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                text += piece.text
                yield text, status(piece, sampling.seed)

    async def write(self, text: str, history: list[str], *numbers: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Continue the sheet; the text before it joins the history."""
        history = [*history, text][-UNDO_DEPTH:]
        with in_words():
            ids = await asyncio.to_thread(self.worker.prompt, text)
            before = self.worker.waiting
            yield text, f"waiting, {before} before you…" if before else "the model reads…", history
            async with contextlib.aclosing(self.grow(ids, numbers)) as growing:  # type: ignore[type-var]
                async for grown, line in growing:
                    yield text + grown, line, history

    async def again(self, _: str, history: list[str], *numbers: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Take the last continuation back and write another."""
        with in_words():
            require(bool(history), "there is nothing to write again; press Continue first")
        async with contextlib.aclosing(self.write(history[-1], history[:-1], *numbers)) as growing:  # type: ignore[type-var]
            async for step in growing:
                yield step

    async def chat(self, message: str, history: list[Any], *numbers: Any) -> AsyncIterator[tuple[str, str]]:
        """The assistant's answer and the status as they grow."""
        with in_words():
            messages = [*(_plain(turn) for turn in history), {"role": "user", "content": message}]
            ids = await asyncio.to_thread(conversation, self.worker, messages)
            async with contextlib.aclosing(self.grow(ids, numbers)) as growing:  # type: ignore[type-var]
                async for step in growing:
                    yield step

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
    ) -> AsyncIterator[dict[str, Any]]:
        """Continue `prompt`: the new text, the seed, tokens, seconds and why it stopped, as they grow."""
        with in_words():
            sampling = self.worker.sampling(
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed,
            )  # fmt: skip
            stops = self.worker.stop_strings(stop)
            ids, text = await asyncio.to_thread(self.worker.prompt, prompt), ""
            async with contextlib.aclosing(self.worker.pieces(ids, sampling, stops)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    text += piece.text
                    yield facts(text, piece, sampling.seed)


def facts(text: str, piece: Piece, seed: int) -> dict[str, Any]:
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


def _plain(turn: Any) -> dict[str, str]:
    """A turn as the chatbot keeps it: its content may come in parts."""
    content = turn["content"]
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return {"role": str(turn["role"]), "content": str(content)}


def build_page(worker: Worker, name: str, *, with_key: bool) -> gr.Blocks:
    """The whole page. Requests wait in the worker's line, which all doors share; Gradio's own only passes on."""
    writer, has_chat = Writer(worker), bool(worker.completer.tokenizer.chat_template)
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            about = f"{worker.completer.about} · context {worker.completer.context:,} tokens"
            gr.Markdown(f"# {name}\n{about}", elem_id="title")
            gr.Button("Light / dark", size="sm", elem_id="dark", scale=0).click(
                None, js=DARK, api_visibility="private"
            )
        with gr.Row():
            side = gr.Column(scale=1, min_width=280, render=False)
            with gr.Column(scale=3, min_width=320):
                with side:
                    numbers = settings(worker)
                if has_chat:
                    with gr.Tab("Notebook"):
                        notebook(writer, numbers)
                    with gr.Tab("Chat"):
                        chat(writer, numbers)
                else:
                    notebook(writer, numbers)
            side.render()
        with gr.Accordion("Use it from a program", open=False):
            key = " -H 'Authorization: Bearer KEY'" if with_key else ""
            routes = ", `/v1/chat/completions`" if has_chat else ""
            gr.Markdown(HELP.format(url="http://127.0.0.1:7860/", chat=routes, key=key))
        gr.api(writer.generate, api_name="generate", concurrency_limit=None)
        page.load(None, js=REMEMBERED, api_visibility="private")
    return page.queue(max_size=GRADIO_QUEUE, api_open=False)


def settings(worker: Worker) -> list[gr.components.Component]:
    """Presets and the numbers, in the order of `NAMES`."""
    longest, (temperature, top_p, top_k, penalty) = worker.max_new_tokens, PRESETS[START]
    preset = gr.Radio(list(PRESETS), value=START, label="Preset")
    sliders = [
        gr.Slider(*RANGES["temperature"], temperature, step=0.05, label="Temperature", info="0: the likeliest"),
        gr.Slider(*RANGES["top_p"], top_p, step=0.01, label="Top-p"),
        gr.Slider(0, 200, top_k, step=1, label="Top-k", info="0: all"),
        gr.Slider(*RANGES["repetition_penalty"], penalty, step=0.05, label="Repetition penalty", info="1: none"),
    ]
    length = gr.Slider(1, longest, min(200, longest), step=1, label="Length", info="tokens a press of Continue")
    # a text, since an empty number field of Gradio's reads 0
    seed = gr.Textbox(label="Seed", placeholder="empty: a new one each time", max_lines=1, elem_id="seed")
    # .input, not .change: only a person's choice moves the sliders
    preset.input(lambda name: PRESETS[name], preset, sliders, queue=False, api_visibility="private")
    return [*sliders, length, seed]


def notebook(writer: Writer, numbers: list[gr.components.Component]) -> None:
    """The sheet and its buttons."""
    history = gr.State([], time_to_live=3_600)
    sheet = gr.Textbox(
        lines=14, max_lines=20, label="Text", elem_id="sheet", buttons=["copy"], interactive=True,
        placeholder="Write how a text begins, then press Continue: the model writes on.",
    )  # fmt: skip
    line = gr.Markdown("", elem_id="status")
    with gr.Row(elem_id="buttons"):
        go = gr.Button("Continue", variant="primary", elem_id="continue")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        undo = gr.Button("Undo", elem_id="undo")
        again = gr.Button("Write again", elem_id="again")
    gr.Examples(
        [[opening] for opening in OPENINGS], sheet, label="Openings", cache_examples=False,
        example_labels=[opening.split("\n")[0] for opening in OPENINGS], api_visibility="private",
    )  # fmt: skip

    def buttons(working: bool) -> list[Any]:
        return [gr.update(visible=not working), gr.update(visible=working)]

    events: list[Any] = []
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    for button, handler in ((go, writer.write), (again, writer.again)):
        pressed = button.click(lambda: buttons(True), None, [go, stop], **quick)
        event = pressed.then(
            handler, [sheet, history, *numbers], [sheet, line, history], show_progress="hidden",
            concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        for over in (event.success, event.failure):
            over(lambda: buttons(False), None, [go, stop], **quick)
        events.append(event)

    def stopped(line: str) -> list[Any]:
        return [line.replace(WRITING, STOPPED), *buttons(False)]

    def back(text: str, history: list[str]) -> tuple[str, str, list[str]]:
        return (history[-1], "", history[:-1]) if history else (text, "nothing to undo", [])

    stop.click(stopped, line, [line, go, stop], cancels=events, **quick)
    undo.click(back, [sheet, history], [sheet, line, history], cancels=events, **quick).then(
        lambda: buttons(False), None, [go, stop], **quick
    )


def chat(writer: Writer, numbers: list[gr.components.Component]) -> None:
    """A conversation under the model's template."""
    line = gr.Markdown("", render=False)
    gr.ChatInterface(
        writer.chat,
        # not rendered as Markdown: an image in it would be fetched from wherever the model says
        chatbot=gr.Chatbot(height=460, render_markdown=False, buttons=["copy"], label="Chat", render=False),
        additional_inputs=list(numbers),
        additional_outputs=[line],
        concurrency_limit=None,
        api_visibility="private",
        analytics_enabled=False,
        flagging_mode="never",
    )
    line.render()

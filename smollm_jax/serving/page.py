"""Layout of the page: a notebook whose text grows in place, and a chat if the model has a template.

A base model completes text, so the page is one text that the model continues: Continue, Stop, Undo, Write again.
handlers.py has what the buttons do; page.css, page.js and page.md are the style, the scripts and the API's help.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from smollm_jax.serving.handlers import Handlers
from smollm_jax.serving.scheduler import RANGES, Scheduler

GRADIO_QUEUE = 64
STATE_SECONDS = 3_600
STYLE, SCRIPT, HELP = (Path(__file__).with_suffix(suffix).read_text("utf-8") for suffix in (".css", ".js", ".md"))
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
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # /generate is the only documented endpoint
QUICK = PRIVATE | {"queue": False, "show_progress": "hidden"}


def build_page(scheduler: Scheduler, name: str, *, with_key: bool) -> gr.Blocks:
    """Build the page. Requests wait in the scheduler's queue; Gradio's own queue only forwards them."""
    handlers, has_chat = Handlers(scheduler), scheduler.has_chat
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            about = f"{scheduler.completer.about} · context {scheduler.completer.context:,} tokens"
            gr.Markdown(f"# {name}\n{about}", elem_id="title")
            dark = gr.Button("Light / dark", size="sm", elem_id="dark", scale=0)
            dark.click(None, js="() => window.toggleDark()", **PRIVATE)
        with gr.Row():
            side = gr.Column(scale=1, min_width=280, render=False)
            with gr.Column(scale=3, min_width=320):
                with side:
                    numbers = settings(scheduler)
                with gr.Tab("Notebook") if has_chat else contextlib.nullcontext():
                    notebook(handlers, numbers)
                if has_chat:
                    with gr.Tab("Chat"):
                        chat(handlers, numbers)
            side.render()
        with gr.Accordion("API", open=False):
            key = " -H 'Authorization: Bearer KEY'" if with_key else ""
            gr.Markdown(HELP.format(chat=", `/v1/chat/completions`" if has_chat else "", key=key))
        gr.api(handlers.generate, api_name="generate", concurrency_limit=None)
    for block in page.blocks.values():
        # a mounted Gradio app would copy any file of this machine, or any URL, that a request names
        block.async_move_resource_to_block_cache = no_files  # type: ignore[method-assign]
    return page.queue(max_size=GRADIO_QUEUE, api_open=False)


async def no_files(*_: Any) -> str:
    raise gr.Error("this page accepts no files", print_exception=False)


def settings(scheduler: Scheduler) -> list[gr.components.Component]:
    """Add presets and inputs for the numbers; returns the inputs in the order of `NUMBERS`."""
    longest, (temperature, top_p, top_k, penalty) = scheduler.max_new_tokens, PRESETS[START]
    preset = gr.Radio(list(PRESETS), value=START, label="Preset")
    sliders = [
        gr.Slider(*RANGES["temperature"], temperature, step=0.05, label="Temperature", info="0: greedy"),
        gr.Slider(*RANGES["top_p"], top_p, step=0.01, label="Top-p"),
        gr.Slider(0, 200, top_k, step=1, label="Top-k", info="0: all tokens"),
        gr.Slider(*RANGES["repetition_penalty"], penalty, step=0.05, label="Repetition penalty", info="1: none"),
    ]
    # Gradio's slider needs two values
    length = gr.Slider(
        min(1, longest - 1), longest, min(200, longest), step=1, label="Length", info="in tokens", elem_id="length"
    )
    # a text field, because an empty number field of Gradio's reads 0
    seed = gr.Textbox(label="Seed", placeholder="empty: a new seed every time", max_lines=1, elem_id="seed")
    # .input, not .change: only a person's choice may move the sliders
    preset.input(lambda name: PRESETS[name], preset, sliders, queue=False, **PRIVATE)
    return [*sliders, length, seed]


def notebook(handlers: Handlers, numbers: list[gr.components.Component]) -> None:
    """Add the text and its buttons."""
    past = gr.State([], time_to_live=STATE_SECONDS)
    sheet = gr.Textbox(
        lines=14, max_lines=20, label="Text", elem_id="sheet", buttons=["copy"], interactive=True,
        placeholder="Write how a text begins, then press Continue.",
    )  # fmt: skip
    line = gr.Markdown("", elem_id="status")
    controls(
        "Continue", handlers.continue_text, handlers.rewrite_text, handlers.undo_text, handlers,
        inputs=[sheet, past], numbers=numbers, outputs=[sheet, line, past],
    )  # fmt: skip
    gr.Examples(
        [[opening] for opening in OPENINGS], sheet, label="Openings", cache_examples=False,
        example_labels=[opening.split("\n")[0] for opening in OPENINGS], api_visibility="private",
    )  # fmt: skip


def chat(handlers: Handlers, numbers: list[gr.components.Component]) -> None:
    """Add a conversation under the model's chat template."""
    talk = gr.State([], time_to_live=STATE_SECONDS)
    # Gradio's own buttons would copy the escaped text
    view = gr.Chatbot(height=400, render_markdown=False, buttons=[], label="Conversation", feedback_options=None)
    with gr.Row():
        line = gr.Markdown("", elem_id="chat-status")
        copy = gr.Button("Copy answer", size="sm", elem_id="copy", scale=0, min_width=110)
    copy.click(None, js="() => window.copyAnswer()", **PRIVATE)
    box = gr.Textbox(label="Message", lines=1, max_lines=6, elem_id="message", placeholder="Press Enter to send")
    view.clear(lambda: ([], ""), None, [talk, line], queue=False, **PRIVATE)
    controls(
        "Send", handlers.answer, handlers.answer_again, handlers.undo_answer, handlers,
        inputs=[box, talk], numbers=numbers, outputs=[view, line, talk, box], enter=[box],
    )  # fmt: skip


def controls(
    verb: str, write: Any, write_again: Any, undo_last: Any, handlers: Handlers, *,
    inputs: list[Any], numbers: list[Any], outputs: list[Any], enter: Sequence[gr.Textbox] = (),
) -> None:  # fmt: skip
    """Add the buttons that write, stop, undo and write again; pressing Enter in a box of `enter` writes too."""
    with gr.Row(elem_classes="buttons"):
        go = gr.Button(verb, variant="primary", elem_id=verb.lower())
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"stop-{verb.lower()}")
        undo = gr.Button("Undo", elem_id=f"undo-{verb.lower()}")
        again = gr.Button("Write again", elem_id=f"again-{verb.lower()}")

    switched = [go, stop, undo, again, *enter]

    def buttons(working: bool) -> list[Any]:
        others = [gr.update(interactive=not working) for _ in switched[2:]]
        return [gr.update(visible=not working), gr.update(visible=working), *others]

    for triggers, prepare in (([go.click, *(box.submit for box in enter)], write), ([again.click], write_again)):
        event = gr.on(triggers, lambda: buttons(True), None, switched, **QUICK).then(
            handlers.writer(prepare), [*inputs, *numbers], outputs,
            show_progress="hidden", concurrency_limit=None, **PRIVATE,
        )  # fmt: skip
        event.success(lambda: buttons(False), None, switched, **QUICK)
        # .then does not run after a failure
        event.failure(lambda: [*buttons(False), ""], None, [*switched, outputs[1]], **QUICK)
    stop.click(handlers.stop, None, None, **QUICK)
    undo.click(undo_last, inputs, outputs, **QUICK)

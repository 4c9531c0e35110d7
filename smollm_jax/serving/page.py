"""Layout of the page: a notebook, and a chat if the model has a template.

A base model completes text, so the notebook is one text that the model continues in place. Its buttons are
Continue, Stop, Undo and Regenerate. The server's part is in handlers.py. In the browser, page.js keeps the history
of the text, the settings and the conversation. The style is page.css, the API's help is page.md.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from smollm_jax.config.presets import PRESETS, START
from smollm_jax.serving.compare import comparison, picker
from smollm_jax.serving.facts import Facts
from smollm_jax.serving.handlers import Handlers
from smollm_jax.serving.limits import RANGES
from smollm_jax.serving.scheduler import Scheduler

GRADIO_QUEUE = 64
STYLE, HELP, *SCRIPTS = (
    Path(__file__).with_name(name).read_text("utf-8")
    for name in ("page.css", "page.md", "page.js", "tokens.js", "fields.js")
)
SCRIPT = f"() => {{ {' '.join(f'({script.strip()})();' for script in SCRIPTS)} }}"
SECONDS_TO_LOOK = 5  # between two reads of a run that may be training
CUSTOM = "Custom"  # a preset of values that a person moved
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # /generate is the only documented endpoint
QUICK = PRIVATE | {"queue": False, "show_progress": "hidden"}
BROWSER = PRIVATE | {"show_progress": "hidden"}  # an event of the browser alone: fn is None
Inputs = list[Any]  # components, whose events mypy does not know


def build_page(scheduler: Scheduler, name: str, *, with_key: bool, facts: Facts | None = None) -> gr.Blocks:
    """Build the page. The scheduler queues requests, and Gradio's own queue only forwards them."""
    handlers, has_chat, facts = Handlers(scheduler), scheduler.has_chat, facts or Facts()
    has_run = scheduler.weights.has_run
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            about = [scheduler.completer.about, f"context {scheduler.completer.context:,} tokens"]
            about = [f"{facts.parameters:,} parameters", *about] if facts.parameters else about
            with gr.Column(scale=1, min_width=200):
                gr.Markdown(f"# {name}\n{' · '.join(about)}", elem_id="title")
                live = gr.HTML(facts.live(), elem_id="live", padding=False)
            dark = gr.Button("Light / dark", size="sm", elem_id="dark", scale=0)
            dark.click(None, js="() => window.toggleDark()", **PRIVATE)
        with gr.Accordion("About this model", open=bool(facts.live()), elem_id="about"):
            known = gr.HTML(facts.html(), elem_id="facts")
        with gr.Row():
            side = gr.Column(scale=1, min_width=280, render=False)
            with gr.Column(scale=3, min_width=320):
                with side:
                    accordion = gr.Accordion("Settings", open=True, elem_id="settings")
                with side, accordion:
                    weights = picker(handlers, "Checkpoint", visible=has_run, elem_id="weights")
                    preset, numbers = settings(scheduler)
                pickers, many = [weights], has_chat or has_run
                with gr.Tabs(selected="chat" if has_chat else "notebook") if many else contextlib.nullcontext():
                    tab = (
                        gr.Tab("Notebook", id="notebook", render_children=True)
                        if many
                        else contextlib.nullcontext()
                    )
                    with tab:
                        sheet = notebook(handlers, [preset, *numbers], weights, facts.openings)
                    if has_chat:
                        with gr.Tab("Chat", id="chat"):
                            chat(page, handlers, [*numbers, weights], facts.questions)
                    if has_run:
                        with gr.Tab("Compare", id="compare"):
                            pickers += comparison(page, handlers, numbers, facts.openings[0])
            side.render()
        if facts.run:
            follow_run(page, scheduler, facts, [known, live, *pickers])
        kept = [sheet, preset, *numbers]
        restore = f"(...v) => window.notebook.restore(v, {scheduler.max_new_tokens})"
        page.load(None, kept, kept, js=restore, **BROWSER)
        for one in kept[1:]:
            one.change(None, kept[1:], None, js="(...v) => window.notebook.settings(v)", **BROWSER)  # type: ignore[attr-defined]
        with gr.Accordion("Use it from a program", open=False):
            key = " -H 'Authorization: Bearer KEY'" if with_key else ""
            text = HELP.format(chat=", `/v1/chat/completions`" if has_chat else "", key=key)
            program = gr.Markdown(text, elem_id="program")
            page.load(None, None, program, js=f"() => window.notebook.address({json.dumps(text)})", **BROWSER)
        gr.api(handlers.generate, api_name="generate", concurrency_limit=None)
    for block in page.blocks.values():
        # a mounted Gradio app would copy any file of this machine, or any URL, that a request names
        block.async_move_resource_to_block_cache = no_files  # type: ignore[method-assign]
    return page.queue(max_size=GRADIO_QUEUE, api_open=False)


def follow_run(page: gr.Blocks, scheduler: Scheduler, facts: Facts, shown: Inputs) -> None:
    """Keep facts, curve and choices of checkpoints up to date, on loading and every few seconds."""
    seen = gr.State(None)

    def look(known: Any) -> list[Any]:
        weights = scheduler.weights
        now = replace(facts, step=weights.newest) if isinstance(weights.newest, int) else facts
        choices, texts = weights.choices(), [now.html(), now.live()]
        if choices == known:  # a new list would close an open one
            return [*texts, *(gr.skip() for _ in shown[2:]), known]
        updates = [gr.update(choices=choices) for _ in shown[2:]]
        if known is None and len(choices) > 2 and len(updates) > 1:  # on loading: the oldest on the left
            oldest = min((name for _, name in choices if name.isdecimal()), key=int)
            updates[1] = gr.update(choices=choices, value=oldest)
        return [*texts, *updates, choices]

    page.load(look, seen, [*shown, seen], **QUICK)
    gr.Timer(SECONDS_TO_LOOK).tick(look, seen, [*shown, seen], **QUICK)


async def no_files(*_: Any) -> str:
    raise gr.Error("this page accepts no files", print_exception=False)


def settings(scheduler: Scheduler) -> tuple[gr.Radio, Inputs]:
    """Add presets and inputs for the numbers. Returns both, the inputs in the order of `NUMBERS`."""
    longest, (temperature, top_p, top_k, penalty) = scheduler.max_new_tokens, PRESETS[START]
    preset = gr.Radio([*PRESETS, CUSTOM], value=START, label="Preset", elem_id="preset")
    sliders = [
        gr.Slider(
            *RANGES["temperature"],
            temperature,
            step=0.05,
            label="Temperature",
            info="0: greedy",
            elem_id="temperature",
        ),
        gr.Slider(*RANGES["top_p"], top_p, step=0.01, label="Top-p"),
        gr.Slider(0, 200, top_k, step=1, label="Top-k", info="0: all tokens"),
        gr.Slider(*RANGES["repetition_penalty"], penalty, step=0.05, label="Repetition penalty", info="1: none"),
    ]
    # Gradio's slider needs two distinct values
    length = gr.Slider(
        min(1, longest - 1), longest, min(200, longest), step=1, label="Max new tokens", elem_id="length"
    )
    # a text field, because Gradio reads an empty number field as 0
    seed = gr.Textbox(label="Seed", placeholder="empty: a new seed every time", max_lines=1, elem_id="seed")
    min_p = gr.Slider(*RANGES["min_p"], 0, step=0.01, label="Min-p", info="0: off", elem_id="min-p")
    stop = gr.Textbox(
        label="Stop strings", placeholder="one per line; \\n is a line break", lines=1, max_lines=4,
        elem_id="stop-strings",
    )  # fmt: skip
    # .input, not .change: presets and sliders set each other only if a person changes them
    table = json.dumps(PRESETS)
    chosen = f"(name, ...now) => ({table})[name] ?? now"
    preset.input(None, [preset, *sliders], sliders, js=chosen, **BROWSER)
    for slider in sliders:
        slider.input(None, sliders, preset, js=f"(...v) => window.notebook.preset(v, {table})", **BROWSER)
    return preset, [*sliders, length, seed, min_p, stop]


def notebook(handlers: Handlers, given: Inputs, weights: gr.Dropdown, openings: Sequence[str]) -> gr.Textbox:
    """Add the text box and its buttons, and return the text box."""
    before = gr.Textbox(visible=False)  # the text before the last continuation, from page.js
    sheet = gr.Textbox(
        lines=14, max_lines=20, label="Text", elem_id="sheet", buttons=["copy"], interactive=True,
        placeholder="Write how a text begins, then press Continue.",
    )  # fmt: skip
    with gr.Row(elem_id="line"):
        line = gr.Markdown("", elem_id="status")
        count = gr.Markdown("", elem_id="count")
        link = gr.Button("Copy link", size="sm", elem_id="link", scale=0, min_width=110)
    link.click(None, [sheet, *given], line, js="(...v) => window.notebook.link(v)", **BROWSER)
    sheet.change(handlers.count, sheet, count, trigger_mode="always_last", **QUICK)
    look = gr.Button("Look up", elem_id="look-up")  # pressed by tokens.js alone
    found = gr.Textbox(visible=False)
    looked = look.click(handlers.look_up, [sheet, weights], found, concurrency_limit=None, **BROWSER)
    looked.then(None, found, None, js="(found) => window.tokens.found(found)", **BROWSER)
    undo, redo = controls(
        "Continue", handlers.continue_text, handlers.rewrite_text, handlers, redo=True,
        inputs=[sheet, before], numbers=[*given[1:], weights], outputs=[sheet, line],
        scripts=("begin", "beginAgain", "end"), sent="(sheet, _, ...v) => [sheet, window.notebook.before(), ...v]",
    )  # fmt: skip
    for button, script in ((undo, "undo"), (redo, "redo")):
        button.click(None, None, [sheet, line], js=f"() => window.notebook.{script}()", **BROWSER)  # type: ignore[union-attr]
    with gr.Row(elem_id="openings", elem_classes="chips"):
        gr.Markdown("Openings")
        for opening in openings:
            chip = gr.Button(opening.split("\n")[0], size="sm")
            js = f"() => window.notebook.open({json.dumps(opening)})"
            chip.click(None, None, [sheet, line], js=js, **BROWSER)
    return sheet


def chat(page: gr.Blocks, handlers: Handlers, numbers: Inputs, questions: Sequence[str]) -> None:
    """Add a conversation under the model's chat template."""
    talk = gr.JSON([], visible=False)
    # Gradio's own buttons would copy the escaped text
    view = gr.Chatbot(
        height="clamp(15rem, 100vh - 39rem, 60rem)", render_markdown=False, buttons=[],
        label="Conversation", show_label=False, feedback_options=None, elem_id="chat-view",
        placeholder="Write a message below.",
    )  # fmt: skip
    with gr.Row(elem_id="chat-line"):
        line = gr.Markdown("", elem_id="chat-status")
        shown = gr.Checkbox(True, label="Markdown", elem_id="markdown", container=False, scale=0, min_width=110)
        copy = gr.Button("Copy answer", size="sm", elem_id="copy", scale=0, min_width=110)
    copy.click(None, js="() => window.copyAnswer()", **PRIVATE)
    shown.change(None, shown, None, js="(on) => window.notebook.markdown(on)", **BROWSER)
    page.load(None, shown, shown, js="(on) => window.notebook.restoreMarkdown(on)", **BROWSER)
    system = gr.Textbox(
        label="System prompt", lines=1, max_lines=6, elem_id="system",
        placeholder="What the model is and how it answers. Empty: as the template has it",
    )  # fmt: skip
    box = gr.Textbox(label="Message", lines=1, max_lines=6, elem_id="message", placeholder="Press Enter to send")
    held, save = [box, talk], "(...v) => window.notebook.endChat(...v)"
    view.clear(lambda: ([], ""), None, [talk, line], **QUICK).then(None, held, None, js=save, **BROWSER)
    outputs = [view, line, talk, box]
    (undo,) = controls(
        "Send", handlers.answer, handlers.answer_again, handlers,
        inputs=held, numbers=[*numbers, system], outputs=outputs, enter=[box], edits=view,
        scripts=("beginChat", "beginChat", "endChat"),
    )  # fmt: skip
    undo.click(handlers.undo_answer, held, outputs, **QUICK).then(None, held, None, js=save, **BROWSER)
    with gr.Row(elem_id="questions", elem_classes="chips"):
        gr.Markdown("Questions")
        for question in questions:
            chip = gr.Button(question.split("\n")[0], size="sm")
            js = f"(typed) => window.notebook.ask(typed, {json.dumps(question)}, {json.dumps(questions)})"
            chip.click(None, box, box, js=js, **BROWSER)
    restored = page.load(
        None, [*held, system], [*held, system], js="(...v) => window.notebook.restoreTalk(...v)", **BROWSER
    )
    restored.then(handlers.show_talk, talk, view, **QUICK)


def controls(
    verb: str, write: Any, write_again: Any, handlers: Handlers, *, inputs: list[Any], numbers: Inputs,
    outputs: list[Any], scripts: tuple[str, str, str], sent: str | None = None,
    enter: Sequence[gr.Textbox] = (), redo: bool = False, edits: gr.Chatbot | None = None,
) -> tuple[gr.Button, ...]:  # fmt: skip
    """Add the buttons that write, stop, undo and regenerate. Enter in a box of `enter` writes too.

    `scripts` of page.js run when writing begins, when regenerating begins, and when either ends. The last script
    gets the values of `inputs`. `sent` changes what the server gets. Returns Undo and, if `redo`, Redo.
    """
    with gr.Row(elem_classes="buttons"):
        go = gr.Button(verb, variant="primary", elem_id=verb.lower())
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"stop-{verb.lower()}")
        undo = gr.Button("Undo", elem_id=f"undo-{verb.lower()}")
        back = [undo, *([gr.Button("Redo", elem_id=f"redo-{verb.lower()}")] if redo else [])]
        again = gr.Button("Regenerate", elem_id=f"again-{verb.lower()}")

    switched = [go, stop, *back, again, *enter]

    def buttons(working: bool) -> list[Any]:
        others = [gr.update(interactive=not working) for _ in switched[2:]]
        return [gr.update(visible=not working), gr.update(visible=working), *others]

    def pressed(request: gr.Request) -> list[Any]:
        handlers.begin(request)
        return buttons(True)

    presses = [
        (partial(gr.on, [go.click, *(box.submit for box in enter)]), write, scripts[0], inputs),
        (partial(gr.on, [again.click]), write_again, scripts[1], inputs),
    ]
    if edits is not None:
        edit = gr.JSON(visible=False)
        begun = edits.edit(handlers.edited, None, edit, **QUICK)
        presses.append((begun.then, handlers.answer_edited, scripts[0], [edit, *inputs[1:]]))
    for press, prepare, begins, sends in presses:
        event = press(pressed, None, switched, js=f"() => window.notebook.{begins}()", **QUICK).then(
            handlers.writer(prepare), [*sends, *numbers], outputs, js=sent,
            show_progress="hidden", concurrency_limit=None, **PRIVATE,
        )  # fmt: skip
        end = f"(...v) => window.notebook.{scripts[2]}(...v)"
        event.success(lambda: buttons(False), None, switched, **QUICK)
        # .then does not run after a failure
        event.failure(lambda: [*buttons(False), ""], None, [*switched, outputs[1]], **QUICK)
        for ended in (event.success, event.failure):
            ended(None, inputs, None, js=end, **BROWSER)
    stop.click(handlers.stop, None, None, **QUICK)
    return tuple(back)

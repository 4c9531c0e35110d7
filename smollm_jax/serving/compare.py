"""The tab that continues one text by two checkpoints of a run, with the same settings and seed."""

import contextlib
from typing import Any

import gradio as gr

from smollm_jax.serving.handlers import (
    REASONS,
    SILENCE_SECONDS,
    Growth,
    Handlers,
    of,
    shown_errors,
    status_line,
    with_silences,
)
from smollm_jax.serving.weights import NEWEST

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK = PRIVATE | {"queue": False}
SIDES = ("left", "right")


def comparison(page: gr.Blocks, handlers: Handlers, numbers: list[Any], opening: str) -> list[gr.Dropdown]:
    """Add the tab's components. Returns the two pickers, whose choices the page keeps up to date."""
    prompt = gr.Textbox(
        opening, lines=3, max_lines=8, label="Prompt", elem_id="compare-prompt",
        placeholder="Write how a text begins, then press Compare.",
    )  # fmt: skip
    pickers, texts, lines = list[gr.Dropdown](), [], []
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-compare")
    with gr.Row():
        for side in SIDES:
            with gr.Column(min_width=280):
                pickers.append(picker(handlers, f"Checkpoint on the {side}", elem_id=f"weights-{side}"))
                text = gr.Textbox(
                    lines=8, max_lines=20, show_label=False, interactive=False, elem_id=f"text-{side}"
                )
                texts.append(text)
                lines.append(gr.Markdown("", elem_id=f"{side}-status"))
    switched = [go, stop]

    def buttons(working: bool) -> list[Any]:
        return [gr.update(visible=not working), gr.update(visible=working)]

    def pressed(request: gr.Request) -> list[Any]:
        handlers.begin(request)
        return buttons(True)

    event = go.click(pressed, None, switched, **QUICK).then(
        comparer(handlers), [prompt, *pickers, *numbers], [*texts, *lines], concurrency_limit=None, **PRIVATE
    )
    event.success(lambda: buttons(False), None, switched, **QUICK)
    event.failure(lambda: [*buttons(False), "", ""], None, [*switched, *lines], **QUICK)
    stop.click(handlers.stop, None, None, **QUICK)
    page.load(None, prompt, prompt, js="(text) => window.notebook.restoreComparison(text)", **PRIVATE)
    return pickers


def picker(handlers: Handlers, label: str, **more: Any) -> gr.Dropdown:
    """Return a picker of the weights of a run. A model that is no run has one choice."""
    choices = handlers.scheduler.weights.choices() or [("Newest", NEWEST)]
    made = gr.Dropdown(choices, value=NEWEST, label=label, filterable=False, **more)  # type: ignore[arg-type]
    made.preprocess = lambda payload: payload  # type: ignore[method-assign, assignment]  # the scheduler checks it
    return made


def comparer(handlers: Handlers) -> Any:
    """Return a handler that continues a prompt by the weights on the left, then by the weights on the right."""

    async def compare(prompt: str, left: str, right: str, request: gr.Request, *numbers: Any) -> Growth:
        with shown_errors():
            scheduler = handlers.scheduler
            ids = await scheduler.in_turn(scheduler.encode, prompt)
            sampling, stops, _ = handlers.checked([*numbers, NEWEST])  # one seed, if none is given
            texts, lines = ["", ""], ["reading the prompt…", "waiting for the left…"]
            yield *texts, *lines
            for at, weights in enumerate((left, right)):
                if at:  # a Stop may come while its weights are loaded
                    scheduler.announce(str(of(request)["owner"]))
                stream = scheduler.stream(ids, sampling, stops, **of(request), weights=weights)
                async with contextlib.aclosing(with_silences(stream, SILENCE_SECONDS)) as chunks:
                    async for chunk in chunks:
                        if chunk is None:
                            lines[at] = lines[at] if texts[at] else handlers.waiting_line(of(request)["owner"])
                        else:
                            texts[at] += chunk.text.replace("\0", "")
                            lines[at] = status_line(chunk, sampling.seed)
                        yield *texts, *lines
                if lines[at].endswith(REASONS["cancelled"]):
                    lines[1] = lines[1] if at else ""
                    yield *texts, *lines
                    return

    return compare

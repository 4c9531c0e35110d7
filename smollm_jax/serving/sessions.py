"""Limit Gradio to few sessions, no unread events, and no request in the log.

By default, Gradio keeps 10,000 sessions and prints the inputs of a failed request. It runs an event to its end
even if nobody fetches its messages. Only this file knows the internals of Gradio's queue.
"""

import asyncio
import time
from typing import Any

import gradio as gr

from smollm_jax.runtime.errors import one_line, say
from smollm_jax.serving.guard import place_of
from smollm_jax.serving.handlers import LOOKS
from smollm_jax.serving.openai_errors import error_response
from smollm_jax.serving.scheduler import Scheduler

MOST_SESSIONS = 200  # of visitors, with their last inputs
LOOK_SECONDS = 0.02  # between looks of Gradio's queue for events: 0.001 takes 3 % of a core for nobody
UNREAD_SECONDS = 5  # for a client to fetch the next message of its event


def keep_little(page: gr.Blocks) -> None:
    """Limit sessions, and log a failed event in one line without its inputs. Call this before mounting."""
    page.state_session_capacity = MOST_SESSIONS
    process, queue, send = page.process_api, page._queue, page._queue.send_message

    async def process_api(*arguments: Any, **named: Any) -> Any:
        try:
            return await process(*arguments, **named)
        except gr.Error as error:
            error.print_exception = False  # a component's own error quotes the request
            raise
        except Exception as error:
            say(f"a request to the page failed: {place_of(error)}")
            raise gr.Error("the page does not take this request", print_exception=False) from None

    def send_message(event: Any, message: Any) -> None:
        if event.session_hash in queue.pending_messages_per_session:
            send(event, message)
        else:  # a session ended by `end_unread`, or the oldest of too many
            event.alive = False

    queue.sleep_when_free = queue.progress_update_sleep_when_free = LOOK_SECONDS
    page.process_api = process_api  # type: ignore[method-assign]
    queue.send_message = send_message  # type: ignore[assignment, method-assign]


def refuse_clearly(mounted: Any) -> None:
    """Let Gradio's app refuse a request that it fails on, such as an unknown function."""

    async def refuse(_: Any, __: Exception) -> Any:
        return error_response(400, "the page does not take this request")

    mounted.add_exception_handler(Exception, refuse)


async def end_unread(page: gr.Blocks, scheduler: Scheduler) -> None:
    """End a session's events if its next message has waited for `UNREAD_SECONDS`. Runs until cancelled."""
    waiting: dict[str, tuple[Any, float]] = {}  # a session's next message, and since when it waits
    while True:
        await asyncio.sleep(UNREAD_SECONDS / 5)
        now, pending = time.monotonic(), page._queue.pending_messages_per_session
        heads = {name: messages._queue[0] for name, messages in pending.items() if messages.qsize()}  # type: ignore[attr-defined]
        waiting = {
            name: waiting[name] if name in waiting and waiting[name][0] is head else (head, now)
            for name, head in heads.items()
        }
        try:
            await _end(
                page, scheduler, [name for name, (_, since) in waiting.items() if now - since > UNREAD_SECONDS]
            )
        except Exception as error:  # an error of Gradio's internals. The next round may work
            say(f"events that nobody reads could not be ended: {one_line(error)}")


async def _end(page: gr.Blocks, scheduler: Scheduler, names: list[str]) -> None:
    """End the events of some sessions, and forget sessions without events."""
    queue = page._queue
    pending = queue.pending_messages_per_session
    for name in names:
        for owner in (name, f"{LOOKS}{name}"):
            scheduler.cancel(owner)
        await queue.clean_events(session_hash=name)
        pending.pop(name, None)
        if name in queue.pending_event_ids_session.pop(name, ()):  # a call without session has its event id
            page.state_holder.session_data.pop(name, None)
    for name in [name for name, ids in queue.pending_event_ids_session.items() if not ids]:
        if name not in pending:
            del queue.pending_event_ids_session[name]

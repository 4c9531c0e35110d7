"""Join the parts of choices to whole texts, or send them as server-sent events."""

import contextlib
import json
from collections.abc import AsyncGenerator

from smollm_jax.serving.openai_choices import Form, Part, usage
from smollm_jax.serving.openai_errors import Body, error_body


async def gathered(parts: AsyncGenerator[Part, None], count: int) -> list[Part]:
    """Return the whole choices."""
    found: list[list[Part]] = [[] for _ in range(count)]
    async with contextlib.aclosing(parts):
        async for part in parts:
            found[part.number].append(part)
    return [
        Part(i, "".join(one.text for one in of), [token for one in of for token in one.tokens], *of[-1][3:])
        for i, of in enumerate(found)
    ]


async def events_of(
    head: Body, form: Form, first: Part, parts: AsyncGenerator[Part, None], top: int | None
) -> AsyncGenerator[tuple[str, int], None]:
    """Yield the events of a stream, and how many new tokens each adds. An error is the last event."""
    made: dict[int, int] = {}

    def event(part: Part) -> tuple[str, int]:
        new, is_first = part.made - made.get(part.number, 0), part.number not in made
        made[part.number] = part.made
        return event_of(head | {"choices": [form.delta(part, top, is_first=is_first)]}), new

    async with contextlib.aclosing(parts):
        yield event(first)
        try:
            async for part in parts:
                yield event(part)
        except (RuntimeError, ValueError) as error:
            yield event_of(error_body(500, str(error))), -1


async def with_end(
    events: AsyncGenerator[tuple[str, int], None], head: Body, prompt_tokens: int, *, with_usage: bool
) -> AsyncGenerator[str, None]:
    total = 0
    async with contextlib.aclosing(events):
        async for event, made in events:
            yield event
            if made < 0:
                return
            total += made
    if with_usage:
        yield event_of(head | {"choices": [], "usage": usage(prompt_tokens, total)})
    yield "data: [DONE]\n\n"


def event_of(data: Body) -> str:
    return f"data: {json.dumps(data)}\n\n"

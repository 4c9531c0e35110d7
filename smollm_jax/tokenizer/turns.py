"""Encode whole conversations, and mark the tokens that training counts.

The spans come from rendered prefixes: the text up to a turn must begin the text of the whole conversation. Few
templates mark the assistant's words themselves. SmolLM2's does not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.chat_template import Turns, encode_rendered, render_chat, template_arguments
from smollm_jax.tokenizer.tokenizer import Tokenizer

LossOn = Literal["assistant", "all"]


class TemplateMisfit(UserError):
    """A template that renders a turn otherwise if more turns follow. No span can be found."""


class Rendered(NamedTuple):
    """A conversation as text: what is trained, and where it may be cut, in characters."""

    text: str
    trained: list[tuple[int, int]]
    ends: list[int]


class Trainable(NamedTuple):
    """A conversation as `ids` int32 (n,), of which the `trained` bool (n,) count. `ends` are the ends of turns."""

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray


def render_turns(tokenizer: Tokenizer, messages: Turns, *, loss_on: LossOn, trained_from: int = 0) -> Rendered:
    """Render a conversation, and find the assistant's words from message `trained_from` on.

    A span ends with the special token that ends the turn. With `loss_on="all"` everything is trained. Raises
    `TemplateMisfit`, or `UserError` if the template refuses.
    """
    template, turns, names = template_arguments(tokenizer, messages)
    render = partial(render_chat, template, names=names)
    whole = render(turns, add_generation_prompt=False)
    trained, ends = [], []
    for number, turn in enumerate(turns):
        is_assistant = turn["role"] == "assistant"
        if turn["role"] == "system" or (loss_on == "assistant" and (not is_assistant or number < trained_from)):
            continue
        upto = whole if number + 1 == len(turns) else render(turns[: number + 1], add_generation_prompt=False)
        before = render(turns[:number]) if is_assistant else ""
        if not (whole.startswith(upto) and upto.startswith(before)):
            raise TemplateMisfit(f"it renders message {number + 1} otherwise if more messages follow")
        ends.append(len(upto))
        if loss_on == "assistant":
            trained.append((len(before), _end_of_turn(tokenizer, upto, len(before))))
    return Rendered(whole, trained if loss_on == "assistant" else [(0, len(whole))], ends)


def encode_turns(tokenizer: Tokenizer, conversations: Sequence[Rendered]) -> list[Trainable]:
    """Return the ids of rendered conversations with what is trained. A token of a span's first letter counts."""
    found = []
    encoded = encode_rendered(tokenizer, [one.text for one in conversations])
    for rendered, (ids, begin, end) in zip(conversations, encoded, strict=True):
        trained = np.zeros(len(ids), bool)
        for first, last in rendered.trained:
            trained[np.searchsorted(end, first, "right") : np.searchsorted(begin, last, "left")] = True
        found.append(Trainable(ids, trained, np.searchsorted(begin, rendered.ends, "left")))
    return found


def turn_end(tokenizer: Tokenizer) -> int | None:
    """Return the id of the special token with which the template ends an assistant's turn. None if with none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (one,) = encode_turns(tokenizer, [render_turns(tokenizer, messages, loss_on="assistant")])
    last = int(one.ids[one.trained][-1]) if one.trained.any() else -1
    return last if last in tokenizer.special_tokens.values() else None


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int) -> int:
    """Return the end of a turn's last special token, if white space follows. Else the text's end."""
    ends = [at + len(token) for token in tokenizer.special_tokens if (at := text.rfind(token, start)) >= 0]
    end = max(ends, default=len(text))
    return len(text) if text[end:].strip() else end

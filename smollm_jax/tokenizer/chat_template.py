"""Encode conversations to token ids with the chat template of a tokenizer.

The template comes with the model, from anywhere, so it runs in jinja's sandbox. The special tokens of the template
become ids. The same characters in a message stay text, unless the tokenizer is told to parse them. So no message
can end its own turn.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

import numpy as np

from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import Encoded, SpecialTokens, Tokenizer

# a noncharacter code point, inserted into text that would otherwise match a special token
MARK = "\ufdd0"


Turns = Sequence[dict[str, str]]
Render = Callable[[str, Turns, dict[str, str]], str]  # of a template, a conversation and the named tokens


def encode_chat(
    tokenizer: Tokenizer,
    messages: Turns,
    special_tokens: SpecialTokens | None = None,
    *,
    render: Render | None = None,
) -> list[int]:
    """Return the ids of a conversation up to the assistant's turn. A message has a role and content.

    `render` may put limits on the template. Raises `UserError` if there is no template, or the template refuses.
    """
    template, turns, names = template_arguments(tokenizer, messages, special_tokens)
    text = (render or render_chat)(template, turns, names)
    return encode_rendered(tokenizer, [text])[0].ids.tolist()


def template_arguments(
    tokenizer: Tokenizer, messages: Turns, special_tokens: SpecialTokens | None = None
) -> tuple[str, Turns, dict[str, str]]:
    """Return the first arguments of `render_chat`: the template, the turns and the named tokens.

    A special token that a message spells out is marked, unless special tokens are parsed.
    """
    require(bool(tokenizer.chat_template), "this model has no chat template; it completes text")
    special = tokenizer.special_tokens
    if (special_tokens or tokenizer.mode) != "parse":
        messages = [{key: _mark(value, special) for key, value in message.items()} for message in messages]
    return str(tokenizer.chat_template), messages, tokenizer.named_tokens


def encode_rendered(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Return the ids of rendered texts, and the characters that each id stands for."""
    # in one piece, because some tokenizers encode the start of a text differently
    whole = iter(tokenizer.encode_parts([text for text in texts if MARK not in text], "parse"))
    return [_encode_marked(tokenizer, text) if MARK in text else next(whole) for text in texts]


def _encode_marked(tokenizer: Tokenizer, text: str) -> Encoded:
    """Encode a text in parts: a special token without a mark in it is its id, anything else is text."""
    special, at = tokenizer.special_tokens, 0
    # the longest first, for special tokens that begin at the same place
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    found: list[Encoded] = []
    for part in filter(None, re.split(f"({pattern})", text)):
        if part in special:
            found.append(Encoded(*(np.array([number]) for number in (special[part], at, at + len(part)))))
        else:
            (encoded,) = tokenizer.encode_parts([part.replace(MARK, "")], "text")
            place = np.array([i for i, letter in enumerate(part) if letter != MARK] or [0]) + at
            last = len(place) - 1
            begin, end = (np.clip(x, 0, last) for x in (encoded.begin, encoded.end - 1))
            found.append(Encoded(encoded.ids, place[begin], place[end] + 1))
        at += len(part)
    return Encoded(*(np.concatenate(arrays).astype(np.int32) for arrays in zip(*found, strict=True)))


@lru_cache(maxsize=16)
def _program(template: str) -> Any:
    return _environment().from_string(template)


def render_chat(
    template: str, messages: Turns, names: dict[str, str], *, add_generation_prompt: bool = True
) -> str:
    """Return the text of a conversation, up to the assistant's turn if there is an `add_generation_prompt`.

    Raises `UserError` if the template refuses.
    """
    try:
        text = _program(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **names
        )
        text.encode()  # raises for half of a UTF-16 pair, which no tokenizer takes
        return text
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"the chat template refuses this conversation: {one_line(error)}") from None


@cache
def _environment() -> Any:
    """Return jinja's sandbox with what transformers adds to the language of templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Support `{% generation %}`, which marks the assistant's words for training. Here it shows them."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    # blocks are trimmed as in transformers, because templates are written for it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    environment.filters["tojson"] = to_json
    return environment


def _mark(text: str, special: dict[str, int]) -> str:
    text = text.replace(MARK, "")
    for token in special:
        text = text.replace(token, token[0] + MARK + token[1:])
    return text

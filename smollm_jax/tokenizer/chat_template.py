"""Encode conversations to token ids with the chat template of a tokenizer.

The template comes with the model, from anywhere, so it runs in jinja's sandbox. The special tokens of the template
become ids. The same characters in a message stay text, unless the tokenizer is told to parse them. So no message
can end its own turn.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import NAMED_TOKENS, SpecialTokens, Tokenizer, token_text

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
    require(bool(tokenizer.chat_template), "this model has no chat template; it completes text")
    special = tokenizer.special_tokens
    marked = [{key: _mark(value, special) for key, value in message.items()} for message in messages]
    found = {name: token_text(tokenizer.settings.get(name)) for name in NAMED_TOKENS}
    names = {name: text for name, text in found.items() if text}
    turns = messages if (special_tokens or tokenizer.mode) == "parse" else marked
    text = (render or render_chat)(str(tokenizer.chat_template), turns, names)
    if MARK not in text:  # in one piece, because some tokenizers encode the start of a text differently
        return tokenizer.encode_part(text, "parse")
    # the longest first, for special tokens that begin at the same place
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if special else [text]:
        ids += [special[part]] if part in special else tokenizer.encode_part(part.replace(MARK, ""), "text")
    return ids


def render_chat(template: str, messages: Turns, names: dict[str, str]) -> str:
    """Return the text of a conversation up to the assistant's turn. Raises `UserError` if the template refuses."""
    try:
        program = _environment().from_string(template)
        text = program.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **names)
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

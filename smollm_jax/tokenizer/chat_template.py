"""Encode conversations to token ids with the chat template of a tokenizer.

The template comes with the model, from anywhere, so it runs in jinja's sandbox. The special tokens of the
template become ids. The same characters in a message stay text, so that no message can end its own turn.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial

from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import Tokenizer, token_text

# a noncharacter code point, inserted into text that would otherwise match a special token
MARK = "\ufdd0"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


Turns = Sequence[dict[str, str]]
Render = Callable[[str, Turns, dict[str, str]], str]  # of a template, a conversation and the named tokens


def encode_chat(tokenizer: Tokenizer, messages: Turns, *, render: Render | None = None) -> list[int]:
    """Return the ids of a conversation up to the assistant's turn; a message has a role and content.

    `render` may put limits on the template. Raises `UserError` if there is no template, or the template refuses.
    """
    require(bool(tokenizer.chat_template), "this model has no chat template; it completes text")
    special = tokenizer.special_tokens
    marked = [{key: _mark(value, special) for key, value in message.items()} for message in messages]
    names = {name: token_text(tokenizer.settings.get(name)) for name in NAMED_TOKENS}
    return _encode(tokenizer, (render or render_chat)(str(tokenizer.chat_template), marked, names), special)


def render_chat(template: str, messages: Turns, names: dict[str, str]) -> str:
    """Return the text of a conversation up to the assistant's turn; raises `UserError` if the template refuses."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # blocks are trimmed as in transformers, because templates are written for it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"the chat template refuses this conversation: {one_line(error)}") from None


def _encode(tokenizer: Tokenizer, text: str, special: dict[str, int]) -> list[int]:
    # the longest first, for special tokens that begin at the same place
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    ids: list[int] = []
    for part in re.split(f"({pattern})", text) if special else [text]:
        ids += [special[part]] if part in special else tokenizer.encode(part.replace(MARK, "")).tolist()
    return ids


def _mark(text: str, special: dict[str, int]) -> str:
    text = text.replace(MARK, "")
    for token in special:
        text = text.replace(token, token[0] + MARK + token[1:])
    return text

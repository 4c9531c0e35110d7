"""A conversation as the browser keeps it, and as the chatbot shows it."""

import html
from typing import Any

from smollm_jax.runtime.errors import require
from smollm_jax.serving.markdown import answer_html

Turn = dict[str, str]  # role and content


def checked_talk(talk: Any) -> list[Turn]:
    """Return the turns that a browser has sent. Raises `UserError` unless user and assistant alternate."""
    turns = [] if talk is None else talk
    good = isinstance(turns, list) and len(turns) % 2 == 0
    for i, turn in enumerate(turns if good else ()):
        good = good and isinstance(turn, dict) and set(turn) == {"role", "content"}
        good = good and turn["role"] == ("user", "assistant")[i % 2] and isinstance(turn["content"], str)
    require(good, "the conversation is damaged; clear it and begin anew")
    return turns


def escaped(talk: list[Turn]) -> list[Turn]:
    """Return a conversation as HTML that fetches nothing, because the chatbot renders HTML."""
    shown = {
        "user": lambda text: html.escape(text, quote=False),
        "assistant": lambda text: answer_html(text or "…"),
    }
    return [turn | {"content": shown[turn["role"]](turn["content"])} for turn in talk]

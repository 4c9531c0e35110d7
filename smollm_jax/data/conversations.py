"""Read a row as a conversation, in each of the usual formats.

`messages` are objects of role and content, `conversations` objects of from and value. A prompt with its completion
is a text or a list of messages each. After any system message, a user's and an assistant's turns alternate. A pair
has the columns `chosen` and `rejected`. They hold whole conversations that begin with one prompt, or answers to
the column `prompt`.
"""

import json
from dataclasses import dataclass
from typing import Any

from smollm_jax.runtime.errors import UserError, require

FORMATS = (("messages",), ("conversations",), ("prompt", "completion"))
PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages of role and content. The assistant's messages from `trained_from` on are for training.

    A pair has the chosen answer in its `messages`. Its `rejected` messages begin with the same prompt.
    """

    messages: tuple[dict[str, str], ...]
    trained_from: int = 0
    rejected: tuple[dict[str, str], ...] = ()

    @property
    def text(self) -> str:
        """Return the messages as JSON, by which copies are found."""
        both = [self.messages, self.rejected] if self.rejected else self.messages
        return json.dumps(both, ensure_ascii=False)


def format_of(columns: Any, formats: tuple[tuple[str, ...], ...] = PAIRS + FORMATS) -> tuple[str, ...]:
    """Return the columns of the first of `formats` that `columns` have. Empty if none."""
    return next((names for names in formats if all(name in columns for name in names)), ())


def conversation_of(row: dict[str, Any]) -> Conversation:
    """Return the conversation of a row. Raises `UserError` naming the message that is wrong."""
    names = format_of(row)
    if names in PAIRS:
        return _pair(row)
    if len(names) == 1:
        return Conversation(_ordered(_messages(row[names[0]], names[0])))
    prompt, completion = (_of_text(row[name], name) for name in names)
    return Conversation(_ordered([*prompt, *completion]), trained_from=len(prompt))


def _pair(row: dict[str, Any]) -> Conversation:
    """Return a pair. Whole conversations hold the prompt, so a text of it is not read."""
    given = row.get("prompt")
    whole = not isinstance(row["chosen"], str) and not isinstance(given, list)
    if not whole:
        require(given is not None, "chosen is a text without a prompt; expected the column 'prompt', or messages")
    before = [] if whole else _of_text(given, "prompt")
    chosen, rejected = (_ordered([*before, *_of_text(row[name], name)]) for name in ("chosen", "rejected"))
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    shared = min(same.index(False) if False in same else len(same), len(chosen) - 1, len(rejected) - 1)
    asks = shared > 0 and chosen[shared - 1]["role"] == "user"
    require(asks, "chosen and rejected answer no common prompt: they differ before an assistant's message")
    return Conversation(chosen, shared, rejected)


def _of_text(value: Any, name: str) -> list[dict[str, str]]:
    """Return the messages of a prompt or an answer, of which a text is one."""
    if isinstance(value, str):
        value = [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    require(isinstance(value, list), f"{name} is {type(value).__name__}, not a list of messages")
    require(len(value) > 0, f"{name} holds no message")
    messages = []
    for number, message in enumerate(value, 1):
        require(isinstance(message, dict), f"message {number} is {type(message).__name__}, not an object")
        keys = KEYS.get(name) or KEYS["messages"]
        if not all(key in message for key in keys):  # either spelling in either column
            keys = next((pair for pair in KEYS.values() if all(key in message for key in pair)), keys)
        missing = [key for key in keys if key not in message]
        require(not missing, f"message {number} has no {missing and missing[0]!r} but {', '.join(message)}")
        role, content = (message[key] for key in keys)
        known = isinstance(role, str) and role in ROLES
        require(known, f"message {number} has the role {role!r:.40}; known are {', '.join(ROLES)}")
        require(isinstance(content, str), f"message {number}: {keys[1]} is {type(content).__name__}, not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _ordered(messages: list[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """Raise `UserError` unless a user's and an assistant's turns alternate after any system message."""
    first = 1 if messages[0]["role"] == "system" else 0
    if first == len(messages):
        raise UserError("it holds a system message alone")
    for number, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[number % 2]
        what = f"message {first + number + 1} is of the {message['role']} where the {expected}'s is due"
        require(message["role"] == expected, what)
    return tuple(messages)

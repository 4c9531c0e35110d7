"""Read a row as a conversation, in each of the usual formats.

`messages` are objects of role and content, `conversations` objects of from and value. A prompt with its completion
is a text or a list of messages each. After any system message, a user's and an assistant's turns alternate.
"""

import json
from dataclasses import dataclass
from typing import Any

from smollm_jax.runtime.errors import UserError, require

FORMATS = (("messages",), ("conversations",), ("prompt", "completion"))
KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages of role and content. The assistant's messages from `trained_from` on are for training."""

    messages: tuple[dict[str, str], ...]
    trained_from: int = 0

    @property
    def text(self) -> str:
        """Return the messages as JSON, by which copies are found."""
        return json.dumps(self.messages, ensure_ascii=False)


def format_of(columns: Any) -> tuple[str, ...]:
    """Return the columns of the first format that `columns` have. Empty if none."""
    return next((names for names in FORMATS if all(name in columns for name in names)), ())


def conversation_of(row: dict[str, Any]) -> Conversation:
    """Return the conversation of a row. Raises `UserError` naming the message that is wrong."""
    names = format_of(row)
    if len(names) == 1:
        return Conversation(_ordered(_messages(row[names[0]], names[0])))
    prompt, completion = (_of_text(row[name], name) for name in names)
    return Conversation(_ordered([*prompt, *completion]), trained_from=len(prompt))


def _of_text(value: Any, name: str) -> list[dict[str, str]]:
    """Return the messages of a prompt or completion, of which a text is one."""
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

"""Define a document: a text or a conversation, and where it comes from."""

from dataclasses import dataclass, field
from typing import Any

from smollm_jax.data.conversations import Conversation, conversation_of, format_of
from smollm_jax.data.readers import LONGEST_BYTES, TOO_LONG, Cursor
from smollm_jax.runtime.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text, and where it comes from. The text of a conversation is JSON."""

    text: str
    source: str
    file: str
    row: int
    cursor: Cursor = field(repr=False)
    """From here the next document follows."""
    kept: str = field(default="", repr=False)  # beginning of a text whose end is held out
    conversation: Conversation | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        """Return the text as people read it: of a conversation, the contents of its messages."""
        messages = self.conversation.messages if self.conversation else ()
        return "\n".join(message["content"] for message in messages) or self.text


def content_of(value: Any, column: str, *, chat: bool) -> tuple[str, Conversation | None, str]:
    """Return the text of a row's value, any conversation, and why the value cannot be used.

    A value is text, or with `chat` the columns of a row that may hold a conversation.
    """
    conversation = None
    if chat and isinstance(value, dict):
        if format_of(value):
            try:
                conversation = conversation_of(value)
            except UserError as error:
                return "", None, str(error)
        value = conversation.text if conversation else value.get(column)
    if not isinstance(value, str):
        return "", None, f"{column} is {type(value).__name__}, not text"
    what = "a message" if conversation else column
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        return "", None, f"{what} is not Unicode text: a lone surrogate"
    return value, conversation, TOO_LONG if len(value) > LONGEST_BYTES else ""

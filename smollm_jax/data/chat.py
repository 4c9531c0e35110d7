"""Turn conversations into tokens for a row, and mark the targets of the loss."""

import logging
from collections.abc import Sequence

import numpy as np

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.best_fit import context
from smollm_jax.data.documents import Document
from smollm_jax.runtime.errors import UserError, one_line
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import Rendered, TemplateMisfit, Trainable, encode_turns, render_turns

logger = logging.getLogger(__name__)
NOTHING = Rendered("", [], [])


def encode_conversations(
    documents: Sequence[Document], tokenizer: Tokenizer, settings: DataConfig
) -> list[Trainable]:
    """Encode conversations whole. One that the template refuses stops the run, or is empty and logged.

    Raises `UserError` naming file and row, and the template if it is at fault.
    """
    return encode_turns(tokenizer, [_rendered(document, tokenizer, settings) for document in documents])


def _rendered(document: Document, tokenizer: Tokenizer, settings: DataConfig) -> Rendered:
    conversation, place = document.conversation, f"{document.file}, row {document.row}"
    assert conversation is not None
    try:
        return render_turns(
            tokenizer, conversation.messages, loss_on=settings.loss_on, trained_from=conversation.trained_from
        )
    except TemplateMisfit as error:
        name = (
            f"the tokenizer {settings.tokenizer}" if settings.chat_template == "auto" else settings.chat_template
        )
        remedy = "give --chat-template chatml or a file"
        raise UserError(f"the chat template of {name} cannot be used: {error} ({place}); {remedy}") from None
    except UserError as error:
        if settings.on_bad_data == "stop":
            raise UserError(f"{place}: {error}; skip it with --on-bad-data skip, or repair it") from None
        logger.warning("skipped: %s: %s", place, one_line(error))
        return NOTHING


def spoken_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the UTF-8 bytes of text of each token as `fitted` gives it, int32 (n,). A special token has none."""
    return tokenizer.token_bytes[np.where(tokens < 0, ~tokens, tokens)]


def fitted(one: Trainable, size: int) -> np.ndarray:
    """Return int32 tokens (n,) for a row of `size`, with `context` for what is no target.

    What is longer is cut at the end of the last turn that fits. Empty if there is no target left.
    """
    length = len(one.ids)
    if length > size:
        length = max((int(end) for end in one.ends if end <= size), default=0)
    ids, trained = one.ids[:length], one.trained[:length]
    return np.where(trained, ids, context(ids)) if trained[1:].any() else ids[:0]

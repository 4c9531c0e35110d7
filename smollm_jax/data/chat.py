"""Turn conversations and pairs into tokens for a row, and mark the targets of the loss."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.best_fit import SECOND, context, ids_of
from smollm_jax.data.documents import Document
from smollm_jax.runtime.errors import UserError, one_line
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import Rendered, TemplateMisfit, Trainable, encode_turns, render_turns

logger = logging.getLogger(__name__)
NOTHING = Rendered("", [], [])


def encode_to_fit(
    documents: Sequence[Document], tokenizer: Tokenizer, settings: DataConfig
) -> list[tuple[np.ndarray, int]]:
    """Return the tokens of conversations or pairs, each with its length before any cut.

    The tokens are as `fitted` or `fitted_pair` gives them. Raises `UserError` as `encode_conversations` does.
    """
    size = settings.seq_len + 1
    if not settings.is_pairs:
        encoded = encode_conversations(documents, tokenizer, settings)
        return [(fitted(one, size), len(one.ids)) for one in encoded]
    answers = []
    for document in documents:
        pair = document.conversation
        assert pair is not None
        answers += [document, replace(document, conversation=replace(pair, messages=pair.rejected))]
    both = encode_conversations(answers, tokenizer, settings)
    pairs = zip(both[::2], both[1::2], strict=True)
    return [(fitted_pair(one, other, size), len(one.ids) + len(other.ids)) for one, other in pairs]


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
    return tokenizer.token_bytes[ids_of(tokens)]


def fitted(one: Trainable, size: int) -> np.ndarray:
    """Return int32 tokens (n,) for a row of `size`, with `context` for what is no target.

    What is longer is cut at the end of the last turn that fits. Empty if there is no target left.
    """
    length = len(one.ids)
    if length > size:
        length = max((int(end) for end in one.ends if end <= size), default=0)
    ids, trained = one.ids[:length], one.trained[:length]
    return np.where(trained, ids, context(ids)) if trained[1:].any() else ids[:0]


def fitted_pair(chosen: Trainable, rejected: Trainable, size: int) -> np.ndarray:
    """Return a pair's tokens for a row of `size`, int32 (n,): two segments for a `BestFitPacker`.

    If the row does not hold both, an answer's end is cut. Each keeps half of the row, or what the other leaves.
    Empty if the answers are then equal, or one has no target left.
    """
    lengths = [len(one.ids) for one in (chosen, rejected)]
    most = max(size // 2, size - min(lengths)) if sum(lengths) > size else size
    sides = [np.where(one.trained, one.ids, context(one.ids))[:most] for one in (chosen, rejected)]
    if np.array_equal(sides[0], sides[1]) or not all((side[1:] >= 0).any() for side in sides):
        return chosen.ids[:0]
    sides[1][0] = context(rejected.ids[0]) + np.int32(SECOND)
    return np.concatenate(sides)

"""Documents read in order: those that are never trained on, a whole source to be scored, a tokenizer's head.

What is held out is known by a hash of its text, so that a copy of it elsewhere in the data is left out too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.packing import Batch, pack
from smollm_jax.data.shuffle import text_hash, tokenised
from smollm_jax.data.sources import Document, mixture, open_source
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.tokenizer import Tokenizer

HELD_OUT_EVERY = 10  # one document in so many, from the head of a source, until there are enough


@dataclass(frozen=True)
class HeldOut:
    """Documents that are never trained on, and their tokens."""

    documents: list[Document]
    tokens: list[np.ndarray]
    seq_len: int

    @property
    def hashes(self) -> frozenset[int]:
        return frozenset(text_hash(document.text) for document in self.documents)

    def batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """The documents in rows, in the same order every time; the last batch is filled up with padding."""
        drawn = zip(self.documents, self.tokens, strict=True)
        return islice(pack(drawn, self.seq_len, batch_size), max_batches)


def heldout(config: DataConfig, tokenizer: Tokenizer, *, resumes: bool = False) -> HeldOut:
    """The first documents of `eval_data`, or every tenth from the head of the training sources.

    Raises `ValueError` when there are none, and what `open_source` and `Source.documents` raise.
    """
    documents = _held_out_documents(config, resumes=resumes)
    name = config.eval_data or config.data
    require(bool(documents), f"{name} has no document to hold out; give --eval-data, or --eval-documents 0")
    return HeldOut(documents, [ids for _, ids in tokenised(documents, tokenizer)], config.seq_len)


def plain_batches(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[Batch]:
    """The whole of `config.data` once, source after source, in order; only the last batch has padding.

    Raises what `open_source` and `Source.documents` raise.
    """
    documents = (d for spec, _ in mixture(config.data) for d in open_source(spec, config).documents())
    yield from pack(tokenised(documents, tokenizer), config.seq_len, batch_size)


def head_texts(config: DataConfig) -> Iterator[str]:
    """Texts from the head of each source, one of each in turn, but for the held-out ones."""
    documents = _held_out_documents(config) if config.eval_documents else []
    out = {text_hash(document.text) for document in documents}
    heads = [open_source(spec, config).documents() for spec, _ in mixture(config.data)]
    while heads:
        for head in list(heads):
            document = next(head, None)
            if document is None:
                heads.remove(head)
            elif text_hash(document.text) not in out:
                yield document.text


def _held_out_documents(config: DataConfig, *, resumes: bool = False) -> list[Document]:
    every = 1 if config.eval_data else HELD_OUT_EVERY
    documents: dict[int, Document] = {}
    for spec, weight in mixture(config.eval_data or config.data):
        wanted = max(1, round(config.eval_documents * weight))
        taken: dict[int, Document] = {}
        for i, document in enumerate(open_source(spec, config, resumes=resumes).documents(), 1):
            if i % every == 0:
                taken.setdefault(text_hash(document.text), document)
            if len(taken) == wanted:
                break
        documents = taken | documents
    return list(documents.values())

"""Read documents in order: to hold out, to score, or to train a tokenizer.

A held-out document is identified by a hash of its text, so its copies elsewhere are left out too.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import merge
from itertools import chain, islice, tee, zip_longest
from operator import itemgetter

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.best_fit import BestFitPacker
from smollm_jax.data.chat import spoken_bytes
from smollm_jax.data.documents import Document
from smollm_jax.data.packing import Batch, pack
from smollm_jax.data.shuffle import TokenizedDocument, exclusions, text_hash, tokenize, without
from smollm_jax.data.sources import mixture, open_source
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.tokenizer.tokenizer import Tokenizer

HELD_OUT_EVERY = 10  # every Nth document from the head of a source, until there are enough
LONGEST_END = 500_000  # characters held out of a single text


def held_out(config: DataConfig, tokenizer: Tokenizer, *, resumes: bool = False) -> list[TokenizedDocument]:
    """Hold out the first documents of `eval_data`, or every tenth of the training data.

    This tenth is from each source's head. In a source of fewer than ten documents, the end of the last is held
    out. The first N of a mixture have its shares for every N, as an evaluation may read only these. Returns none
    for `eval_documents=0`. Else raises `UserError` if there are none, or as `open_source` and `Source.documents`.
    """
    documents = _held_out_documents(config, resumes=resumes)
    name = config.eval_data or config.data
    if config.eval_documents and not documents:
        count = sum(1 for _ in islice(chain.from_iterable(_all_documents(config, name)), HELD_OUT_EVERY))
        require(count > 0, f"{name} holds no document; is it the right file?")
        few = f"{name} holds {count} documents, too few to hold any out"
        lines = "; in a .txt file a blank line ends a document, and a file without one is one document"
        raise UserError(f"{few}{lines if '.txt' in name else ''}; give --eval-data, or --eval-documents 0")
    return [one for one in tokenize(documents, tokenizer, config) if len(one[1])]


def batches_in_order(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[Batch]:
    """Yield all of `config.data` once, a mixture in its shares, to be scored.

    Only the last batch has padding. Raises as `open_source` and `Source.documents` do.
    """
    sources = [_ranked(open_source(spec, config).documents(), weight) for spec, weight in mixture(config.data)]
    documents = (document for _, document in merge(*sources, key=itemgetter(0)))
    found = (one for one in tokenize(documents, tokenizer, config) if len(one[1]))
    yield from pack_to_score(found, tokenizer, config.seq_len, batch_size, chat=config.is_chat)


def pack_to_score(
    documents: Iterable[TokenizedDocument], tokenizer: Tokenizer, seq_len: int, batch_size: int,
    *, chat: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Yield batches as `pack` does, with their `text_bytes`. `chat` data is packed by a `BestFitPacker`."""
    documents, again = tee(documents)
    counted = (
        (document, spoken_bytes(ids, tokenizer))
        if chat and document.conversation
        else (document, tokenizer.byte_counts(document.text, ids))
        for document, ids in again
    )
    packed = (pack(x, seq_len, batch_size, BestFitPacker(seq_len) if chat else None) for x in (documents, counted))
    return (replace(batch, text_bytes=counts.tokens) for batch, counts in zip(*packed, strict=True))


def _all_documents(config: DataConfig, data: str) -> Iterator[Iterator[Document]]:
    """Yield the documents of each source."""
    return (open_source(spec, config).documents() for spec, _ in mixture(data))


def head_texts(config: DataConfig) -> Iterator[str]:
    """Yield texts from the head of each source in turn, without the held-out texts."""
    excluded = exclusions(_held_out_documents(config))
    documents = chain.from_iterable(zip_longest(*_all_documents(config, config.data)))
    yield from (document.words for document in without(excluded, filter(None, documents)))


def _held_out_documents(config: DataConfig, *, resumes: bool = False) -> list[Document]:
    every = 1 if config.eval_data else HELD_OUT_EVERY
    documents: dict[int, tuple[float, Document]] = {}
    for spec, weight in mixture(config.eval_data or config.data) if config.eval_documents else ():
        wanted = max(1, round(config.eval_documents * weight))
        chosen: dict[int, Document] = {}
        for document in islice(open_source(spec, config, resumes=resumes).documents(), every - 1, None, every):
            chosen.setdefault(text_hash(document.text), document)
            if len(chosen) == wanted:
                break
        if not chosen and not config.eval_data and not config.is_chat:
            chosen = _end_of(open_source(spec, config, resumes=resumes).documents())
        documents = dict(zip(chosen, _ranked(chosen.values(), weight), strict=True)) | documents
    return [document for _, document in sorted(documents.values(), key=itemgetter(0))]


def _end_of(documents: Iterable[Document]) -> dict[int, Document]:
    """Return the last tenth of the last document, cut at a line or word. None if that is too short."""
    last = deque(documents, maxlen=1)
    text = last[0].text if last else ""
    at = len(text) - min(len(text) // HELD_OUT_EVERY, LONGEST_END)
    found = [text.find(sign, at) + 1 for sign in "\n "]
    at = next((place for place in found if place and text[place:].strip()), at)
    if not text[:at].strip() or not text[at:].strip():
        return {}
    end = replace(last[0], text=text[at:], kept=text[:at])
    return {text_hash(end.text): end}


def _ranked(documents: Iterable[Document], weight: float) -> Iterator[tuple[float, Document]]:
    """Yield documents with their rank in a mixture. In order of rank, every prefix has the mixture's shares."""
    return (((i + 0.5) / weight, document) for i, document in enumerate(documents))

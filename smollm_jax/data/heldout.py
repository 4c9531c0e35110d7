"""Read documents in order: the held-out set, a whole source to score, a head to train a tokenizer on.

A held-out document is identified by a hash of its text, so copies of it elsewhere are left out too.
"""

from collections.abc import Iterator
from itertools import chain, islice, zip_longest

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.packing import Batch, pack
from smollm_jax.data.shuffle import TokenizedDocument, text_hash, tokenize
from smollm_jax.data.sources import Document, mixture, open_source
from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.tokenizer import Tokenizer

HELD_OUT_EVERY = 10  # every tenth document from the head of a source, until there are enough


def held_out(config: DataConfig, tokenizer: Tokenizer, *, resumes: bool = False) -> list[TokenizedDocument]:
    """Hold out the first documents of `eval_data`, or every tenth from the head of the training sources.

    Returns none for `eval_documents=0`. Raises `UserError` if there are none otherwise, and as `open_source` and
    `Source.documents` do.
    """
    documents = _held_out_documents(config, resumes=resumes)
    name = config.eval_data or config.data
    if config.eval_documents and not documents:
        count = sum(1 for _ in islice(chain.from_iterable(_all_documents(config, name)), HELD_OUT_EVERY))
        few = f"{name} holds {count} documents{'' if config.eval_data else ', of which every 10th is held out'}"
        lines = "; in a .txt file a blank line ends a document, and a file without one is one document"
        raise UserError(f"{few}{lines if '.txt' in name else ''}; give --eval-data, or --eval-documents 0")
    return list(tokenize(documents, tokenizer))


def batches_in_order(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[Batch]:
    """Yield all of `config.data` once, source after source; only the last batch has padding.

    Raises as `open_source` and `Source.documents` do.
    """
    documents = chain.from_iterable(_all_documents(config, config.data))
    yield from pack(tokenize(documents, tokenizer), config.seq_len, batch_size)


def _all_documents(config: DataConfig, data: str) -> Iterator[Iterator[Document]]:
    """Yield the documents of each source."""
    return (open_source(spec, config).documents() for spec, _ in mixture(data))


def head_texts(config: DataConfig) -> Iterator[str]:
    """Yield texts from the head of each source in turn, without the held-out texts."""
    excluded = {text_hash(document.text) for document in _held_out_documents(config)}
    for document in chain.from_iterable(zip_longest(*_all_documents(config, config.data))):
        if document is not None and text_hash(document.text) not in excluded:
            yield document.text


def _held_out_documents(config: DataConfig, *, resumes: bool = False) -> list[Document]:
    every = 1 if config.eval_data else HELD_OUT_EVERY
    documents: dict[int, Document] = {}
    for spec, weight in mixture(config.eval_data or config.data) if config.eval_documents else ():
        wanted = max(1, round(config.eval_documents * weight))
        chosen: dict[int, Document] = {}
        for document in islice(open_source(spec, config, resumes=resumes).documents(), every - 1, None, every):
            chosen.setdefault(text_hash(document.text), document)
            if len(chosen) == wanted:
                break
        documents = chosen | documents
    return list(documents.values())

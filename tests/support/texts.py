"""Small documents and a small tokenizer."""

import json
import random

from smollm_jax.tokenizer.chat_setup import with_chat_template
from smollm_jax.tokenizer.load import train_tokenizer

WORDS = ["the", "a", "model", "reads", "text", "and", "learns", "what", "comes", "next", "in", "every", "row"]


def make_texts(count, *, seed=0, longest=40):
    """Distinct texts of 1 to `longest` words."""
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]


def small_tokenizer():
    return train_tokenizer(make_texts(50), 300)


def make_talks(count, *, seed=0, longest=12):
    """Conversations of one to three turns, some after a system message, as `messages`."""
    rng = random.Random(seed)

    def words():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    talks = []
    for i in range(count):
        talk = [{"role": "system", "content": words()}] if rng.random() < 0.3 else []
        for turn in range(rng.randint(1, 3)):
            talk.append({"role": "user", "content": f"{seed}.{i}.{turn} {words()}"})
            talk.append({"role": "assistant", "content": words()})
        talks.append(talk)
    return talks


def make_pairs(count, *, seed=0, longest=12):
    """Pairs of answers to the talks of `make_talks`, the rejected one shorter. Every tenth has equal answers."""
    rng = random.Random(seed)
    pairs = []
    for i, talk in enumerate(make_talks(count, seed=seed, longest=longest)):
        other = {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))}
        pairs.append({"chosen": talk, "rejected": talk if i % 10 == 4 else [*talk[:-1], other]})
    return pairs


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_tokenizer():
    """A small tokenizer with ChatML's tokens and template."""
    bare = train_tokenizer(make_texts(50), 300, chat=True)
    return with_chat_template(bare, "chatml", "small")[0]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def write_parquet(path, texts, column="text", row_group_size=7):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=row_group_size)
    return path

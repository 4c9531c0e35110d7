"""Small documents and a small tokenizer."""

import json
import random

from smollm_jax.tokenizer.load import train_tokenizer

WORDS = ["the", "a", "model", "reads", "text", "and", "learns", "what", "comes", "next", "in", "every", "row"]


def make_texts(count, *, seed=0, longest=40):
    """Distinct texts of 1 to `longest` words."""
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]


def small_tokenizer():
    return train_tokenizer(make_texts(50), 300)


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def write_parquet(path, texts, column="text", row_group_size=7):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=row_group_size)
    return path

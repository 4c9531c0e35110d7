"""Data files, changed at random, read as a source, from a cursor on, and by a loader."""

import gzip
import json
import random
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smollm_jax.config.settings import Config, DataConfig, RunConfig
from smollm_jax.data.heldout import held_out
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.data.readers import LONGEST_BYTES
from smollm_jax.data.sources import Shard, open_source
from tests.fuzz.mutations import Change, as_json, change_bytes, change_file, change_lines, odd_value
from tests.fuzz.worker import Attempts
from tests.support.texts import chat_tokenizer, make_pairs, make_talks, make_texts, small_tokenizer

TALKS = make_talks(30)
ROWS = {  # of the kinds of data but text, and of all formats
    "chat": [
        *({"messages": talk} for talk in TALKS[::3]),
        *({"conversations": [{"from": x["role"], "value": x["content"]} for x in talk]} for talk in TALKS[1::3]),
        *({"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS[2::3]),
    ],
    "pairs": [
        *make_pairs(20),
        *({"prompt": "the row", "chosen": one, "rejected": "a"} for one in ("b", "a", "")),
        *({"prompt": pair["chosen"][:-1], "chosen": pair["chosen"][-1:], "rejected": pair["rejected"][-1:]}
          for pair in make_pairs(10, seed=1)),
    ],
}  # fmt: skip
TEXTS = [*make_texts(40), "naïve Größe 🦀", "", " \n ", "x" * 3_000]
NAMES = ("a", "a b", "a[1]", "a=1,b", "モデル", "a\nb", "-a", "a*", "~", "a\udcff", "..a", "'\"", "x" * 200)
LOOKED_AT = 2_000  # documents; a file of a case has fewer


def written(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def write_rows_of(rng: random.Random | None, path: Path, kind: str) -> None:
    """Write conversations or pairs. The first row decides what columns a file has."""
    rows = ROWS[kind]
    at = rng.randrange(len(rows)) if rng else 0
    rows = rows[at:] + rows[:at]
    if path.suffix == ".parquet":  # a column has one type

        def types(row):
            return {name: type(value) for name, value in row.items()}

        rows = [row for row in rows if types(row) == types(rows[0])]
        with path.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=9)
    else:
        written(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_sound(path: Path) -> None:
    """Write the texts in the format that the name asks for."""
    if path.suffix == ".parquet":
        with path.open("wb") as file:  # Arrow takes no name that is no UTF-8
            pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), file, row_group_size=9)
    elif ".txt" in path.name:
        path.write_bytes("\n\n".join(TEXTS).encode())
    else:
        written(path, lines_of(TEXTS))


def write_odd(rng: random.Random, path: Path) -> str:
    """Write a sound file of the format whose values are not as expected."""
    values = [odd_value(rng) for _ in range(rng.choice([1, 3, 20]))]
    texts = [rng.choice(TEXTS) for _ in range(3)]
    if path.suffix == ".parquet":
        return write_odd_parquet(rng, path)
    if ".txt" in path.name:
        blob = rng.choice([b"\r\n" * 50, b"\xff\xfe", b"\0" * 100, b"\n" * 3_000, "\u2028\n\n".encode()])
        path.write_bytes(b"\n\n".join([texts[0].encode(), blob, texts[1].encode()]))
        return f"text with {blob[:8]!r}"
    kind = rng.choice(["values", "lines", "no text", "array", "long", "bomb", "blank"])
    rows = {
        "values": [as_json({"text": value}) for value in values],
        "lines": [as_json(value) for value in values],
        "no text": [as_json({rng.choice(["", "txt", "\0", "x" * 500]): "a"})] * 3,
        "array": [as_json([{"text": "a"}])],
        "long": [as_json({"text": "y" * (LONGEST_BYTES + rng.choice([-20, 1, 9]))})]
        if rng.random() < 0.02
        else [],
        "bomb": [as_json({"text": " " * 4_000_000})] if rng.random() < 0.1 else [],
        "blank": [" "] * rng.choice([5, 5_000]),
    }[kind]
    rows[rng.randint(0, len(rows)) : 0] = [as_json({"text": texts[0]})] * rng.choice([0, 1, 3])
    written(path, "\n".join(rows).encode("utf-8", "surrogatepass"))
    return f"rows of {kind} {str(values[0])[:30]!r}"


def write_odd_parquet(rng: random.Random, path: Path) -> str:
    """Write a Parquet file whose column is of another type, missing or there twice."""
    columns = {
        "ints": pa.array([1, 2, None]), "nulls": pa.nulls(3), "lists": pa.array([["a"], [], None]),
        "binary": pa.array([b"\xff", b"a", None]), "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
        "structs": pa.array([{"a": 1}, None, {"a": 2}]), "large": pa.array(["a", None, "b"], pa.large_string()),
        "view": pa.array(["a", None, "b"], pa.string_view()), "times": pa.array([1, 2, 3], pa.timestamp("us")),
        "none": pa.array([], pa.string()), "bad UTF-8": pa.Array.from_buffers(
            pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfea")]),
    }  # fmt: skip
    kind = rng.choice(list(columns))
    names = rng.choice(
        [["text"], ["text"], ["text", "text"], ["", "text"], ["a.text"], ["text.a", "b"], ["a" * 300]]
    )
    table = pa.Table.from_arrays([columns[kind]] * len(names), names=names)
    packed = rng.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
    with path.open("wb") as file:
        pq.write_table(table, file, row_group_size=rng.choice([1, 2, 100]), compression=packed)
    return f"parquet of {kind} named {names}, {packed}"


def change_parquet(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change bytes anywhere, or in the footer, which describes all the rest."""
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    size = int.from_bytes(content[-8:-4], "little") + 8
    foot, what = change_bytes(rng, content[-size:])
    return content[:-size] + foot, f"footer: {what}"


def change_packed(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change what is packed, or the packed bytes."""
    if rng.random() < 0.5:
        return change_bytes(rng, content)
    changed, what = change_lines(rng, gzip.decompress(content))
    return gzip.compress(changed, 1, mtime=0), f"packed: {what}"


CHANGES: dict[str, Change | None] = {".parquet": change_parquet, ".gz": change_packed, ".json": change_lines}


def read(where: str, settings: DataConfig, start: dict[str, int] | None, shard: Shard) -> None:
    """Read the documents, with the cursor of the middle one again from there."""
    source = open_source(where, settings)
    found = list(islice(source.documents(start, shard=shard), LOOKED_AT))
    assert all(isinstance(document.text, str) and document.text.strip() for document in found)
    if len(found) > 1 and settings.on_bad_data == "skip":
        middle = found[len(found) // 2 - 1]
        again = next(source.documents(middle.cursor, shard=shard))
        assert again.text == found[len(found) // 2].text


class Data:
    """Sound files, made anew for each case under a name of its own, and what reads them."""

    def __init__(self, _: Path) -> None:
        self.tokenizer, self.chat_tokenizer = small_tokenizer(), chat_tokenizer()

    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]:
        suffix = (
            ".jsonl"
            if rng is None
            else rng.choice([".jsonl", ".jsonl.gz", ".parquet", ".txt", ".json", ".json.gz"])
        )
        stem = "sound" if rng is None or rng.random() < 0.7 else rng.choice(NAMES)
        path, told, settings = folder / f"{stem}{suffix}", [f"{stem!a}{suffix}"], DataConfig()
        start, shard, where = None, Shard(), str(path)
        kind = "text" if rng is None else rng.choice(["text", "text", "chat", "pairs"])
        if kind == "text" or suffix == ".txt":
            write_sound(path)
        else:
            write_rows_of(rng, path, kind)
        if rng is not None:
            if rng.random() < 0.3 and kind == "text":
                told.append(write_odd(rng, path))
            if rng.random() < 0.8 or len(told) == 1:
                told.append(change_file(rng, path, outside, CHANGES.get(path.suffix)))
            bad = rng.choice(["skip", "skip", "stop"])
            settings = DataConfig(
                data_kind=kind, on_bad_data=bad, text_column=rng.choice(["text"] * 9 + ["", "a.text", "\0", "id"])
            )
            if rng.random() < 0.3:
                write_sound(folder / "other.jsonl")
                where = rng.choice([str(folder), f"{folder}/*", f"{path}=2,{folder}/other.jsonl=1"])
            if rng.random() < 0.2:
                start = {"file": 0, "row": rng.choice([0, 3, 10**9]), "byte": rng.choice([0, 1, 77, 10**12])}
            shard = rng.choice([Shard()] * 3 + [Shard(1, 2), Shard(6, 7)])
            told.append(f"{kind} {where[len(str(folder)) :]!a} {bad} {settings.text_column!r} {start} {shard}")
        attempts: Attempts = []
        if "=2," not in where:
            attempts.append(("documents", partial(read, where, settings, start, shard)))
        if rng is None or "=2," in where or rng.random() < (0.2 if kind == "text" else 0.6):
            attempts.append(("loader", partial(self.load, where, settings)))
        return "; ".join(told), attempts

    def load(self, where: str, settings: DataConfig) -> None:
        """Make batches, and go on from the cursor of one."""
        is_text, few = settings.data_kind == "text", {"shuffle_window": 16, "eval_documents": 2, "epochs": 2}
        data = replace(settings, data=where, seq_len=32 if is_text else 96, **few)
        config = Config(data=data, run=RunConfig(steps=4, batch_size=2))
        tokenizer = self.tokenizer if is_text else self.chat_tokenizer
        loader = Loader(config, tokenizer, held_out(data, tokenizer))
        cursor = None
        for _ in range(2):  # the second goes on from the first one's cursor
            batches = BatchIterator(loader, cursor)
            try:
                _, cursor = next(batches)
            except StopIteration:
                return
            finally:
                for source in batches.sources:
                    source.close()

    def close(self) -> None:
        pass


TARGET = Data

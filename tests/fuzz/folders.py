"""Hugging Face folders from anywhere, each file changed at random, read by our own functions."""

import random
from functools import partial
from pathlib import Path

from safetensors.numpy import load_file, save_file

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.publish import push
from smollm_jax.hf.reader import read_folder
from smollm_jax.runs.convert import import_run
from smollm_jax.runs.load import load_model
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.load import load_tokenizer
from smollm_jax.tokenizer.renderer import Renderer
from smollm_jax.tokenizer.streaming import TextOfIds
from tests.fuzz.mutations import change_bytes, change_file, fresh_copy
from tests.fuzz.worker import Attempts
from tests.support.families import FAMILIES, tokenizer_folder
from tests.support.hf_folders import as_shards, numpy_params
from tests.support.server import TEMPLATE

CONFIG = ModelConfig(
    vocab_size=420, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    max_seq_len=64, rope_theta=10_000.0, eos_token_id=2, bos_token_id=1,
)  # fmt: skip
TEXT = "the cat sat on naïve Größe 7.5 🦀 </s> <|im_start|>"
TURNS = [
    {"role": "user", "content": "Hi </s>"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": ""},
]


def sound_folders(base: Path) -> list[Path]:
    """Make a folder for each family of tokenizers; every second one has shards, or a template of its own."""
    folders = []
    for i, family in enumerate(FAMILIES):
        folder = base / "sound" / str(i)
        if not folder.exists():
            settings = {"chat_template": TEMPLATE} if i % 2 else {}
            tokenizer = tokenizer_folder(family, base / "sound" / f"tokenizer-{i}", **settings)
            if not i % 2:
                (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
                (tokenizer / "special_tokens_map.json").write_text(
                    '{"eos_token": {"content": "</s>"}, "pad_token": "<unk>"}'
                )
            export_folder(numpy_params(CONFIG), CONFIG, folder, tokenizer_folder=tokenizer, verify=False)
            if i % 4 == 3:
                as_shards(folder)
        folders.append(folder)
    return folders


def use_tokenizer(folder: Path, renderer: Renderer, mode: str) -> None:
    """Encode a text and a conversation, decode ids, stream a text, count bytes."""
    tokenizer = load_tokenizer(str(folder), special_tokens=mode)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    tokenizer.byte_counts(TEXT, ids)
    stream = TextOfIds(tokenizer, [int(i) for i in ids[:3]])
    for i in range(min(tokenizer.vocab_size, 12)):
        stream.feed([i])
    stream.rest()
    _ = tokenizer.fingerprint, tokenizer.bos_id
    if tokenizer.chat_template:
        encode_chat(tokenizer, TURNS, render=renderer.render)


def import_and_look(folder: Path, out: Path) -> None:
    """Import the folder; what is there must then be a run that opens, and without the import's success nothing."""
    try:
        import_run(folder, out)
    finally:
        left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]
        assert not left, left
    load_model(out)


class Folders:
    """Sound folders, and cases that change one file of a copy, or two."""

    def __init__(self, base: Path) -> None:
        self.folders, self.renderer = sound_folders(base), Renderer()

    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]:
        chosen = self.folders[0] if rng is None else rng.choice(self.folders)
        model = fresh_copy(chosen, folder / "model")
        told, mode = [f"folder {chosen.name}"], "text"
        if rng is not None:
            mode = rng.choice(["text", "parse"])
            for _ in range(rng.choice([1, 1, 1, 2])):
                told.append(change(rng, model, outside))
        attempts: Attempts = [
            ("read_folder", partial(read_folder, model)),
            ("tokenizer", partial(use_tokenizer, model, self.renderer, mode)),
            ("push --dry-run", partial(push, model, "a/b", dry_run=True)),
        ]
        if rng is None or rng.random() < 0.1:
            attempts.append(("import_run", partial(import_and_look, model, folder / "run")))
        return "; ".join(told), attempts

    def close(self) -> None:
        self.renderer.close()


def change(rng: random.Random, model: Path, outside: Path) -> str:
    """Change a file of a folder, its tensors, or its template."""
    files = sorted(path for path in model.iterdir() if path.is_file() and path.name != "README.md")
    file = rng.choice(files)
    if file.suffix == ".safetensors" and rng.random() < 0.4:
        try:
            return change_tensors(rng, file)
        except Exception:  # changed already
            return "nothing"
    try:
        return change_file(rng, file, outside, change_template if file.suffix == ".jinja" else None)
    except (ValueError, OSError, RecursionError):  # no JSON any more, or a pipe's other end
        return "nothing"


def change_tensors(rng: random.Random, file: Path) -> str:
    """Rename, drop, reshape, cast or add a tensor, and write a sound file."""
    import numpy as np

    values = load_file(file)
    name, kind = rng.choice(sorted(values)), rng.choice(["rename", "drop", "reshape", "cast", "add", "NaN"])
    value = values[name]
    if kind in ("rename", "drop"):
        del values[name]
    if kind in ("rename", "add"):
        values[rng.choice(["", "lm_head.weight", f"{name}.x", name.removeprefix("model."), "x" * 300, "\n"])] = (
            value
        )
    if kind == "reshape":
        values[name] = rng.choice([value.T.copy(), value.reshape(-1), value[..., :0], value[None], value[:1]])
    if kind == "cast":
        values[name] = value.astype(rng.choice([np.float64, np.float16, np.int64, np.uint8, np.bool_]))
    if kind == "NaN":
        values[name] = np.full_like(value, np.nan)
    save_file(values, file)
    return f"{file.name}: {kind} {name}"


def change_template(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change the bytes of a template, or add an expression that is greedy, or asks for more than it may."""
    hostile = rng.choice([
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}",
        "{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ 1/0 }}",
        "{{ 10**10**8 }}", "{% include '/etc/passwd' %}", "{% set x = namespace(a=1) %}{{ x.a.b.c }}",
        "{{ [1]|first|tojson }}", "{{ raise_exception('no') }}", "{{ '%s' % ('a',) }}",
        "{{ strftime_now('%' * 99) }}", "{{ 'é\ud800' }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ messages[99].content }}", "{% generation %}x", "{{ '\\0' }}",
        "{{ messages|map(attribute='content')|join }}", "{{ 2**100000|string|length }}",
        "{{ '(' * 500 }}" + "(" * 500, "{{" + "(" * 5_000 + ")" * 5_000 + "}}", "{{" + "-" * 5_000 + "1}}",
        "{% if 1 %}" * 2_000, "{{ ''.join(['a'] * 10**7) }}",
    ])  # fmt: skip
    if rng.random() < 0.4:
        return change_bytes(rng, content)
    at = rng.choice([0, len(content)])
    return content[:at] + hostile.encode("utf-8", "surrogatepass") + content[at:], f"template with {hostile[:60]}"


TARGET = Folders

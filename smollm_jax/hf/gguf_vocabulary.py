"""Convert a tokenizer to the fields of a GGUF file and back.

llama.cpp knows a byte-level BPE by its tokens, its merges and the name of the rule that splits a text before. Its
own converter finds the name by a hash of one vocabulary. Here the rule itself is compared, so that a newly trained
tokenizer has a name too.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import named_failure
from smollm_jax.tokenizer.tokenizer import Tokenizer, token_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama_token_type in llama.h
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# llama.cpp's name: the steps of tokenizer.json. unicode_regex_split in src/llama-vocab.cpp has the same rules
RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# what no field of GGUF can tell
PLAIN = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
         "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
KEY = "tokenizer.ggml."
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # of tokenizer_config.json, and of GGUF


def vocabulary_fields(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return a tokenizer's fields, one token per row of the embedding.

    Raises `UserError` for a tokenizer that llama.cpp would read otherwise.
    """
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(tokenizer.files["tokenizer.json"].decode())
    told = json.loads(fast.to_str())  # as this release of the library writes it: merges are pairs
    rule = _rule(told)
    size, added = config.vocab_size, fast.get_added_tokens_decoder()
    require(tokenizer.vocab_size <= size, f"the tokenizer has {tokenizer.vocab_size} entries, the model {size}")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, i in fast.get_vocab(with_added_tokens=True).items():
        tokens[i], types[i] = text, NORMAL
    for i, token in added.items():
        types[i] = CONTROL if token.special else USER_DEFINED
        is_plain = not (token.lstrip or token.rstrip or token.single_word)
        require(is_plain, f"token {token.content!r} takes the spaces beside it, or whole words: GGUF has no field")
    merges = [" ".join(pair) for pair in told["model"]["merges"]]
    require(bool(merges), "the tokenizer has no merges, and llama.cpp loads none without; train a larger one")
    starts, ends = _added_around(tokenizer)
    fields = {
        "add_space_prefix": False, "add_bos_token": starts, "model": "gpt2", "pre": rule, "tokens": tokens,
        "token_type": types, "merges": merges,
    }  # fmt: skip
    unknown = fast.token_to_id(token_text(tokenizer.settings.get("unk_token")))
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "unknown": unknown,
           "padding": config.pad_token_id}  # fmt: skip
    ids |= dict(zip(("eot", "eom"), config.extra_eos_token_ids, strict=False))
    fields |= {"add_eos_token": True} if ends else {}
    fields |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {KEY + name: value for name, value in fields.items()} | template


def _rule(told: dict[str, Any]) -> str:
    """Return llama.cpp's name for a tokenizer.json. Raises `UserError` if there is none."""
    model, only = told["model"], f"only byte-level BPE as in {' and '.join(RULES)} can be written as GGUF"
    require(model["type"] == "BPE", f"the tokenizer's model is {model['type']}; {only}")
    for name, value in PLAIN.items():
        came = model.get(name) or value  # "" is none as well
        require(came == value, f"the tokenizer has {name}={came!r}; {only}")
    for name in ("normalizer", "pre_tokenizer"):
        told[name] = told[name] or {}
    require(not told["normalizer"], f"the tokenizer has a normalizer, {told['normalizer'].get('type')}; {only}")
    steps = told["pre_tokenizer"].get("pretokenizers", [told["pre_tokenizer"]])
    steps = [step | ({"trim_offsets": True} if step.get("type") == "ByteLevel" else {}) for step in steps]
    found = next((name for name, rule in RULES.items() if rule == steps), None)
    if found is None or (told["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError(f"llama.cpp has no name for the tokenizer's rule {json.dumps(steps)[:200]}; {only}")
    return found


def _added_around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Return whether the tokenizer itself begins a text with bos, and ends it with eos."""
    bare = tokenizer.encode_part("a", "text")
    whole, bos, eos = tokenizer.encode("a").tolist(), tokenizer.bos_id, tokenizer.eos_id
    starts, ends = bos is not None and whole[:1] == [bos], whole[-1:] == [eos]
    expected = [bos] * starts + bare + [eos] * ends
    require(whole == expected, f"the tokenizer adds more than bos and eos to a text: {whole}; GGUF has no field")
    return starts, ends


def read_vocabulary(fields: dict[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer that the fields of the file `path` describe. Raises `UserError`."""
    model, rule = fields.get(f"{KEY}model"), fields.get(f"{KEY}pre")
    only = f"only gpt2 with the rule {' or '.join(RULES)} can be read"
    is_known = model == "gpt2" and isinstance(rule, str) and rule in RULES
    require(is_known, f"{path}: its tokenizer is {model!r} with the rule {rule!r}; {only}")
    tokens, merges = (_list(fields, name, str, path) for name in ("tokens", "merges"))
    types = _list(fields, "token_type", int, path) if f"{KEY}token_type" in fields else [NORMAL] * len(tokens)
    require(len(types) == len(tokens), f"{path} has {len(tokens):,} tokens, and {len(types):,} types of them")
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    require(len(vocab) == len(types) - types.count(UNUSED), f"{path} has the same token twice")
    pairs = [merge.split(" ") for merge in merges]
    require(all(len(pair) == 2 for pair in pairs), f"{path} is damaged: a merge is not of two tokens")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind != USER_DEFINED}
        for i, kind in enumerate(types)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    named = {f"{ours}_token": _token(fields, theirs, tokens, path) for ours, theirs in NAMED.items()}
    steps = RULES[str(rule)]
    told = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _template(fields, named, vocab),
        "decoder": BYTE_LEVEL | {"add_prefix_space": True},
        "model": {"type": "BPE", **PLAIN, "vocab": vocab, "merges": pairs},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {name: text for name, text in named.items() if text is not None}
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    with tempfile.TemporaryDirectory(prefix="tokenizer-", ignore_cleanup_errors=True) as folder:
        with named_failure(f"{folder}, a temporary folder"):
            for name, content in (("tokenizer.json", told), ("tokenizer_config.json", settings)):
                text = json.dumps(content, ensure_ascii=False, indent=2)
                Path(folder, name).write_text(text + "\n", encoding="utf-8")
        try:
            return Tokenizer(folder)
        except UserError as error:
            raise UserError(f"{path}: its vocabulary makes no tokenizer: {one_line(error)}") from None


def _list(fields: dict[str, Any], name: str, kind: type, path: Path) -> list[Any]:
    values = fields.get(KEY + name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise UserError(f"{path}: {KEY}{name} must be a list of {kind.__name__}")
    return values


def _token(fields: dict[str, Any], name: str, tokens: list[str], path: Path) -> str | None:
    i = fields.get(f"{KEY}{name}_token_id")
    fits = i is None or (type(i) is int and 0 <= i < len(tokens))
    require(fits, f"{path}: {KEY}{name}_token_id is {i!r}; there are {len(tokens):,} tokens")
    return None if i is None else tokens[i]


def _template(fields: dict[str, Any], named: dict[str, str | None], vocab: dict[str, int]) -> Any:
    """Return the post-processor that adds bos and eos as the fields say, or None."""
    around = [named[f"{name}_token"] if fields.get(f"{KEY}add_{name}_token") else None for name in ("bos", "eos")]
    first, last = ([{"SpecialToken": {"id": text, "type_id": 0}}] if text in vocab else [] for text in around)
    if not first and not last:
        return None
    whole, second = ([{"Sequence": {"id": name, "type_id": 0}}] for name in "AB")
    known = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]} for text in around if text in vocab}
    single = [*first, *whole, *last]
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": known}

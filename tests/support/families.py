"""Tokenizers of several families, trained on a few words, as folders."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the cat sat on a mat, and slept; the dog ran home to buy bread.", "naïve Größe isn't 7.5 the thing"] * 9
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def _byte_level(prefix=False):
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return fast, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def _fallback():
    """Llama 2 as it was converted: a normalizer puts the spaces in."""
    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = BOS
    return fast, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + BYTES, show_progress=False)


def _metaspace():
    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    fast.post_processor = BOS
    return fast, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + BYTES, show_progress=False)


def _unigram():
    fast = Tokenizer(models.Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast, trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _word_piece():
    fast = Tokenizer(models.WordPiece(unk_token="<unk>"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=True)
    both = [("<s>", 1), ("</s>", 2)]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    return fast, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)


def _word_ends():
    """BPE with a mark at the end of a word, as in the first GPT."""
    fast = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    fast.normalizer, fast.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.BPEDecoder()
    return fast, trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )


def _words():
    """Whole words and no decoder: tokens are joined by spaces."""
    fast = Tokenizer(models.WordLevel(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)


FAMILIES = {
    "byte level": _byte_level, "byte level, prefix": lambda: _byte_level(True), "byte fallback": _fallback,
    "metaspace": _metaspace, "unigram": _unigram, "word piece": _word_piece, "word ends": _word_ends,
    "words": _words,
}  # fmt: skip


def tokenizer_folder(family: str, base: Path, **settings) -> Path:
    """A folder with a tokenizer of the family; `settings` are added to tokenizer_config.json."""
    fast, trainer = FAMILIES[family]()
    fast.train_from_iterator(TEXTS, trainer)
    told = json.loads(fast.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] in SPECIAL]
    base.mkdir(parents=True, exist_ok=True)
    (base / "tokenizer.json").write_text(json.dumps(told))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    held = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    (base / "tokenizer_config.json").write_text(json.dumps(held))
    return base

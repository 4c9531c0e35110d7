"""What the tests of GGUF files share: a model, texts and a chat template."""

from dataclasses import replace

from smollm_jax.hf.export import TEXT
from tests.support.hf_folders import TINY

# whose rows have whole blocks of 32; the ids of the tokenizers below
WIDE = replace(
    TINY, hidden_size=64, num_heads=4, head_dim=16, intermediate_size=96, bos_token_id=0, eos_token_id=0
)
LLAMA = {"general.architecture": "llama"}
BATTERY = [
    "", " ", "  \n\n\t x", "In 1999, 3.14159 + 007 = 12,345", "don't WON'T i'll", "naïve Größe", "東京の天気",
    "🦙🏽👨‍👩‍👧",
    "<|endoftext|>", "a <|endoftext|>b<|im_start|>user\n", "½ Ⅷ ٣٤", "\u00a0\u2003x", "\x00\x7f\ufffd", TEXT,
]  # fmt: skip
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def same_ids(one, other):
    return all(
        one.encode(text, mode).tolist() == other.encode(text, mode).tolist()
        for text in BATTERY
        for mode in ("text", "parse")
    )

"""Turn text into token ids and back."""

from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.load import load_tokenizer, train_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "encode_chat", "load_tokenizer", "train_tokenizer"]

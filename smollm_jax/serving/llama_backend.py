"""The llama.cpp back end: a GGUF file, or a model that is written as one when it is opened.

llama.cpp computes the logits, on a CPU in less time per token than JAX and PyTorch. The rules of generation/
choose the token. So sampling settings and seeds mean the same as with JAX. llama-cpp-python is an extra.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation import sampling as rules
from smollm_jax.generation.generator import SCORED
from smollm_jax.generation.sampling import Past, Sampling, SamplingArrays, Score
from smollm_jax.hf.gguf_export import export_gguf
from smollm_jax.hf.gguf_file import read_file
from smollm_jax.hf.gguf_model import read_gguf_config
from smollm_jax.hf.gguf_vocabulary import read_vocabulary
from smollm_jax.hf.reader import is_gguf
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import expand_home
from smollm_jax.serving.llama_library import PART, LlamaFile
from smollm_jax.serving.stepwise import Stepwise
from smollm_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer

FORMATS = {"auto": "f16", "float32": "f32", "bfloat16": "bf16"}


class LlamaEngine(Stepwise):
    """A GGUF file that streams ids as `Generator` does. The caller checks prompts."""

    def __init__(self, file: Path, config: ModelConfig, *, exact: bool = False):
        self.num_parameters: int | None = config.num_parameters
        self.context, self.vocab_size = config.max_seq_len, config.vocab_size
        self.stop_reason: str | None = None
        self.cancelled: Callable[[], bool] = lambda: False
        self._file = LlamaFile(file, context=self.context, vocab_size=self.vocab_size, exact=exact)
        self._first = jax.jit(rules.choose_first, static_argnames="greedy")
        self._next = jax.jit(rules.choose_token, static_argnames="greedy")

    def unload(self) -> None:
        """Free the weights."""
        self._file.close()

    def steps(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, np.ndarray]]:
        """Yield new ids with the logits (1, V) that chose them, the stop id too."""
        self.stop_reason, ids = "cancelled", list(prompt)
        room = min(sampling.max_new_tokens, self.context - len(ids))
        arrays, greedy = SamplingArrays.from_sampling(sampling), sampling.temperature == 0
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        plain = greedy and penalties == (1, 0, 0) and not sampling.logit_bias and not sampling.min_new_tokens
        past = Past(np.zeros((1, self.vocab_size), bool), np.zeros((1, self.vocab_size), np.int32))
        past.in_prompt_BV[0, ids] = True
        for start in range(0, len(ids), PART):
            if self.cancelled():
                return
            logits_1V = self._file.logits(ids[start : start + PART], start, last_only=True)
        choose = self._first
        for _ in range(room):
            if plain:
                token = int(logits_1V[0].argmax())
            else:
                position_1 = np.array([len(ids)], np.int32)
                token = int(choose(logits_1V, past, position_1, arrays, greedy=greedy)[0])
            self.stop_reason = "eos" if token in sampling.stop_ids else "cancelled"
            yield token, logits_1V
            if self.stop_reason == "eos":
                return
            ids.append(token)
            past.counts_BV[0, token] += 1
            if len(ids) - len(prompt) < room:
                logits_1V = self._file.logits([token], len(ids) - 1, last_only=True)
            choose = self._next
        self.stop_reason = "length" if room == sampling.max_new_tokens else "context"

    def scores(self, logits_TV: np.ndarray, targets: Sequence[int]) -> list[Score]:
        """Return the scores of targets from logits before any rule of sampling."""
        return rules.as_scores(rules.scores_of(jnp.asarray(logits_TV), jnp.asarray(targets)), len(targets))

    def score(self, ids: Sequence[int]) -> Iterator[list[Score]]:
        """Yield the scores of each id but the first, part by part, as `Generator.score` does."""
        for start in range(0, len(ids) - 1, SCORED):
            if self.cancelled():
                return
            part = list(ids[start : start + SCORED + 1])
            yield self.scores(self._file.logits(part[:-1], start), part[1:])


def open_llama(
    path: str | Path, dtype: str, special_tokens: SpecialTokens | None, step: int | None = None
) -> tuple[LlamaEngine, Tokenizer, str, tuple[int, ...], Callable[[ModelConfig, Any], LlamaEngine]]:
    """Load the model at `path`: engine, tokenizer, description, stop ids, and a function that rebuilds the engine.

    A GGUF file keeps its format, with a cache in f32 for `dtype` float32. Another model is written as GGUF first:
    f16, or what `dtype` says. Raises `UserError`.
    """
    exact = dtype == "float32"

    def build(config: ModelConfig, params: Any) -> LlamaEngine:
        with tempfile.TemporaryDirectory(prefix="smollm-jax-") as folder:
            out, kind = Path(folder) / "gguf", FORMATS[dtype]
            file, _ = export_gguf(params, config, tokenizer, out, dtype=kind, verify=False)
            return LlamaEngine(file, config, exact=exact)  # mapped: the name can go

    if not is_gguf(path):
        opened, params, tokenizer = load_model(path, step, special_tokens=special_tokens)
        return build(opened, params), tokenizer, f"llama.cpp, {FORMATS[dtype]}", opened.stop_ids, build
    require(dtype != "bfloat16", f"--dtype bfloat16: {path} has a format of its own; leave it out")
    held = read_file(expand_home(path))
    tokenizer, opened = read_vocabulary(held.fields, held.path), read_gguf_config(held)
    tokenizer.mode, opened = special_tokens or "text", opened.ending_at([*opened.stop_ids, tokenizer.eos_id])
    engine = LlamaEngine(held.path, opened, exact=exact)
    return engine, tokenizer, f"llama.cpp, {held.bits}", opened.stop_ids, build

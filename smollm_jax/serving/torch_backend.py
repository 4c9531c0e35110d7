"""The PyTorch back end: a converted folder through transformers, streaming token ids.

The sampling is that of `sampling.choose`, written in numpy, and a token's draw depends on the seed and its
place alone; greedy texts of both back ends are the same, drawn ones are not, since the random numbers differ.
torch is an extra: it is imported when a model is opened.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer


class TorchEngine:
    """A transformers model that streams ids, with the sampling of `sampling.choose`, one row at a time."""

    def __init__(self, model: Any, config: ModelConfig):
        self._model, self._vocab_size = model.eval(), config.vocab_size
        # transformers 5.2x renames the argument and warns of the old name
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.context = config.max_seq_len
        self.stop_reason: str | None = None

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """New ids one by one, without the stop id; as `Generator.stream`."""
        from transformers import DynamicCache

        self._check(prompt)
        self.stop_reason = "cancelled"
        seen = np.zeros(self._vocab_size, bool)
        seen[list(prompt)] = True
        new, cache = list(prompt), DynamicCache()
        for made in range(min(sampling.max_new_tokens, self.context - len(prompt))):
            logits_V = self._step(new, cache)
            token = choose(logits_V, seen, len(prompt) + made, sampling)
            if token in sampling.stop_ids:
                self.stop_reason = "eos"
                return
            seen[token], new = True, [token]
            yield new
        self.stop_reason = "length" if len(prompt) + sampling.max_new_tokens <= self.context else "context"

    def _step(self, ids: list[int], cache: Any) -> np.ndarray:
        """Logits (V,) after `ids`, which join the cache."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self._model.device)
            out = self._model(tokens, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
            return out.logits[0, -1].float().cpu().numpy()

    def _check(self, prompt: Sequence[int]) -> None:
        require(len(prompt) > 0, "the prompt is empty; give at least one token")
        require(
            len(prompt) < self.context,
            f"the prompt has {len(prompt):,} tokens, the context {self.context:,}; shorten the prompt",
        )
        highest = max(prompt)
        require(
            min(prompt) >= 0 and highest < self._vocab_size,
            f"token id {highest} lies outside of the vocabulary of {self._vocab_size:,}",
        )


def choose(logits_V: np.ndarray, seen_V: np.ndarray, position: int, sampling: Sampling) -> int:
    """The token that follows, by the rules of `sampling.choose`; the draws themselves differ from JAX's."""
    penalty = np.float32(sampling.repetition_penalty)
    penalised = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    logits_V = np.where(seen_V, penalised, logits_V)
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    logits_V = logits_V / np.float32(sampling.temperature)
    order_V = np.argsort(-logits_V, kind="stable")
    sorted_V = logits_V[order_V]
    keep_V = np.arange(len(order_V)) < (sampling.top_k or len(order_V))
    p_V = _softmax(np.where(keep_V, sorted_V, -np.inf))
    keep_V &= np.cumsum(p_V) - p_V < sampling.top_p
    p_V = _softmax(np.where(keep_V, sorted_V, -np.inf))
    keep_V &= p_V >= sampling.min_p * p_V[0]
    keep_V[0] = True
    total_V = np.cumsum(_softmax(np.where(keep_V, sorted_V, -np.inf)))
    # a counter-based generator: the draw is a function of seed and place
    draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    rank = int(np.searchsorted(total_V, draw * total_V[-1], side="right"))
    return int(order_V[min(rank, int(keep_V.sum()) - 1)])


def _softmax(x_V: np.ndarray) -> np.ndarray:
    exp_V = np.exp(x_V.astype(np.float64) - x_V.max())
    return exp_V / exp_V.sum()


def open_torch(path: str | Path, dtype: str) -> tuple[TorchEngine, Tokenizer, str]:
    """Engine, tokenizer and a description of the model at `path`; raises `ValueError` in one line."""
    try:
        import torch
        import transformers  # noqa: F401 - asked for here, so that the message comes before the work
    except ImportError:
        raise UserError("--backend torch needs torch and transformers: pip install 'smollm-jax[torch]'") from None
    from smollm_jax.hf.config_json import model_config
    from smollm_jax.hf.export import write_folder
    from smollm_jax.hf.reader import local_folder, read_json
    from smollm_jax.runs.load import is_run, load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if is_run(path):
        config, params, tokenizer = load_model(path)
        with tempfile.TemporaryDirectory(prefix="smollm-jax-") as scratch:
            write_folder(params, config, Path(scratch) / "model", dtype="float32", tokenizer_folder=None)
            model = _transformers_model(Path(scratch) / "model", dtype).to(device)
    else:
        folder = local_folder(path)
        config = model_config(read_json(folder / "config.json"))
        tokenizer = load_tokenizer(str(folder.absolute()))
        model = _transformers_model(folder, dtype).to(device)
    return TorchEngine(model, config), tokenizer, f"PyTorch, {dtype}, on {device}"


def _transformers_model(folder: Path, dtype: str) -> Any:
    """The model in `folder`, every weight of it from there; raises `ValueError` otherwise."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded by transformers: {one_line(error)}") from None
    model, report = loaded
    # transformers fills in what is missing at random, with no more than a warning
    problems = {kind: names for kind, names in report.items() if names}
    require(not problems, f"{folder} does not hold the whole model; transformers reports {problems}")
    return model

"""The PyTorch back end: a converted folder through transformers' `generate`, streaming token ids.

transformers is seeded before every draw with a hash of the seed and the token's position. A text continued with
the same seed therefore reads on as if it had never stopped. Greedy texts equal the JAX back end's; drawn
texts differ, because the random numbers do. torch is an extra and is imported when a model is opened.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation.sampling import SMALLEST_TEMPERATURE, Sampling
from smollm_jax.hf.config_json import model_config
from smollm_jax.hf.export import write_folder
from smollm_jax.hf.reader import local_folder, read_json
from smollm_jax.runs.load import is_run, load_model
from smollm_jax.runtime.devices import compute_dtype
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer


class TorchEngine:
    """A transformers model that streams ids as `Generator` does; prompts are checked by the caller."""

    def __init__(self, model: Any, config: ModelConfig):
        self._model = model.eval()
        self._model.generation_config = GenerationConfig()  # a folder's own defaults would fill in our settings
        self.context, self.vocab_size = config.max_seq_len, config.vocab_size
        self.stop_reason: str | None = None

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Yield new ids one by one, without the stop id; closing the iterator ends the work within a token."""
        self.stop_reason = "cancelled"
        items: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()
        closed = threading.Event()
        room = min(sampling.max_new_tokens, self.context - len(prompt))

        def put(ids: Any) -> None:
            if closed.is_set():
                raise InterruptedError("the reader has left")  # ends `generate`
            if ids.dim() == 1:  # the prompt comes first, as (1, T)
                items.put(ids.tolist())

        def work() -> None:
            try:
                self._generate(prompt, room, sampling, put)
                items.put(None)
            except Exception as error:
                items.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (item := items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                if item[0] in sampling.stop_ids:
                    self.stop_reason = "eos"
                    return
                yield item
            self.stop_reason = "length" if room == sampling.max_new_tokens else "context"
        finally:
            closed.set()
            thread.join()

    def _generate(self, prompt: Sequence[int], room: int, sampling: Sampling, put: Callable[[Any], None]) -> None:
        """Run `generate`, which calls `put` with every new id."""

        def seed(ids_BT: Any, scores_BV: Any) -> Any:
            state = np.random.SeedSequence([sampling.seed, ids_BT.shape[1]]).generate_state(1)
            torch.manual_seed(int(state[0]))
            return scores_BV

        settings: dict[str, Any] = {  # GenerationConfig takes no int for a float
            "max_new_tokens": room,
            "repetition_penalty": float(sampling.repetition_penalty),
            "eos_token_id": list(sampling.stop_ids) or None,
            "pad_token_id": 0,  # never read: there is one row
        }
        if sampling.temperature > 0:
            settings |= {
                "do_sample": True,
                "temperature": max(float(sampling.temperature), SMALLEST_TEMPERATURE),
                "top_k": sampling.top_k,
                "top_p": float(sampling.top_p),
                "min_p": float(sampling.min_p),
            }
        tokens_BT = torch.tensor([list(prompt)], device=self._model.device)
        self._model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), logits_processor=[seed],
            generation_config=GenerationConfig(**settings), streamer=SimpleNamespace(put=put, end=lambda: None),
        )  # fmt: skip


def open_torch(path: str | Path, dtype: str) -> tuple[TorchEngine, Tokenizer, str]:
    """Load the model at `path`: engine, tokenizer and a description; raises `UserError`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(dtype, device).name
    with tempfile.TemporaryDirectory(prefix="smollm-jax-") as scratch:
        if is_run(path):
            folder = Path(scratch) / "model"
            config, params, tokenizer = load_model(path)
            write_folder(params, config, folder, dtype="float32", tokenizer_folder=None)
        else:
            folder = local_folder(path)
            config = model_config(read_json(folder / "config.json"))
            tokenizer = load_tokenizer(str(folder.absolute()))
        model = _transformers_model(folder, dtype).to(device)
    return TorchEngine(model, config), tokenizer, f"PyTorch, {dtype}, on {device}"


def _transformers_model(folder: Path, dtype: str) -> Any:
    """Load the model in `folder`; raises `UserError` unless the folder holds every weight."""
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be loaded by transformers: {one_line(error)}") from None
    model, report = loaded
    # transformers initializes missing weights at random and only warns
    problems = {kind: names for kind, names in report.items() if names}
    require(not problems, f"{folder} does not hold every weight of the model; transformers reports {problems}")
    return model

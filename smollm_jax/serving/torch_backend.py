"""The PyTorch back end: a converted folder through transformers' `generate`, streaming token ids.

transformers is seeded before every draw with a hash of the seed and the token's position. A text continued with
the same seed therefore reads on as if it had never stopped. Greedy texts equal the JAX back end's; drawn
texts differ, because the random numbers do. torch is an extra and is imported when a model is opened.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation.sampling import SMALLEST_TEMPERATURE, Sampling
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer


class TorchEngine:
    """A transformers model that streams ids as `Generator` does; prompts are checked by the caller."""

    def __init__(self, model: Any, config: ModelConfig):
        from transformers import GenerationConfig

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
        work = (list(prompt), room, sampling, items, closed)
        thread = threading.Thread(target=self._generate, args=work, daemon=True)
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

    def _generate(
        self, prompt: list[int], room: int, sampling: Sampling, items: queue.SimpleQueue, closed: threading.Event
    ) -> None:
        """Run `generate` in its thread: every new id, then None or the error, goes to `items`."""
        import torch
        from transformers import GenerationConfig

        class Hooks:
            """Called by `generate`: streamer, logits processor, and stopping criterion."""

            def put(self, ids: Any) -> None:
                if ids.dim() == 1:  # the prompt comes first, as (1, T)
                    items.put(ids.tolist())

            def end(self) -> None:
                items.put(None)

            def seed(self, ids_BT: Any, scores_BV: Any) -> Any:
                state = np.random.SeedSequence([sampling.seed, ids_BT.shape[1]]).generate_state(1)
                torch.manual_seed(int(state[0]))
                return scores_BV

            def stop(self, ids_BT: Any, _: Any) -> Any:
                return torch.full((len(ids_BT),), closed.is_set(), device=ids_BT.device)

        try:
            tokens_BT = torch.tensor([prompt], device=self._model.device)
            hooks = Hooks()
            self._model.generate(
                tokens_BT, attention_mask=torch.ones_like(tokens_BT), streamer=hooks,
                generation_config=GenerationConfig(max_new_tokens=room, **_settings(sampling)),
                logits_processor=[hooks.seed], stopping_criteria=[hooks.stop],
            )  # fmt: skip
        except Exception as error:
            items.put(error)


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Translate a `Sampling` to fields of `GenerationConfig`, which takes no int for a float."""
    settings = {
        "repetition_penalty": float(sampling.repetition_penalty),
        "eos_token_id": list(sampling.stop_ids) or None,
        "pad_token_id": 0,  # never read: there is one row
    }
    if sampling.temperature == 0:
        return settings | {"do_sample": False}
    return settings | {
        "do_sample": True,
        "temperature": max(float(sampling.temperature), SMALLEST_TEMPERATURE),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
        "min_p": float(sampling.min_p),
    }


def open_torch(path: str | Path, dtype: str) -> tuple[TorchEngine, Tokenizer, str]:
    """Load the model at `path`: engine, tokenizer and a description; raises `UserError`."""
    try:
        import torch
        import transformers  # noqa: F401 - imported now, so that its absence is reported before the work
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
    """Load the model in `folder`; raises `UserError` unless the folder holds every weight."""
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
    # transformers initializes missing weights at random and only warns
    problems = {kind: names for kind, names in report.items() if names}
    require(not problems, f"{folder} does not hold every weight of the model; transformers reports {problems}")
    return model

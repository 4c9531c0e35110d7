"""Score several models of one architecture on the same held-out rows."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig
from smollm_jax.data.heldout import batches_in_order, held_out, pack_to_score
from smollm_jax.data.packing import Batch
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.runs.average import run_of
from smollm_jax.runs.load import read_run
from smollm_jax.runtime.devices import use_precision_of
from smollm_jax.runtime.errors import say
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.evaluation import HeldOutScore, score_batches
from smollm_jax.training.step import make_nll

TOKENS = 16_384  # of the rows that are scored together


class HeldOutRows:
    """The rows of an evaluation of the first run among `paths`, or as many of the text `data`, and scores on them.

    Without a run and without `data`, or for a run on pairs, nothing is scored, and a line says so.
    """

    def __init__(self, paths: Sequence[str], data: str | None):
        run = next((found[0] for path in paths if (found := run_of(path))), None)
        self.config, self.data = Config() if run is None else read_run(run), data
        self.scores: dict[str, HeldOutScore] = {}
        self.none = ""
        if data is None:
            own = self.config.data
            why = "no path is a run" if run is None else "the run's are pairs" if own.is_pairs else ""
            self.none = why or ("" if own.eval_documents else "the run holds none out")
        if self.none:
            say(f"held out    no rows to score on: {self.none}; --data SOURCE names a text")
        self._nll: Any = None
        self._batches: list[Batch] = []

    def score(self, name: str, model: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
        """Score f32 parameters, and log the loss. The first call reads the rows and compiles."""
        if self.none:
            return
        if self._nll is None:
            self._prepare(model, tokenizer)
        found = score_batches(self._nll, jax.tree.map(jnp.asarray, params), self._batches)
        self.scores[name] = found
        say(f"held out    {name}: loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte")

    def _prepare(self, model: ModelConfig, tokenizer: Tokenizer) -> None:
        own = self.config.data
        data = replace(own, seq_len=min(own.seq_len, model.max_seq_len))
        asked = self.config.main_batch_size * data.eval_batches
        rows = max(1, min(self.config.main_batch_size, TOKENS // data.seq_len))  # whatever a step of the run holds
        if self.data is None:
            held = held_out(data, tokenizer, resumes=True)
            batches = pack_to_score(held, tokenizer, data.seq_len, rows, chat=data.is_chat)
        else:
            data = DataConfig(data=self.data, seq_len=data.seq_len, eval_batches=data.eval_batches)
            batches = batches_in_order(data, tokenizer, rows)
        self._batches = list(islice(batches, -(-asked // rows)))
        use_precision_of(jnp.dtype("float32"))
        # plain: kernels need a check before use, and only a run checks them
        config = Config(model=model, data=data, compute=ComputeConfig(attention="plain"))
        mesh = make_mesh(config, jax.devices()[:1])
        self._nll = jax.jit(make_nll(config, mesh, dtype=jnp.dtype("float32"), remat="none"))

    def rows_of(self, name: str) -> dict[str, Any]:
        """Return the scores of a model as rows of a card."""
        found = self.scores.get(name)
        if found is None:
            return {}
        return {"Held-out loss (nats per token)": found.loss, "Held-out bits per byte": found.bits_per_byte}

    def table(self) -> str:
        """Return a line per model: held-out loss in nats per token, bits per byte."""
        width = max(map(len, self.scores), default=0)
        lines = [f"{name:<{width}}  {x.loss:8.4f}  {x.bits_per_byte:8.4f}" for name, x in self.scores.items()]
        return "\n".join([f"{'model':<{width}}  {'loss':>8}  {'bits/byte':>9}", *lines] if lines else [])

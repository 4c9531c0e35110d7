"""Compute logits with llama.cpp, by the functions of its C interface.

Not by the class Llama of llama-cpp-python, which compiles a file's chat template in this process.
"""

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from smollm_jax.runtime.errors import require

PART = 512  # tokens read in one call


class LlamaFile:
    """A GGUF file in memory, with a cache for one text of `context` tokens: f16, or f32 if `exact`."""

    def __init__(self, file: Path, *, context: int, vocab_size: int, exact: bool):
        self._vocab_size, self._using = vocab_size, threading.Lock()
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        of_model, of_context = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
        of_model.n_gpu_layers = 999  # all, if it was built for a GPU
        of_context.n_ctx, of_context.n_batch, of_context.n_ubatch = context, PART, PART
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        of_context.n_threads = of_context.n_threads_batch = len(cores)
        cache = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
        of_context.type_k = of_context.type_v = cache
        if exact:  # its flash attention computes in f16
            of_context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), of_model)
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, of_context)
        require(bool(self._context), f"llama.cpp cannot load {file}")
        entries = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        require(entries == vocab_size, f"{file}: llama.cpp reads {entries:,} tokens, expected {vocab_size:,}")
        self._batch = llama_cpp.llama_batch_init(PART, 0, 1)

    def close(self) -> None:
        """Free the weights, after the call under way."""
        with self._using:
            context, self._context = self._context, None
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(self._model)

    def logits(self, ids: Sequence[int], start: int, *, last_only: bool = False) -> np.ndarray:
        """Read `ids` (T,) at positions from `start`. Returns the f32 logits, (T, V) or of the last id (1, V).

        What stood at these positions and after them is forgotten. At most `PART` ids are read.
        """
        shape = (1 if last_only else len(ids), self._vocab_size)
        with self._using:
            context, batch = self._context, self._batch
            require(context is not None, "these weights were unloaded; send the request again")
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, start, -1)
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = not last_only or i == len(ids) - 1
            if code := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp's llama_decode returned {code}")
            return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape).copy()


@llama_cpp.llama_log_callback
def _quiet(*_: Any) -> None:
    """Drop the library's own log."""

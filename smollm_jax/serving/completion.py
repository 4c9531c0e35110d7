"""Text in, text out: the layer between an engine over token ids and whatever shows the text.

An engine streams ids: `generation.Generator` (JAX) or `torch_engine.TorchEngine`.
`Completer` turns prompts into ids and ids into text that never ends in half a character, watches for stop
strings and says why a text ended. Nothing here knows of pages, requests or command lines. Both engines draw a
token from the seed and the token's place alone, so a text continued with the same seed reads on as if it had
never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from smollm_jax.config.settings import ComputeConfig
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.devices import use_compilation_cache
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.tokenizer import Tokenizer

Backend = Literal["jax", "torch"]
Dtype = Literal["auto", "float32", "bfloat16"]
Reason = Literal["eos", "length", "context", "stop string", "cancelled"]

HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are not (yet) a character
CONTEXT_IDS = 4  # of the prompt, decoded with the first new ids: some decoders treat the start of a text apart


class Engine(Protocol):
    """Streams token ids; a `Generator` is one."""

    context: int
    stop_reason: str | None

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """Text that is new, and how far the whole has come; the last piece has a `reason`."""

    text: str
    tokens: int
    """New tokens so far, the stop token not counted."""
    prompt_tokens: int
    seconds: float
    """Since the start."""
    seconds_to_first: float | None
    """Until the first token; None before it, or where there was none."""
    reason: Reason | None = None


class Completer:
    """An engine and its tokenizer; `about` says in words what runs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, about: str = ""):
        self.engine, self.tokenizer, self.about = engine, tokenizer, about
        self.stop_reason: Reason | None = None

    @property
    def context(self) -> int:
        """Tokens that prompt and text may have together."""
        return self.engine.context

    def encode(self, prompt: str) -> list[int]:
        """Ids of `prompt`; raises `ValueError` when it is empty or no text."""
        require(prompt != "", "the prompt is empty; write how the text begins")
        for i, character in enumerate(prompt):
            # JSON and browsers can send halves of UTF-16 pairs, which no UTF-8 holds
            require(not "\ud800" <= character <= "\udfff", f"the prompt holds half a character at position {i}")
        return self.tokenizer.encode(prompt).tolist()

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[TextChunk]:
        """Pieces of the continuation of `prompt`, text or ids; the last one has the reason of the end.

        A stop string ends the text and is not part of it. `cancelled` is asked after each piece of the engine.
        Closing the iterator ends the work. Raises `ValueError` for a prompt that does not fit.
        """
        require(all(stop), "a stop string is empty")
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        sampling = replace(sampling, stop_ids=sampling.stop_ids or (self.tokenizer.eos_id,))
        text, gate = TextOfIds(self.tokenizer, ids), StopStrings(stop)
        started, first, made = time.perf_counter(), None, 0
        reason: Reason | None = None

        def piece(shown: str) -> TextChunk:
            seconds, self.stop_reason = time.perf_counter() - started, reason
            return TextChunk(text=shown, tokens=made, prompt_tokens=len(ids), seconds=seconds,
                         seconds_to_first=first, reason=reason)  # fmt: skip

        stream = self.engine.stream(ids, sampling)
        try:
            for new in stream:
                made, first = made + len(new), first or time.perf_counter() - started
                shown = gate.feed(text.feed(new))
                if gate.stopped or cancelled():
                    reason = "stop string" if gate.stopped else "cancelled"
                    yield piece(shown)
                    return
                if shown:
                    yield piece(shown)
            reason = self.engine.stop_reason  # type: ignore[assignment]
            shown = gate.feed(text.rest())
            if gate.stopped:
                reason = "stop string"
            yield piece(shown + gate.rest())
        finally:
            getattr(stream, "close", lambda: None)()


class TextOfIds:
    """Ids to text, as far as whole characters go."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT_IDS:])
        self._shown = len(tokenizer.decode(self._window))

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        self._window += ids
        text = self._tokenizer.decode(self._window)
        # bytes of an unfinished character decode to one replacement character, always the last
        whole = text.removesuffix(HALF)
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if whole == text and len(self._window) > CONTEXT_IDS:
            self._window = self._window[-CONTEXT_IDS:]
            self._shown = len(self._tokenizer.decode(self._window))
        return new

    def rest(self) -> str:
        """What is left when no more ids come: the mark of half a character, or nothing."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._shown += len(new)
        return new


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        return shown

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def open_completer(path: str | Path, *, backend: Backend = "jax", dtype: Dtype = "auto") -> Completer:
    """The model of an exported folder, a Hub id or a run, ready; raises `ValueError` in one line.

    dtype auto: float32 on a CPU, bfloat16 on an accelerator.
    """
    if backend == "torch":
        from smollm_jax.serving.torch_backend import open_torch

        engine, tokenizer, about = open_torch(path, dtype)
        return Completer(engine, tokenizer, about=about)
    return _open_jax(path, dtype)


def _open_jax(path: str | Path, dtype: Dtype) -> Completer:
    import jax

    from smollm_jax.model.transformer import SmolLM
    from smollm_jax.runs.load import load_model

    config, params, tokenizer = load_model(path)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        # a model meets the same few programs each time it is opened
        use_compilation_cache(ComputeConfig().compilation_cache_dir)
    device = jax.devices()[0]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    model = SmolLM.from_params(config, jax.tree.map(jax.numpy.asarray, params), dtype=dtype)
    return Completer(Generator(model), tokenizer, about=f"JAX, {dtype}, on {device.device_kind}")

"""Text completion, the layer between an engine over token ids and everything that shows text.

A `Completer` encodes prompts, decodes ids to text, finds stop strings, and reports why a text ended. The decoded
text never ends inside a character. Both engines draw a token from the seed and its position alone. A text
continued with its seed thus reads as if it had never stopped. This file knows no page, request or command line.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.lengths import check_prompt
from smollm_jax.generation.sampling import Sampling, Score
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.devices import compute_dtype, use_compilation_cache
from smollm_jax.runtime.errors import UserError, install, one_line, require
from smollm_jax.serving.text import TextChunk, TextWriter
from smollm_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer

Backend = Literal["jax", "torch", "llama"]
Dtype = Literal["auto", "float32", "bfloat16"]
Rebuild = Callable[[ModelConfig, Any], Any]  # from architecture and parameters to an engine
ROWS = 16  # prompts decoded together


class Engine(Protocol):
    """A source of token ids, such as a `Generator`."""

    context: int
    vocab_size: int
    stop_reason: str | None

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]: ...

    def score(self, ids: Sequence[int]) -> Iterator[list[Score]]: ...


class Completer:
    """An engine with its tokenizer. `about` describes the back end to users."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, about: str = "", stop_ids: Sequence[int] = (),
        rebuild: Rebuild | None = None,
    ):  # fmt: skip
        self.engine, self.tokenizer, self.about = engine, tokenizer, about
        self.rebuild = rebuild  # makes an engine of other weights
        self.stop_ids = tuple({tokenizer.eos_id, *stop_ids})  # `stop_ids` are the model's own
        self.num_parameters: int | None = getattr(engine, "num_parameters", None)
        self.vocab_size = min(engine.vocab_size, tokenizer.vocab_size)
        self.context = engine.context  # the most tokens of prompt and text together

    def encode(self, prompt: str, special_tokens: SpecialTokens | None = None) -> list[int]:
        """Encode a prompt. `special_tokens` defaults to the value with which the model was opened.

        Raises `UserError` if the prompt is empty, no text, or too long for the context.
        """
        require(prompt != "", "the prompt is empty; write how the text begins")
        check_text(prompt, "the prompt")
        return self.checked(self.tokenizer.encode(prompt, special_tokens).tolist())

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a prompt. Raises `UserError` unless model and tokenizer can read the ids."""
        check_prompt(ids, context=self.context, vocab_size=self.vocab_size)
        return list(ids)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        cancelled: Callable[[], bool] = lambda: False,
        *,
        scored: bool = False,
        reads_scores: bool = False,
    ) -> Iterator[TextChunk]:
        """Yield the continuation of `prompt` (text or ids) in chunks. The last chunk has a `reason`.

        A stop string ends the text and is not part of the text. `scored` wants the scores of new tokens, and
        `reads_scores` scores of the prompt. `cancelled` is called after every step of the engine. An engine that
        can end inside a step calls `cancelled` there too. Closing the iterator ends the work. Raises `UserError`
        as `encode` does.
        """
        require(all(stop), "a stop string is empty")
        has_scores = not (scored or reads_scores) or hasattr(self.engine, "stream_scored")
        require(has_scores, "this back end gives no log-probabilities; serve with --backend jax or torch")
        ids = self.encode(prompt) if isinstance(prompt, str) else self.checked(prompt)
        sampling, writer = self.ending(sampling), TextWriter(self.tokenizer, ids, stop)
        for scores in self.score(ids, cancelled) if reads_scores else ():
            yield writer.chunk("", prompt_scores=scores)
        if hasattr(self.engine, "cancelled"):
            self.engine.cancelled = cancelled
        engine: Any = self.engine
        stream = engine.stream_scored(ids, sampling) if scored else engine.stream(ids, sampling)
        try:
            for new in stream:
                made = [token for token, _ in new if token not in sampling.stop_ids] if scored else new
                chunk = writer.feed(made, new if scored else ())
                if cancelled() and not writer.stopped:
                    chunk = replace(chunk or writer.chunk(""), reason="cancelled")
                if chunk is not None:
                    yield chunk
                    if chunk.reason:
                        return
            yield writer.end(self.engine.stop_reason)
        finally:
            getattr(stream, "close", lambda: None)()
            if hasattr(self.engine, "cancelled"):
                self.engine.cancelled = lambda: False

    def ending(self, sampling: Sampling) -> Sampling:
        """Return the sampling with the stop ids of the model, unless it has its own or ignores all."""
        if sampling.ignore_eos:
            return replace(sampling, stop_ids=())
        return replace(sampling, stop_ids=sampling.stop_ids or self.stop_ids)

    def score(self, ids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> Iterator[list[Score]]:
        """Yield the scores of each id but the first, part by part, until `cancelled`. Raises `UserError`."""
        check_prompt(ids, context=self.context + 1, vocab_size=self.vocab_size)
        if hasattr(self.engine, "cancelled"):
            self.engine.cancelled = cancelled
        try:
            for scores in self.engine.score(ids):
                yield scores
                if cancelled():
                    return
        finally:
            if hasattr(self.engine, "cancelled"):
                self.engine.cancelled = lambda: False

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[TextChunk]:
        """Return the whole continuation of each prompt (ids), `ROWS` of them decoded together if the engine can.

        `seeds` has a seed per prompt, in place of the one of `sampling`. Raises `UserError` as `stream` does.
        """
        seeds = seeds or [sampling.seed] * len(prompts)
        if not isinstance(self.engine, Generator):
            rows = [
                list(self.stream(ids, replace(sampling, seed=seed), stop))
                for ids, seed in zip(prompts, seeds, strict=True)
            ]
            return [replace(row[-1], text="".join(chunk.text for chunk in row)) for row in rows]
        return [
            text
            for start in range(0, len(prompts), ROWS)
            for text in self._together(
                self.engine, prompts[start : start + ROWS], sampling, stop, seeds[start : start + ROWS]
            )
        ]

    def _together(self, engine: Generator, prompts, sampling, stop, seeds) -> list[TextChunk]:
        sampling = self.ending(sampling)
        writers = [TextWriter(self.tokenizer, list(self.checked(ids)), stop) for ids in prompts]
        texts, going, ends = [""] * len(prompts), [True] * len(prompts), list[TextChunk]()
        with closing(engine.chunks(prompts, sampling, seeds)) as chunks:  # type: ignore[type-var]
            for new in chunks:
                for row, ids in enumerate(new):
                    if going[row]:
                        chunk = writers[row].feed(ids)
                        texts[row] += chunk.text if chunk else ""
                        going[row] = bool(ids) and not writers[row].stopped
                if not any(going):
                    break
        for row, (ids, writer) in enumerate(zip(prompts, writers, strict=True)):
            full = {sampling.max_new_tokens: "length", self.context - len(ids): "context"}
            last = writer.chunk("", "stop string") if writer.stopped else writer.end(full.get(writer.made, "eos"))
            ends.append(replace(last, text=texts[row] + last.text))
        return ends


def check_text(text: Any, name: str) -> None:
    """Raise `UserError` unless `text` is a str that UTF-8 and the page can hold. `name` names it in the error."""
    require(isinstance(text, str), f"{name} must be text")
    require("\0" not in text, f"{name} holds a NUL character at position {text.find(chr(0))}; take it out")
    # JSON and browsers can send lone UTF-16 surrogates, which UTF-8 cannot encode
    half = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    require(half is None, f"{name} holds half a character at position {half}")


def check_same(other: ModelConfig, config: ModelConfig) -> None:
    """Raise `UserError` unless both architectures compute the same. Special ids may differ."""
    names = ("bos_token_id", "eos_token_id", "extra_eos_token_ids", "pad_token_id", "initializer_range")
    same: dict[str, Any] = {name: getattr(config, name) for name in names}
    require(replace(other, **same) == config, "the weights are of another architecture than the served model")


def open_completer(
    path: str | Path,
    *,
    backend: Backend = "jax",
    dtype: Dtype = "auto",
    special_tokens: SpecialTokens | None = None,
    step: int | None = None,
) -> Completer:  # fmt: skip
    """Load the model of an exported folder, a Hub id or a run. Raises `UserError`.

    Dtype "auto" is float32 on a CPU, bfloat16 on an accelerator. `special_tokens` that a prompt spells out stay
    text, or become ids if "parse". The default is as the run was trained, else "text". `step` is a checkpoint of a
    run, by default the newest good one.
    """
    if backend == "torch":
        try:
            from smollm_jax.serving.torch_backend import open_torch
        except ImportError as error:  # not installed, or a broken installation
            needs = f"--backend torch needs torch and transformers: {install('torch')}"
            raise UserError(f"{needs} ({one_line(error)})") from None
        return Completer(*open_torch(path, dtype, special_tokens, step))
    if backend == "llama":
        try:
            from smollm_jax.serving.llama_backend import open_llama
        except (ImportError, OSError, RuntimeError) as error:  # of its shared library
            needs = f"--backend llama needs llama-cpp-python: {install('llama')}"
            raise UserError(f"{needs} ({one_line(error)})") from None
        return Completer(*open_llama(path, dtype, special_tokens, step))
    config, params, tokenizer = load_model(path, step, special_tokens=special_tokens)
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        # a model runs the same few programs every time it is opened
        use_compilation_cache(ComputeConfig().compilation_cache_dir)
    device = jax.devices()[0]
    computed = compute_dtype(dtype, device.platform)

    def model_of(params: Any) -> SmolLM:
        return SmolLM.from_params(config, jax.tree.map(jax.numpy.asarray, params), dtype=computed)

    def rebuild(other: ModelConfig, params: Any) -> Generator:
        check_same(other, config)
        engine = copy.copy(first)  # its programs serve all weights
        engine.load(model_of(params))
        return engine

    first, about = Generator(model_of(params)), f"JAX, {computed.name}, on {device.device_kind}"
    return Completer(first, tokenizer, about, config.stop_ids, rebuild)

"""The PyTorch back end for a converted folder: transformers' `generate` per token, with one cache.

Before every draw, torch is seeded with a hash of the seed and the token's position. A text continued with the same
seed therefore reads as if it had never stopped. Greedy texts equal the JAX back end's. Drawn texts differ, because
the random numbers do. PyTorch is an extra, imported when a model is opened.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.utils import logging

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation.generator import SCORED
from smollm_jax.generation.sampling import ALTERNATIVES, SMALLEST_TEMPERATURE, Sampling, Score
from smollm_jax.hf.config_json import hf_config
from smollm_jax.hf.mapping import Params, tensors, to_hf
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.devices import compute_dtype
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.serving.stepwise import Stepwise
from smollm_jax.tokenizer.tokenizer import SpecialTokens, Tokenizer

# transformers 5.23 renames `past_key_values` to `cache`, which earlier releases do not know
warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)


class _Cancelled(Exception):
    """The signal that the reader left while the model read the prompt."""


class TorchEngine(Stepwise):
    """A transformers model that streams ids as `Generator` does. The caller checks prompts.

    `cancelled` is called before each layer, because a long prompt takes seconds and its reader may have left.
    """

    def __init__(self, model: Any, config: ModelConfig):
        self._model = model.eval()
        self._model.generation_config = GenerationConfig()  # else a folder's defaults complete our settings
        self.num_parameters = config.num_parameters
        self.context, self.vocab_size = config.max_seq_len, config.vocab_size
        self.stop_reason: str | None = None
        self.cancelled: Callable[[], bool] = lambda: False
        self._hooks: list[Any] = []
        for layer in self._model.model.layers:
            self._hooks.append(layer.register_forward_pre_hook(self._check))

    def unload(self) -> None:
        """Free the weights. The hooks would keep them until Python's next full collection."""
        for hook in self._hooks:
            hook.remove()
        self._model = None

    def _check(self, *_: Any) -> None:
        if self.cancelled():
            raise _Cancelled

    def steps(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield new ids with the logits (1, V) that chose them, the stop id too."""
        self.stop_reason, cache = "cancelled", DynamicCache(config=self._model.config)
        room = min(sampling.max_new_tokens, self.context - len(prompt))
        settings = GenerationConfig(
            max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        if sampling.temperature > 0:
            settings.update(do_sample=True, top_k=0)
        rules = LogitsProcessorList([*penalty_rules(sampling, len(prompt)), *sampling_rules(sampling)])
        ids_BT = torch.tensor([list(prompt)], device=self._model.device)

        def next_ids(rules: LogitsProcessorList) -> tuple[torch.Tensor, torch.Tensor]:
            state = np.random.SeedSequence([sampling.seed, ids_BT.shape[1]]).generate_state(1)
            torch.manual_seed(int(state[0]))
            made = self._model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), past_key_values=cache,
                generation_config=settings, logits_processor=rules,
            )  # fmt: skip
            return made.sequences, made.logits[0]

        for made in range(room):
            try:
                new_BT, logits_1V = next_ids(rules)
                if made < sampling.min_new_tokens and int(new_BT[0, -1]) in sampling.stop_ids:
                    cache.crop(-1)  # the last token is computed again
                    banned = SuppressTokensLogitsProcessor(list(sampling.stop_ids), device=str(ids_BT.device))
                    new_BT, logits_1V = next_ids(LogitsProcessorList([banned, *rules]))
                ids_BT = new_BT
            except _Cancelled:
                return
            token = int(ids_BT[0, -1])
            self.stop_reason = "eos" if token in sampling.stop_ids else "cancelled"
            yield token, logits_1V
            if self.stop_reason == "eos":
                return
        self.stop_reason = "length" if room == sampling.max_new_tokens else "context"

    def scores(self, logits_TV: torch.Tensor, targets: Sequence[int]) -> list[Score]:
        """Return the scores of targets from logits before any rule of sampling."""
        logprobs_TV = logits_TV.float().log_softmax(dim=-1)
        best_TA, ids_TA = logprobs_TV.topk(min(ALTERNATIVES, logprobs_TV.shape[-1]))
        found_T = logprobs_TV.gather(1, torch.tensor(targets, device=logprobs_TV.device)[:, None])[:, 0]
        likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids_TA.tolist(), best_TA.tolist(), strict=True)]
        are_best = (best_TA[:, 0] == found_T).tolist()
        return [Score(*one) for one in zip(found_T.tolist(), are_best, likeliest, strict=True)]

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> Iterator[list[Score]]:
        """Yield the scores of each id but the first, part by part, as `Generator.score` does."""
        cache = DynamicCache(config=self._model.config)
        for start in range(0, len(ids) - 1, SCORED):
            part = list(ids[start : start + SCORED + 1])
            part_1T = torch.tensor([part[:-1]], device=self._model.device)
            try:
                logits_TV = self._model(part_1T, past_key_values=cache, use_cache=True).logits[0]
            except _Cancelled:
                return
            yield self.scores(logits_TV, part[1:])


class Penalties(LogitsProcessor):
    """Bias, repetition, presence and frequency penalty, as in generation/sampling.py.

    transformers has no penalty that counts tokens, and applies the repetition penalty before any rule of ours.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int):
        self.sampling, self.prompt_tokens = sampling, prompt_tokens
        self.repetition = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of a single row after the penalties."""
        scores = scores.clone()
        for token, bias in self.sampling.logit_bias:
            scores[:, token] += bias
        scores = self.repetition(input_ids, scores)
        tokens, counts = input_ids[0, self.prompt_tokens :].unique(return_counts=True)
        scores[0, tokens] -= counts * self.sampling.frequency_penalty + self.sampling.presence_penalty
        return scores


def penalty_rules(sampling: Sampling, prompt_tokens: int) -> list[LogitsProcessor]:
    """Return the rules before temperature and filters, of a text whose prompt has so many tokens."""
    changed = sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias
    if changed or sampling.repetition_penalty != 1:
        return [Penalties(sampling, prompt_tokens)]
    return []


class StableTopP(LogitsProcessor):
    """Top-p as in transformers, except that the highest ids among tied tokens stay. The JAX back end does so too.

    The sort of transformers is not stable, so its choice among tied tokens depends on the machine.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - theirs
        """Mask the least likely tokens whose probabilities sum to at most 1 - top_p."""
        rising_BV, ids_BV = torch.sort(scores, stable=True)
        enough_BV = rising_BV.softmax(dim=-1).cumsum(dim=-1) > 1 - self.top_p
        enough_BV[:, -1] = True
        kept_BV = torch.zeros_like(enough_BV).scatter(1, ids_BV, enough_BV)
        return torch.where(kept_BV, scores, -torch.inf)


def sampling_rules(sampling: Sampling) -> LogitsProcessorList:
    """Return the rules after the penalty, in transformers' order. A greedy text has none."""
    rules = LogitsProcessorList()
    if sampling.temperature > 0:
        rules.append(TemperatureLogitsWarper(max(float(sampling.temperature), SMALLEST_TEMPERATURE)))
        rules += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        rules += [StableTopP(sampling.top_p)] if sampling.top_p < 1 else []
        rules += [MinPLogitsWarper(float(sampling.min_p))] if sampling.min_p else []
    return rules


def open_torch(
    path: str | Path, dtype: str, special_tokens: SpecialTokens | None, step: int | None = None
) -> tuple[TorchEngine, Tokenizer, str, tuple[int, ...], Callable[[ModelConfig, Params], TorchEngine]]:
    """Load the model at `path`: engine, tokenizer, description, stop ids, and a function that rebuilds the engine.

    Our own reader reads and checks a folder. It gives architecture and weights to transformers, which opens no
    file. On its own, transformers would follow a folder to other files and to code on the Hub. Raises `UserError`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(dtype, device).name

    def build(config: ModelConfig, params: Params) -> TorchEngine:
        return TorchEngine(_transformers_model(config, params, dtype).to(device), config)

    config, params, tokenizer = load_model(path, step, special_tokens=special_tokens)
    return build(config, params), tokenizer, f"PyTorch, {dtype}, on {device}", config.stop_ids, build


def _transformers_model(config: ModelConfig, params: Params, dtype: str) -> Any:
    """Build a transformers model of our parameters. Raises `UserError` unless it takes every parameter."""
    logging.disable_progress_bar()
    weights = {one.name: torch.from_numpy(np.ascontiguousarray(to_hf(params, one))) for one in tensors(config)}
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig(**hf_config(config, dtype)), state_dict=weights, dtype=getattr(torch, dtype),
            attn_implementation="sdpa", output_loading_info=True,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"transformers cannot load this model: {one_line(error)}") from None
    model, report = loaded
    # transformers initializes missing weights at random and only warns
    problems = {kind: names for kind, names in report.items() if names}
    require(not problems, f"transformers does not take every weight of the model: {problems}")
    return model

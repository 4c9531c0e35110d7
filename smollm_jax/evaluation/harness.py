"""Answer the requests of lm-evaluation-harness with our engine.

Texts are encoded as in the harness and in HFLM, its own model class for transformers: a special token that a text
spells out is its id, an empty context is bos (eos without a bos), a text that is too long loses its
beginning. So both give the same log-likelihoods. Imported only if lm_eval is installed.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.evaluation.prefix_tree import Request
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.sampling import Sampling
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.chat_template import MARK, render_chat
from smollm_jax.tokenizer.tokenizer import Tokenizer

ROWS = 16  # prompts decoded together
MAX_NEW_TOKENS = 256  # of HFLM, if a task does not say
# settings of a task's generation_kwargs beside until and max_gen_toks
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Tokens = tuple[tuple[str, str], list[int], list[int]]  # context and continuation, then the ids of each


class HarnessModel(TemplateLM):
    """An lm_eval model that scores with our engine. `params` may be replaced between evaluations.

    `generator` is called for the first text that is generated. `watch` is called with the number of requests done
    and of all, and may raise to end the work.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, *, scorer: Scorer, params: Any,
        generator: Callable[[], Generator], watch: Callable[[int, int], None] = lambda *_: None,
    ):  # fmt: skip
        super().__init__()
        self._config, self._tokenizer, self._scorer = config, tokenizer, scorer
        self.params, self.generator, self.watch = params, generator, watch

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return what an empty context is read as."""
        bos = self._tokenizer.bos_id
        return self._tokenizer.eos_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. A text that begins with the prefix token gets no second one."""
        prefix = self._tokenizer.decode([self.prefix_token_id], skip_special=False)
        if add_special_tokens is False or (add_special_tokens is None and string.startswith(prefix)):
            return self._tokenizer.encode_part(string, "parse")
        return list(self._tokenizer.encode(string, "parse").tolist())

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Tokens], **_: Any) -> list[tuple[float, bool]]:
        results = self._score([(context, target) for _, context, target in requests])
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Return the log-likelihood of whole texts. Each token is a target once, after all that fit before it."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            found = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            new = list(map(utils.make_disjoint_window, found))
            windows += new
            counts.append(len(new))
        scores = iter(self._score(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score continuations of contexts. The last id is a target alone, so one more fits than the context."""
        requests = []
        for context, target in pairs:
            require(bool(target), "a task has a continuation without a token of its own")
            much = f"a task has a continuation of {len(target):,} tokens; the model reads {self.max_length:,}"
            require(len(target) <= self.max_length, much)
            ids = ((context or [self.prefix_token_id]) + target)[-self.max_length - 1 :]
            requests.append(Request(ids[:-1], target))
        return self._scorer.score(self.params, requests, self.watch)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Return continuations up to a stop string, which is not part of them, or an end-of-text token."""
        texts, groups = [""] * len(requests), defaultdict[str, list[int]](list)
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        finished = 0
        for numbers in groups.values():  # of equal settings
            sampling, stop = self._choices(requests[numbers[0]].args[1])
            room = self.max_length - sampling.max_new_tokens
            require(room > 0, f"max_gen_toks={sampling.max_new_tokens} of a task leaves no room for a prompt")
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in numbers}
            order = sorted(numbers, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), ROWS):
                now = order[start : start + ROWS]
                rows = now + now[-1:] * (ROWS - len(now) if start else 0)  # no program for the last few
                made = self._write([prompts[i] for i in rows], sampling, stop, rows)
                for i, text in zip(now, made, strict=False):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                finished += len(now)
                self.watch(finished, len(requests))
        return texts

    def _choices(self, settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """Return the sampling and stop strings of generation_kwargs. Raises `UserError` for unknown ones."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        until, most, is_drawn = (given.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
        one_beam = given.pop("num_beams", 1) == 1
        unknown = sorted(given.keys() - set(SAMPLING)) + ["num_beams"] * (not one_beam)
        require(not unknown, f"generation_kwargs of a task: {', '.join(unknown)} is not supported")
        # greedy decoding has the penalty too, as in transformers
        drawn = {name: value for name, value in given.items() if is_drawn or name == "repetition_penalty"}
        drawn = {"temperature": 1.0} | drawn if is_drawn else drawn
        special = self._tokenizer.special_tokens  # decoding leaves these out, so they are found by their ids
        stop_ids = {*self._config.stop_ids, self._tokenizer.eos_id, *(special[x] for x in until if x in special)}
        return Sampling(max_new_tokens=most, stop_ids=tuple(stop_ids), **drawn), [x for x in until if x]

    def _write(self, prompts: list[list[int]], sampling: Sampling, stop: list[str], seeds: list[int]) -> list[str]:
        """Continue prompts together. Each has a seed of its own, because a task may repeat a prompt."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        with closing(self.generator().chunks(prompts, sampling, seeds)) as chunks:  # type: ignore[type-var]
            for new in chunks:
                for row in range(len(prompts)):
                    ids[row] += new[row]
                    texts[row] = self._tokenizer.decode(ids[row])
                if not any(new[row] and not any(x in texts[row] for x in stop) for row in range(len(prompts))):
                    break
        ends = ([at for at in (text.find(x) for x in stop) if at >= 0] for text in texts)
        return [text[: min(end, default=None)] for text, end in zip(texts, ends, strict=True)]

    def chat_template(self, *_: Any) -> str:
        """Return the model's own template, which goes into the results."""
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, up to the assistant's turn or inside the last message.

        As in transformers, a last message that the model is to continue is cut where its content ends.
        """
        template, names = self.chat_template(), self._tokenizer.named_tokens
        if not add_generation_prompt:
            last = chat_history[-1]
            chat_history = [*chat_history[:-1], last | {"content": f"{last['content']}{MARK} "}]
        text = render_chat(template, chat_history, names, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        before, _, after = text.rpartition(MARK)
        return before if after.startswith(" ") else before.rstrip()  # the template has stripped the content

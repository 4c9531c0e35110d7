"""Read the prompts of a request, and turn texts into ids and back, within the limits. Runs in a thread."""

from collections.abc import Sequence
from typing import Any

from smollm_jax.generation.lengths import check_prompt
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.serving.completion import check_text
from smollm_jax.serving.limits import MOST_PROMPT_TOKENS, check_length, checked_choices
from smollm_jax.serving.openai_choices import Prompt, offsets_of
from smollm_jax.serving.openai_schema import CompletionRequest, TokenizeRequest
from smollm_jax.serving.scheduler import Scheduler

EXPECTED = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"


class Prompts:
    """The prompts that a scheduler's model reads."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self._completer = scheduler, scheduler.completer

    def of(self, asked: CompletionRequest, scored: bool) -> list[Prompt]:
        """Return the prompts of a request. Raises `UserError` for one that is none, and for too many."""
        given = _listed(asked.prompt)
        n = checked_choices(asked.n, len(given))
        check_length("".join(one for one in given if isinstance(one, str)), "the prompts have")
        # without a new token the last one is only a target, so one more fits
        only_prompt = asked.echo and asked.max_tokens == 0
        prompts = [self._prompt(one, asked, only_prompt) for one in given]
        total = n * sum(len(prompt.ids) for prompt in prompts)
        times = f" for {n} texts each" if n > 1 else ""
        much = f"the prompts have {total:,} tokens{times}; the most is {MOST_PROMPT_TOKENS:,}"
        require(total <= MOST_PROMPT_TOKENS, much)
        if not (asked.echo and scored):
            return prompts
        tokenizer = self._completer.tokenizer
        return [one._replace(offsets=offsets_of(tokenizer, one.ids, one.text)) for one in prompts]

    def _prompt(self, given: str | list[int], asked: CompletionRequest, only_prompt: bool) -> Prompt:
        tokenizer, context = self._completer.tokenizer, self._completer.context
        if isinstance(given, str):
            require(given != "", "the prompt is empty; write how the text begins")
            check_text(given, "the prompt")
            ids = tokenizer.encode(given, asked.special_tokens).tolist()
        else:
            ids = given
        check_prompt(ids, context=context + only_prompt, vocab_size=self._completer.vocab_size)
        text = given if isinstance(given, str) else ""
        if asked.echo and not text:
            text = tokenizer.decode(ids, skip_special=False)
        return Prompt(ids, text, [])

    def tokens(self, asked: TokenizeRequest) -> list[int]:
        """Return the ids of a text. Raises `UserError`."""
        check_text(asked.prompt, "the prompt")
        check_length(asked.prompt, "the prompt has")
        tokenizer = self._completer.tokenizer
        if asked.add_special_tokens:
            return list(tokenizer.encode(asked.prompt, asked.special_tokens).tolist())
        return tokenizer.encode_part(asked.prompt, asked.special_tokens)

    def text(self, ids: Any) -> str:
        """Return the text of ids, special tokens included. Raises `UserError`."""
        require(_are_ids(ids), "tokens must be a list of token ids")
        most = self._completer.vocab_size - 1
        odd = next((one for one in ids if not 0 <= one <= most), None)
        require(odd is None, f"token id {odd!r:.40} is outside the vocabulary, 0 to {most:,}")
        return self._completer.tokenizer.decode(ids, skip_special=False)


def _listed(prompt: Any) -> list[Any]:
    """Return one or several prompts as a list of texts and lists of ids."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    kinds = {*map(type, prompt)} if isinstance(prompt, list) else set()
    if kinds == {str} or (kinds == {list} and all(map(_are_ids, prompt))):
        return list(prompt)
    raise UserError(EXPECTED)


def _are_ids(given: Sequence[Any]) -> bool:
    # a bool is an int to isinstance
    return isinstance(given, list) and {*map(type, given)} <= {int}

"""What a model expected at each token of a text, as JSON for the page's script.

The page asks when a reader points at a text, so a text that nobody looks at costs nothing. The tokens come from
the tokenizer in the whole text. The probabilities are the softmax of the raw logits, before any sampling rule.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from smollm_jax.generation.sampling import Score
from smollm_jax.tokenizer.streaming import TextOfIds
from smollm_jax.tokenizer.tokenizer import Tokenizer

MOST_SHOWN = 2_000  # tokens at the end of a text


def described(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[Score]) -> str:
    """Return the last tokens of a text as JSON: [[text, probability, [[text, probability], ...]], ...].

    `scores` are of each id but the first, whose probability is null. Ids that only together make a character are
    one token: probabilities multiply, and the alternatives belong to the first id.
    """
    start, tokens, open_at = max(0, len(ids) - MOST_SHOWN), list[list[Any]](), list[int]()
    text = TextOfIds(tokenizer, ids[:start])
    for at in range(start, len(ids)):
        open_at.append(at)
        piece = text.feed([ids[at]]) + (text.rest() if at == len(ids) - 1 else "")
        if piece or at == len(ids) - 1:
            tokens.append([piece, *_expected(tokenizer, [scores[i - 1] for i in open_at if i])])
            open_at = []
    return json.dumps(tokens)


def _expected(tokenizer: Tokenizer, scores: Sequence[Score]) -> tuple[float | None, list[Any]]:
    if not scores:
        return None, []
    likeliest = [(tokenizer.decode([i], skip_special=False), math.exp(p)) for i, p in scores[0].likeliest]
    return round(math.exp(sum(score.logprob for score in scores)), 6), [(one, round(p, 6)) for one, p in likeliest]

"""The probability of each token and its alternatives: those of the model's own distribution, by both back ends."""

import json
import math

import numpy as np
import pytest

from smollm_jax.runtime.errors import UserError
from smollm_jax.serving import tokens
from smollm_jax.serving.completion import open_completer
from smollm_jax.serving.tokens import described
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.server import TEXTS

TEXT = "Once upon <b>Größe</b> & 🦊"


@pytest.fixture(scope="module")
def completers(folder_of_chat_model):
    return {name: open_completer(folder_of_chat_model, backend=name) for name in ("jax", "torch")}


def scores_of(completer, ids):
    return [score for part in completer.score(ids) for score in part]


def test_both_back_ends_score_a_text_alike_and_by_the_softmax_of_the_logits(completers):
    pytest.importorskip("torch")
    ids = np.random.default_rng(0).integers(0, 300, 600).tolist()
    found = {name: scores_of(completer, ids) for name, completer in completers.items()}
    logits = completers["torch"].engine._model(__import__("torch").tensor([ids])).logits[0].detach().numpy()
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for scores in found.values():
        assert len(scores) == 599
        np.testing.assert_allclose([s.logprob for s in scores], logprobs[np.arange(599), ids[1:]], atol=2e-4)
        for score, row in zip(scores, logprobs, strict=False):
            best = np.sort(row)[::-1][:5]
            np.testing.assert_allclose([p for _, p in score.likeliest], best, atol=2e-4)
            np.testing.assert_allclose([row[i] for i, _ in score.likeliest], best, atol=2e-4)


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_a_score_ends_when_its_reader_leaves_and_a_text_beyond_the_context_is_refused(completers, name):
    completer = completers[name]
    assert len(list(completer.score([5] * 600, cancelled=lambda: True))) <= 1
    with pytest.raises(UserError, match="8,194 tokens"):
        next(completer.score([5] * 8_194))


def test_the_pieces_are_the_text_and_a_character_of_several_ids_is_one_piece(completers):
    completer = completers["jax"]
    ids = completer.tokenizer.encode(TEXT).tolist()
    scores = scores_of(completer, ids)
    pieces = json.loads(described(completer.tokenizer, ids, scores))
    assert "".join(piece for piece, _, _ in pieces) == TEXT
    assert len(pieces) < len(ids)
    assert pieces[0][1:] == [None, []]
    fox, before = pieces[-1], len(pieces) - 1
    assert fox[0] == "🦊"
    assert fox[1] == pytest.approx(math.exp(sum(score.logprob for score in scores[before - 1 :])), abs=1e-6)
    assert fox[2][0][1] == pytest.approx(math.exp(scores[before - 1].likeliest[0][1]), abs=1e-6)
    assert all(len(others) == 5 for _, _, others in pieces[1:])


def test_a_long_text_shows_its_last_tokens_and_an_unfinished_character_its_mark(monkeypatch):
    monkeypatch.setattr(tokens, "MOST_SHOWN", 3)
    tokenizer = train_tokenizer(TEXTS, 300)
    ids = tokenizer.encode("water 🦊").tolist()[:-1]
    scores = [tokens.Score(-1.0, False, [(70, -0.5)])] * (len(ids) - 1)
    pieces = json.loads(described(tokenizer, ids, scores))
    shown = "".join(piece for piece, _, _ in pieces)
    assert shown
    assert tokenizer.decode(ids).endswith(shown)
    assert shown.endswith("\ufffd")

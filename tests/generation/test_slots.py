"""Texts decoded together in slots, against the same texts alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.generation import generator as generation
from smollm_jax.generation import slots as together
from smollm_jax.generation.ahead import batch_programs
from smollm_jax.generation.generator import Generator
from smollm_jax.generation.row import Row
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.slots import Slots
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.runtime.errors import UserError

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40,
    rope_theta=10_000.0, max_seq_len=160, initializer_range=0.4,
)  # fmt: skip
SHORT = 12  # tokens of a prompt, and 20 new ones: a cache of 32
KINDS = [
    Sampling(),
    Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
    Sampling(temperature=1.2),
    Sampling(repetition_penalty=1.4, stop_ids=(7,)),
    Sampling(temperature=0.7, presence_penalty=1.5, frequency_penalty=0.5, logit_bias=((3, 2.0), (9, -50.0))),
]


@pytest.fixture(scope="module")
def generator():
    return Generator(SmolLM.from_params(CONFIG, init_params(CONFIG, 1)))


def row_of(generator, prompt, sampling, **wanted):
    return Row(prompt, sampling, context=generator.context, vocab_size=generator.vocab_size, **wanted)


def requests(count, seed=0, longest=SHORT, new=20):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, CONFIG.vocab_size, rng.integers(1, longest)).tolist(),
            replace(KINDS[i % len(KINDS)], seed=i, max_new_tokens=int(rng.integers(1, new))),
        )
        for i in range(count)
    ]


def served(slots, rows, arrive=lambda _: True):
    """The ids of each row, which come in their order as there is room. `arrive` may hold the next one back."""
    texts, waiting, step = {row: [] for row in rows}, list(rows), 0
    while waiting or slots.rows:
        while waiting and slots.fits(waiting[0]) and arrive(step):
            slots.add(waiting.pop(0))
        step += 1
        for made in slots.step():
            texts[made.row] += made.ids
    return [texts[row] for row in rows]


def test_a_text_in_company_is_the_text_alone(generator, monkeypatch):
    monkeypatch.setattr(together, "SHORTEST", 32)
    asked = requests(20)
    alone = [generator.generate([prompt], sampling)[0] for prompt, sampling in asked]
    rows = [row_of(generator, *one) for one in asked]
    slots = Slots(generator, 4)
    assert served(slots, rows) == alone
    assert [row.reason for row in rows] == [
        "eos" if len(text) < row.room else "length" for row, text in zip(rows, alone, strict=True)
    ]
    assert {row.reason for row in rows} == {"eos", "length"}
    assert slots._state is None  # nobody is there: the cache is free


@pytest.mark.release
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_come_and_go_at_any_time_are_the_texts_alone(generator, seed):
    asked, rng = requests(30, seed + 1, longest=90, new=70), np.random.default_rng(seed)
    alone = [generator.generate([prompt], sampling)[0] for prompt, sampling in asked]
    rows = [row_of(generator, *one) for one in asked]
    assert served(Slots(generator, 3), rows, lambda _: rng.random() < 0.3) == alone


@pytest.mark.release
def test_long_texts_take_the_place_of_several(generator, monkeypatch):
    monkeypatch.setattr(together, "SLOT_TOKENS", 64)
    monkeypatch.setattr(together, "SHORTEST", 32)
    slots = Slots(generator, 4)  # 256 positions
    long = Sampling(max_new_tokens=60)
    asked = [([5] * 3, long), ([9] * 5, replace(long, seed=1)), ([8] * 90, long), ([4, 5], long)]
    rows = [row_of(generator, *one) for one in asked]
    assert [row.length for row in rows] == [64, 128, 160, 64]
    slots.add(rows[0])
    assert slots.fits(rows[1])  # two of 128
    assert not slots.fits(rows[2])  # one of 160, so it waits until it is alone
    slots.clear()
    alone = [generator.generate([prompt], sampling)[0] for prompt, sampling in asked]
    assert served(slots, [row_of(generator, *one) for one in asked]) == alone


@pytest.mark.release
def test_the_caches_keep_to_what_was_said(generator, monkeypatch):
    monkeypatch.setattr(together, "SLOT_TOKENS", 64)
    monkeypatch.setattr(together, "SHORTEST", 32)
    slots, most = Slots(generator, 4), 0
    kinds = {CONFIG.head_dim, CONFIG.num_kv_heads}

    def bytes_of_caches():
        return sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4 and kinds <= set(x.shape))

    before = bytes_of_caches()
    waiting = [row_of(generator, *one) for one in requests(6, longest=20, new=70)]
    while waiting or slots.rows:
        while waiting and slots.fits(waiting[0]):
            slots.add(waiting.pop(0))
        slots.step()
        most = max(most, bytes_of_caches() - before)
    assert 0 < most <= slots.cache_bytes
    assert slots.cache_bytes == 3 * 256 * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4


@pytest.mark.slow
def test_a_long_prompt_lets_the_others_write_between_its_parts(monkeypatch):
    monkeypatch.setattr(generation, "PART_ON_CPU", 16)
    engine = Generator(SmolLM.from_params(CONFIG, init_params(CONFIG, 1)))
    slots = Slots(engine, 2)
    writes, long = row_of(engine, [5], Sampling(max_new_tokens=100)), row_of(engine, [7] * 100, Sampling())
    slots.add(writes)
    slots.step()
    slots.add(long)
    while long.sent == 0:
        before = long.read_to
        made = slots.step()
        assert long.read_to - before <= 16
        assert [len(one.ids) for one in made if one.row is writes] == [generation.CHUNK]
    assert long.read_to >= 100


@pytest.mark.slow
def test_a_dropped_text_leaves_its_slot_to_the_next_and_the_others_alone(generator, monkeypatch):
    monkeypatch.setattr(together, "SHORTEST", 32)
    monkeypatch.setattr(generation, "CHUNK", 2)
    generator = Generator(SmolLM.from_params(CONFIG, init_params(CONFIG, 1)))
    asked = [([i + 1] * (i + 2), Sampling(max_new_tokens=28 - i, temperature=0.8, seed=i)) for i in range(3)]
    rows = [row_of(generator, *one) for one in asked]
    slots, texts = Slots(generator, 2), {row: [] for row in rows}
    slots.add(rows[0])
    slots.add(rows[1])
    for _ in range(3):
        for made in slots.step():
            texts[made.row] += made.ids
    assert not slots.fits(rows[2])
    slots.drop(rows[0])
    assert slots.fits(rows[2])
    slots.add(rows[2])
    while slots.rows:
        for made in slots.step():
            texts[made.row] += made.ids
    alone = [generator.generate([prompt], sampling)[0] for prompt, sampling in asked]
    assert [texts[row] for row in rows[1:]] == alone[1:]
    assert rows[0].reason == "cancelled"
    assert texts[rows[0]] == alone[0][: len(texts[rows[0]])]
    assert len(texts[rows[0]]) < 28


@pytest.mark.release
def test_scores_come_from_the_logits_before_any_rule(generator):
    prompt = list(range(2, 32))
    rows = [
        row_of(generator, prompt, replace(KINDS[4], max_new_tokens=20), scored=True, reads_scores=True),
        row_of(generator, [3, 4], Sampling(max_new_tokens=30)),
        row_of(generator, prompt, None),
    ]
    slots, prompts, scored = Slots(generator, 3), {row: [] for row in rows}, []
    for row in rows:
        slots.add(row)
    while slots.rows:
        for made in slots.step():
            prompts[made.row] += made.prompt_scores
            scored += made.scored
    assert [row.reason for row in rows] == ["length", "length", "scored"]
    expected = [score for part in generator.score(prompt + [i for i, _ in scored]) for score in part]
    assert len(expected) == len(prompts[rows[0]]) + len(scored) == 49
    for own, other in zip(prompts[rows[0]] + [score for _, score in scored], expected, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert own.is_likeliest == other.is_likeliest
        assert [i for i, _ in own.likeliest] == [i for i, _ in other.likeliest]
    assert prompts[rows[2]] == [score for part in generator.score(prompt) for score in part]
    assert prompts[rows[1]] == []


@pytest.mark.release
def test_a_stop_id_has_its_score_and_is_no_text(generator):
    text = generator.generate([[5, 6]], Sampling(max_new_tokens=20))[0]
    row = row_of(generator, [5, 6], Sampling(max_new_tokens=20, stop_ids=(text[12],)), scored=True)
    slots, scored = Slots(generator, 2), []
    slots.add(row)
    while slots.rows:
        scored += [one for made in slots.step() for one in made.scored]
    assert row.reason == "eos"
    assert [token for token, _ in scored] == text[: text.index(text[12]) + 1]
    assert row.made == len(scored) - 1


@pytest.mark.slow
def test_a_batch_has_no_more_rows_than_it_needs(generator, monkeypatch):
    """Of the batches that are compiled; if none is, it has all slots."""
    monkeypatch.setattr(together, "SHORTEST", 32)
    monkeypatch.setattr(together, "PATIENCE", 2)

    def sizes(asked, scored=False):
        seen, slots = [], Slots(generator, 8)
        for prompt, new in asked:
            slots.add(row_of(generator, [5] * prompt, Sampling(max_new_tokens=new), scored=scored))
        while slots.rows:
            slots.step()
            shape = (len(slots._rows), slots._state.shape[2] if slots._state else 0)
            if not seen or seen[-1] != shape:
                seen.append(shape)
        return seen

    few = [(1, 60), (1, 44), (1, 12), (1, 12)]  # two end long before the others
    monkeypatch.setattr(generator.programs, "knows", lambda *_: True)
    assert sizes(few) == [(1, 64), (4, 64), (2, 64), (0, 0)]
    assert sizes([(40, 12), (40, 12), (1, 31), (1, 31)])[1:3] == [(4, 64), (2, 64)], "a row moves once, not twice"
    known = lambda *key: key[1][0] == 2 and key[3]  # noqa: E731 - of scored texts, and two
    monkeypatch.setattr(generator.programs, "knows", known)
    assert sizes(few) == [(1, 64), (8, 64), (0, 0)]
    assert sizes(few, scored=True) == [(1, 64), (8, 64), (2, 64), (0, 0)]


def test_what_is_no_prompt_takes_no_slot(generator):
    with pytest.raises(UserError, match="the prompt has 160 tokens"):
        row_of(generator, [1] * 160, Sampling())
    assert row_of(generator, [1] * 160, None).room == 0  # the last one is only a target
    with pytest.raises(UserError, match="the prompt has 161 tokens"):
        row_of(generator, [1] * 161, None)


@pytest.mark.release
def test_a_batch_compiles_nothing_that_was_compiled_ahead():
    generator = Generator(SmolLM.from_params(CONFIG, init_params(CONFIG, 1)))  # new: its programs
    slots, compiled = Slots(generator, 3), []
    for narrow in (False, True):
        for compile_next in batch_programs(slots, 160, narrow=narrow):
            compile_next()
    asked = [([i + 1] * (30 * i + 3), Sampling(max_new_tokens=30, temperature=0.5)) for i in range(3)]
    for one in asked:
        served(slots, [row_of(generator, *one)])

    def count(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        served(slots, [row_of(generator, *one) for one in asked])
        assert compiled == []
    finally:
        jax.monitoring.clear_event_listeners()

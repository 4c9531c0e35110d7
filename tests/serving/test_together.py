"""Requests of several clients over one scheduler: texts in company, cancelling, stop strings, other weights."""

import asyncio
import copy
import time
from dataclasses import replace

import pytest

from smollm_jax.generation import generator as generation
from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving import ladder
from smollm_jax.serving.completion import open_completer
from smollm_jax.serving.jobs import Asked
from smollm_jax.serving.limits import QueueFull
from smollm_jax.serving.scheduler import Scheduler
from tests.support.server import CONFIG, export_model

PROMPTS = ["Once upon a time", "The water cycle", "水", "Größe 🦀"]


@pytest.fixture(scope="module")
def completer(tmp_path_factory):
    small = replace(CONFIG, num_layers=1, max_seq_len=256)
    return open_completer(export_model(tmp_path_factory.mktemp("together"), config=small))


@pytest.fixture
def scheduler(completer, monkeypatch):
    for name in ("climb", "first_rung"):
        monkeypatch.setattr(ladder, name, lambda *_: None)
    one = Scheduler(copy.copy(completer), max_waiting=6, max_new_tokens=200, slots=3)
    yield one
    one.close()


async def text_of(scheduler, prompt, sampling, stop=(), **who):
    stream = scheduler.stream(scheduler.encode(prompt), sampling, stop, **who)
    chunks = [chunk async for chunk in stream]
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def alone(completer, prompt, sampling, stop=()):
    chunks = list(completer.stream(prompt, sampling, stop))
    return "".join(chunk.text for chunk in chunks), chunks[-1].reason


@pytest.mark.slow
def test_each_client_gets_the_text_it_would_get_alone(completer, scheduler):
    drawn = Sampling(max_new_tokens=30, temperature=0.9, top_p=0.9)
    asked = [
        (PROMPTS[i % 4], replace(drawn, seed=i, temperature=0.9 * (i % 3 > 0), max_new_tokens=5 + 7 * i), stop)
        for i, stop in enumerate([(), ("e",), (), ("qu", "zz"), (), ()])
    ]
    expected = [alone(completer, *one) for one in asked]

    async def go():
        return await asyncio.gather(
            *(text_of(scheduler, *one, client=f"client {i % 4}") for i, one in enumerate(asked))
        )

    found = asyncio.run(go())
    assert [(text, last.reason) for text, last in found] == expected
    assert {reason for _, reason in expected} == {"length", "stop string"}
    while scheduler.is_busy:  # the thread has given the last text away, and looks up
        time.sleep(0.001)


@pytest.mark.slow
def test_who_leaves_or_is_cancelled_gives_the_slot_to_the_next(scheduler):
    long, short = Sampling(max_new_tokens=200), Sampling(max_new_tokens=10)

    async def go():
        streams = [scheduler.stream([i + 5], long, owner=f"page {i}") for i in range(3)]
        for stream in streams:
            assert (await anext(stream)).reason is None
        waiting = asyncio.create_task(text_of(scheduler, "Once", short))
        await asyncio.sleep(0.05)
        assert scheduler.waiting == 2  # the one that waits, and the one that a new request would wait for
        await streams[0].aclose()  # its client left
        assert (await waiting)[1].reason == "length"
        scheduler.cancel("page 1")
        rest = [chunk async for chunk in streams[1]]
        assert rest[-1].reason == "cancelled"
        assert rest[-1].tokens < 200
        whole = [chunk async for chunk in streams[2]]
        assert (whole[-1].reason, whole[-1].tokens) == ("length", 200)

    asyncio.run(go())


@pytest.mark.release
def test_a_long_prompt_holds_up_nobody(scheduler, monkeypatch):
    """Between two chunks of a text that is being written, at most one part of a prompt is read."""
    engine = scheduler.completer.engine
    order, read, decode = [], engine.read_part, engine.decode
    monkeypatch.setattr(engine, "part", 16)
    monkeypatch.setattr(engine, "read_part", lambda *a, **k: order.append("part") or read(*a, **k))
    monkeypatch.setattr(engine, "decode", lambda *a, **k: order.append("chunk") or decode(*a, **k))

    async def go():
        writing = scheduler.stream([5], Sampling(max_new_tokens=200))
        await anext(writing)
        long = asyncio.create_task(text_of(scheduler, "The water " * 20, Sampling(max_new_tokens=3), client="b"))
        async for _ in writing:
            pass
        await long

    asyncio.run(go())
    between = " ".join(order).split("chunk")
    parts = [one.count("part") for one in between[: -(-200 // generation.CHUNK)]]
    assert max(parts) == 1
    assert sum(parts) > 5


@pytest.mark.release
def test_a_request_of_many_texts_has_one_place_in_the_queue_and_others_come_between(scheduler):
    many, short, ended = Asked(), Sampling(max_new_tokens=30), []

    async def one(name, **who):
        await text_of(scheduler, "Once", short, **who)
        ended.append(name)

    async def go():
        tasks = [asyncio.create_task(one("many", client="a", asked=many)) for _ in range(12)]  # above max_waiting
        await asyncio.sleep(0.02)
        await one("other", client="b")
        await asyncio.gather(*tasks)

    asyncio.run(go())
    assert ended.count("many") == 12
    assert ended.index("other") < 9


@pytest.mark.release
def test_a_full_queue_refuses_a_request_and_not_a_text_of_one_that_is_served(scheduler):
    async def go():
        asked, long, tasks = [Asked() for _ in range(9)], Sampling(max_new_tokens=200), []

        def start(i):
            work = text_of(scheduler, "Once", long, client=f"c{i}", asked=asked[i])
            tasks.append(asyncio.create_task(work))

        for count, is_there in ((3, lambda: len(scheduler._now) == 3), (6, lambda: len(scheduler._queue) == 6)):
            for _ in range(count):
                start(len(tasks))
            while not is_there():
                await asyncio.sleep(0.001)
        with pytest.raises(QueueFull):
            await text_of(scheduler, "Once", long, client="new")
        await text_of(scheduler, "Once", Sampling(max_new_tokens=1), client="c0", asked=asked[0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(go())


@pytest.mark.release
def test_texts_of_other_weights_wait_for_those_under_way(completer, scheduler):
    other = copy.copy(completer.engine)
    other._weights = [leaf * 1.01 for leaf in other._weights]
    asked = Sampling(max_new_tokens=40)
    expected = [list(engine.stream([5, 6], asked)) for engine in (completer.engine, other)]
    ids = [[i for part in parts for i in part] for parts in expected]
    assert ids[0] != ids[1]

    class Two:
        newest = None

        def take_loaded(self, choice):
            return choice, {"newest": completer.engine, "other": other}[choice]

        def give_back(self, _):
            pass

        def close(self):
            pass

    scheduler.weights = scheduler._claims._weights = Two()

    async def go():
        return await asyncio.gather(*(
            text_of(scheduler, scheduler.completer.tokenizer.decode([5, 6]), asked, weights=name, client=name)
            for name in ("newest", "other", "newest")
        ))  # fmt: skip

    found = [text for text, _ in asyncio.run(go())]
    texts = [alone_of(completer, engine, asked) for engine in (completer.engine, other)]
    assert found == [texts[0], texts[1], texts[0]]


def alone_of(completer, engine, sampling):
    own = copy.copy(completer)
    own.engine = engine
    return alone(own, completer.tokenizer.decode([5, 6]), sampling)[0]


class Broken(BaseException):
    pass


@pytest.mark.release
def test_an_error_of_the_model_ends_those_under_way_alone(scheduler, monkeypatch, capsys):
    step = scheduler.turns.slots.step
    monkeypatch.setattr(scheduler.turns.slots, "step", lambda: (_ for _ in ()).throw(Broken("memory")))

    async def failing():
        with pytest.raises(RuntimeError, match="the model failed with Broken"):
            await text_of(scheduler, "Once", Sampling(max_new_tokens=5))

    asyncio.run(failing())
    monkeypatch.setattr(scheduler.turns.slots, "step", step)
    assert asyncio.run(text_of(scheduler, "Once", Sampling(max_new_tokens=5)))[1].tokens == 5
    assert "memory" in capsys.readouterr().err


@pytest.mark.release
def test_an_error_of_one_text_ends_that_text_alone(scheduler, monkeypatch):
    from smollm_jax.serving.text import TextWriter

    feed, marked = TextWriter.feed, []
    monkeypatch.setattr(
        TextWriter,
        "feed",
        lambda self, *a: 1 / 0 if marked and self is marked[0] and self.made else feed(self, *a),
    )

    async def go():
        first = asyncio.create_task(text_of(scheduler, "Once", Sampling(max_new_tokens=100)))
        while not scheduler.turns._rows:
            await asyncio.sleep(0.001)
        marked.append(next(iter(scheduler.turns._rows.values()))[1])
        second = await text_of(scheduler, "The", Sampling(max_new_tokens=20))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await first
        return second

    assert asyncio.run(go())[1].tokens == 20


@pytest.mark.release
def test_closing_ends_the_texts_under_way(scheduler):
    async def go():
        stream = scheduler.stream([5], Sampling(max_new_tokens=200))
        await anext(stream)
        started = time.monotonic()
        await asyncio.to_thread(scheduler.close)
        assert [chunk async for chunk in stream][-1].reason == "cancelled"
        return time.monotonic() - started

    assert asyncio.run(go()) < 5
    assert scheduler.is_closed

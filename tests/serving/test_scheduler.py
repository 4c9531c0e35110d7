"""The queue before the model: clients in turn, room for each, and a thread that survives."""

import asyncio
import threading

import pytest

from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving.completion import Completer
from smollm_jax.serving.jobs import ModelGone
from smollm_jax.serving.limits import QueueFull
from smollm_jax.serving.scheduler import Scheduler
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.server import TEXTS, chat_tokenizer


class Gated:
    """An engine that writes a token once it may, and remembers whose prompt it was."""

    context, vocab_size, stop_reason = 100, 320, "length"

    def __init__(self):
        self.gate, self.prompts, self.fails = threading.Semaphore(0), [], None

    def stream(self, prompt, sampling):  # noqa: ARG002 - the engine protocol
        if len(prompt) > 1:  # the warm-up
            return
        self.prompts.append(prompt[0])
        self.gate.acquire()
        if self.fails:
            raise self.fails
        yield [70]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def scheduler_of(tokenizer, **numbers):
    engine = Gated()
    return engine, Scheduler(Completer(engine, tokenizer), **{"max_waiting": 4, "max_new_tokens": 8} | numbers)


async def text_of(scheduler, number, client):
    return [chunk async for chunk in scheduler.stream([number], Sampling(max_new_tokens=1), client=client)]


async def started(work):
    task = asyncio.create_task(work)
    await asyncio.sleep(0.05)
    return task


def test_clients_are_served_in_turn_and_the_one_with_most_gives_way(tokenizer):
    engine, scheduler = scheduler_of(tokenizer)

    async def go():
        first = [await started(text_of(scheduler, i, "greedy")) for i in range(1, 6)]
        with pytest.raises(QueueFull):
            await text_of(scheduler, 6, "greedy")
        other = await started(text_of(scheduler, 10, "other"))
        with pytest.raises(QueueFull):
            await first[4]
        for _ in range(5):
            engine.gate.release()
        await asyncio.gather(*first[:4], other)

    asyncio.run(go())
    scheduler.close()
    assert engine.prompts == [1, 10, 2, 3, 4]


def test_who_leaves_before_the_prompt_is_encoded_gives_up_the_turn_but_not_a_running_thread(tokenizer):
    _, scheduler = scheduler_of(tokenizer)
    gate, begun = threading.Event(), []

    def encode(name):
        begun.append(name)
        gate.wait(9)

    async def go():
        running, waiting = [await started(scheduler.in_turn(encode, name, chat=True)) for name in "ab"]
        running.cancel()
        waiting.cancel()
        last = await started(scheduler.in_turn(encode, "c", chat=True))
        assert begun == ["a"]  # its thread still has the turn
        gate.set()
        await last

    asyncio.run(go())
    scheduler.close()
    assert begun == ["a", "c"]


def test_a_stop_that_overtakes_its_announced_request_ends_it_and_no_other(tokenizer):
    engine, scheduler = scheduler_of(tokenizer)

    async def reasons(number):
        chunks = scheduler.stream([number], Sampling(max_new_tokens=1), owner="page")
        return [chunk.reason async for chunk in chunks if chunk.reason]

    async def go():
        engine.gate.release(9)
        scheduler.cancel("page")  # of nothing: the next request is not meant
        assert await reasons(1) == ["length"]
        scheduler.announce("page")
        scheduler.cancel("page")
        assert await reasons(2) == ["cancelled"]
        assert await reasons(3) == ["length"]
        scheduler.announce("page")
        scheduler.cancel("page")
        scheduler.announce("page")  # pressed anew: the request before never came
        assert await reasons(4) == ["length"]

    asyncio.run(go())
    scheduler.close()
    assert engine.prompts == [1, 3, 4]


def test_announced_requests_that_never_come_are_forgotten(tokenizer, monkeypatch):
    monkeypatch.setattr("smollm_jax.serving.scheduler.MOST_ANNOUNCED", 3)
    _, scheduler = scheduler_of(tokenizer)
    for number in range(9):
        scheduler.announce(str(number))
    assert list(scheduler._announced) == ["6", "7", "8"]
    scheduler.close()


def test_a_full_queue_of_single_requests_refuses_one_more(tokenizer):
    engine, scheduler = scheduler_of(tokenizer, max_waiting=2)

    async def go():
        tasks = [await started(text_of(scheduler, i, f"client {i}")) for i in (1, 2, 3)]
        with pytest.raises(QueueFull):
            await text_of(scheduler, 4, "client 4")
        for _ in tasks:
            engine.gate.release()
        await asyncio.gather(*tasks)

    asyncio.run(go())
    scheduler.close()


class Panic(BaseException):
    pass


def test_the_thread_of_the_model_survives_a_panic(tokenizer, capsys):
    engine, scheduler = scheduler_of(tokenizer)
    engine.gate.release(2)
    engine.fails = Panic("rust")
    with pytest.raises(RuntimeError, match="Panic"):
        asyncio.run(text_of(scheduler, 1, ""))
    engine.fails = None
    assert asyncio.run(text_of(scheduler, 2, ""))[-1].tokens == 1
    scheduler.close()
    assert "Panic" in capsys.readouterr().err


def test_without_its_thread_nobody_waits(tokenizer, monkeypatch):
    engine, scheduler = scheduler_of(tokenizer)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def go():
        waiting = [await started(text_of(scheduler, i, "")) for i in (1, 2)]
        monkeypatch.setattr(scheduler, "_next", lambda: 1 / 0)
        engine.gate.release()
        await waiting[0]
        with pytest.raises(ModelGone):
            await asyncio.wait_for(waiting[1], 5)
        with pytest.raises(ModelGone):
            await text_of(scheduler, 3, "")

    asyncio.run(go())


def test_a_model_with_room_for_one_token_has_a_page():
    pytest.importorskip("gradio")
    from smollm_jax.serving.page import build_page

    engine, tokenizer = Gated(), train_tokenizer(TEXTS, 300)
    for numbers in ({"max_new_tokens": 1}, {"max_new_tokens": 9, "context": 2}):
        engine.context = numbers.pop("context", 100)
        scheduler = Scheduler(Completer(engine, tokenizer), max_waiting=1, **numbers)
        assert scheduler.max_new_tokens == 1
        build_page(scheduler, "one", with_key=False)
        scheduler.close()
    engine.context = 1
    with pytest.raises(ValueError, match="no room"):
        Scheduler(Completer(engine, tokenizer), max_waiting=1, max_new_tokens=1)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP, "{{ 'a' * 999999999999 }}", "{{ '%0999999999d' % 1 }}"], ids=range(3))
def test_a_template_without_end_has_no_chat(tmp_path, template, capsys):
    from smollm_jax.tokenizer.tokenizer import Tokenizer

    engine, tokenizer = Gated(), Tokenizer(chat_tokenizer(tmp_path))
    tokenizer.chat_template = template
    scheduler = Scheduler(Completer(engine, tokenizer), max_waiting=1, max_new_tokens=1)
    scheduler.try_chat()
    assert not scheduler.has_chat
    assert "no chat: the chat template takes more than 2 s" in capsys.readouterr().err
    scheduler.close()


def test_a_template_that_ends_only_for_some_is_stopped_and_others_are_rendered(tmp_path):
    from smollm_jax.tokenizer.chat_template import encode_chat
    from smollm_jax.tokenizer.tokenizer import Tokenizer

    engine, tokenizer = Gated(), Tokenizer(chat_tokenizer(tmp_path))
    good = tokenizer.chat_template
    tokenizer.chat_template = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{good}"
    scheduler = Scheduler(Completer(engine, tokenizer), max_waiting=1, max_new_tokens=1)
    turn = {"role": "user", "content": "hi"}
    scheduler.try_chat()
    assert scheduler.has_chat
    for _ in range(2):
        with pytest.raises(ValueError, match="takes more than"):
            scheduler.encode_chat([turn | {"content": "loop"}])
        assert scheduler.encode_chat([turn]) == encode_chat(tokenizer, [turn])
    scheduler.close()

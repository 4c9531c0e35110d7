"""Programs are compiled ahead, in the background, and no text then compiles what the ladder has."""

import gc
import threading
import time

import jax
import pytest

from smollm_jax.generation.lengths import bucket
from smollm_jax.generation.programs import Programs
from smollm_jax.generation.sampling import Sampling
from smollm_jax.serving import ladder
from smollm_jax.serving.completion import open_completer
from smollm_jax.serving.ladder import climb, rungs


def test_every_length_within_the_ladder_has_its_rung():
    found = [(bucket(prompt), bucket(text)) for prompt, text in rungs(1_024, 200)]
    assert {(bucket(prompt), bucket(prompt + 200)) for prompt in range(1, 825)} == set(found)
    assert len(found) == len(set(found))
    assert all(text <= 1_024 for _, text in rungs(1_024, 200))


@pytest.mark.slow
def test_a_text_compiles_nothing_that_was_compiled_ahead(folder_of_chat_model, monkeypatch):
    monkeypatch.setattr(ladder, "LONGEST", 600)
    completer = open_completer(folder_of_chat_model)
    compiled, busy, ends = [], threading.Event(), threading.Event()

    def heard(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    busy.set()
    frozen = gc.get_freeze_count()
    climb(completer, 2_000, busy.is_set, ends)
    time.sleep(0.3)
    assert "ladder" not in compiled  # it waits while a request does
    busy.clear()
    thread = next(one for one in threading.enumerate() if one.name == "ladder")
    thread.join(120)
    assert "ladder" in compiled
    assert gc.get_freeze_count() > frozen + 10_000  # else a full collection scans all that JAX keeps of a program
    for length in (5, 60, 100, 300):
        list(completer.stream([7] * length, Sampling(max_new_tokens=200, temperature=1.0)))
        compiled.clear()
        list(completer.stream([7] * length, Sampling(max_new_tokens=200, temperature=0.0)))
        assert compiled == []
    assert not completer.engine.is_compiling


def test_two_threads_compile_a_program_once_and_one_that_waits_is_counted():
    programs, gate, order = Programs(), threading.Event(), []

    def ahead():
        with programs.compiling("a") as is_new:
            order.append(is_new)
            gate.wait(9)

    def call():
        with programs.calling("a"):
            order.append("called")

    threads = [threading.Thread(target=ahead)]
    threads[0].start()
    threads += [threading.Thread(target=call), threading.Thread(target=ahead)]
    for thread in threads[1:]:
        thread.start()
    while programs.waiting == 0:
        time.sleep(0.01)
    with programs.calling("b"):  # another program does not wait
        assert programs.waiting == 2
    assert order == [True]
    gate.set()
    for thread in threads:
        thread.join(9)
    assert order[0] is True
    assert sorted(map(str, order[1:])) == ["False", "called"]
    assert programs.waiting == 0


def test_a_failed_compilation_leaves_the_program_unknown():
    programs = Programs()
    for _ in range(2):
        try:
            with programs.calling("a"):
                raise MemoryError
        except MemoryError:
            assert programs.waiting == 0
    with programs.compiling("a") as is_new:
        assert is_new

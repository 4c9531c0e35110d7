"""Compile the programs of longer texts in the background, before a text gets that long.

A program serves all lengths up to a power of two, so a growing text climbs a ladder of programs. The thread
compiles beside the model's thread and runs nothing. It waits while any request does.
"""

import atexit
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from smollm_jax.generation.ahead import batch_programs
from smollm_jax.generation.lengths import bucket
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.slots import Slots
from smollm_jax.runtime.errors import one_line, say
from smollm_jax.serving.completion import Completer

NEW_TOKENS = 200  # the page's default length
LONGEST = 2_048  # tokens of a text: a person seldom writes longer ones
WAIT_SECONDS = 0.1  # between looks whether a request waits


def rungs(longest: int, new_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield lengths of prompt and text, one pair for each pair of powers of two, shortest first."""
    seen = set()
    for prompt in range(1, longest - new_tokens + 1):
        if (pair := (bucket(prompt), bucket(prompt + new_tokens))) not in seen:
            seen.add(pair)
            yield prompt, prompt + new_tokens


def first_rung(completer: Completer, max_new_tokens: int) -> None:
    """Run the programs of a first request. A failure is left for that request to report."""
    with contextlib.suppress(BaseException):
        ids, new = completer.encode("Once"), min(NEW_TOKENS, max_new_tokens)
        sampling = Sampling(max_new_tokens=new, temperature=1.0, top_k=50, top_p=0.9)
        with contextlib.closing(completer.stream(ids, sampling)) as chunks:  # type: ignore[type-var]
            next(chunks)


def climb(
    completer: Completer, max_new_tokens: int, is_busy: Callable[[], bool], closed: threading.Event,
    slots: Slots | None = None,
) -> None:  # fmt: skip
    """Start a thread that compiles rung by rung: sampled texts, texts in company, greedy texts, few in company.

    Only JAX compiles.
    """
    engine: Any = completer.engine

    longest, new_tokens = min(LONGEST, engine.context), min(NEW_TOKENS, max_new_tokens)

    def single(greedy: bool) -> Iterator[Callable[[], None]]:
        for prompt, text in rungs(longest, new_tokens):
            yield from engine.programs_of(prompt, text, completer.stop_ids, greedy=greedy)

    def work() -> None:
        try:
            wide, narrow = (batch_programs(slots, longest, narrow=n) if slots else () for n in (False, True))
            for compile_next in chain(single(False), wide, single(True), narrow):
                while is_busy() and not closed.is_set():
                    closed.wait(WAIT_SECONDS)
                if closed.is_set():
                    return
                compile_next()
                gc.freeze()  # what JAX keeps of a program: a collection scans it for 0.2 s after all rungs
        except Exception as error:  # a request that needs the program will report it
            say(f"the programs of longer texts could not be compiled ahead: {one_line(error)}")

    def end() -> None:
        closed.set()
        thread.join()  # a thread that compiles while Python exits would abort the process

    if hasattr(engine, "programs_of"):
        thread = threading.Thread(target=work, daemon=True, name="ladder")
        atexit.register(end)
        thread.start()

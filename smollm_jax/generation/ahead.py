"""Compile the programs of a batch of slots before a text needs them. Nothing here runs a program."""

from collections.abc import Callable
from typing import Any

import jax

from smollm_jax.generation.lengths import bucket
from smollm_jax.generation.sampling import Sampling, SamplingArrays
from smollm_jax.generation.slots import SHORTEST, Slots


def batch_programs(slots: Slots, longest: int) -> list[Callable[[], None]]:
    """Return functions that compile the programs of texts up to `longest` tokens in company, shortest first.

    The functions may run in any thread.
    """
    functions, engine = list[Callable[[], None]](), slots.generator
    arrays = SamplingArrays.stacked([SamplingArrays.from_sampling(Sampling())] * slots.count)
    singles, length = list[int](), bucket(1)
    while length <= min(bucket(longest), engine.context) and slots.count > 1:
        singles.append(length)
        count = slots.slots_of(length)
        if length >= min(SHORTEST, engine.context) and count == slots.count:
            batch = jax.eval_shape(lambda length=length: slots.nothing(slots.count, length))
            functions.append(engine.decode_ahead(batch, arrays, greedy=False))
            ahead = engine.programs.ahead
            sizes = [(count, length), *((1, single) for single in singles)]
            functions += [ahead(("zeros", *size), slots.zeros, *size) for size in sizes]
            place: Any = jax.ShapeDtypeStruct((), "int32")
            for single in singles:
                row = jax.eval_shape(lambda single=single: slots.nothing(1, single))
                for into, source in ((batch, row), (row, batch)):
                    names = ("move", into.shape, source.shape)
                    functions.append(ahead(names, slots.move, into, place, source, place))
        length *= 2
    return functions

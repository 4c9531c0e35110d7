"""Compile the programs of a batch of slots before a text needs them. Nothing here runs a program."""

from collections.abc import Callable, Iterable, Iterator
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
    lengths, length = list[int](), bucket(1)
    while length <= min(bucket(longest), engine.context) and slots.count > 1:
        lengths.append(length)
        length *= 2
    batched = [x for x in lengths if x >= min(SHORTEST, engine.context) and slots.slots_of(x) == slots.count]
    widths = slots.widths_of(batched[0]) if batched else []
    for width in reversed(widths):  # the widest serves any number of texts
        for length in batched:
            functions += _of_batch(slots, width, length, [x for x in lengths if x <= length])
            functions += _moves(slots, (((width, length), (x, length)) for x in widths if x > width))
    return functions


def _of_batch(slots: Slots, width: int, length: int, singles: list[int]) -> Iterator[Callable[[], None]]:
    """Compile the programs of a batch that single texts with caches of lengths `singles` join and leave."""
    ahead, arrays = slots.generator.programs.ahead, [SamplingArrays.from_sampling(Sampling())] * width
    batch = jax.eval_shape(lambda: slots.nothing(width, length))
    yield slots.generator.decode_ahead(batch, SamplingArrays.stacked(arrays), greedy=False)
    for size in ((width, length), *((1, single) for single in singles)):
        yield ahead(("zeros", *size), slots.zeros, *size)
    yield from _moves(slots, (((width, length), (1, single)) for single in singles))


def _moves(slots: Slots, pairs: Iterable[tuple[tuple[int, int], tuple[int, int]]]) -> Iterator[Callable[[], None]]:
    """Compile the moves of a row between two batches of given width and length, both ways."""
    place: Any = jax.ShapeDtypeStruct((), "int32")
    for pair in pairs:
        one, other = (jax.eval_shape(lambda size=size: slots.nothing(*size)) for size in pair)
        for into, source in ((one, other), (other, one)):
            names = ("move", into.shape, source.shape)
            yield slots.generator.programs.ahead(names, slots.move, into, place, source, place)

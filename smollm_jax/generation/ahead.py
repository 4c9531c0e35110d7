"""Compile the programs of a batch of slots before a text needs them. Nothing here runs a program."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import jax

from smollm_jax.generation.lengths import bucket
from smollm_jax.generation.sampling import Sampling, SamplingArrays
from smollm_jax.generation.slots import SHORTEST, Slots


def batch_programs(slots: Slots, longest: int, *, narrow: bool) -> Iterator[Callable[[], None]]:
    """Yield functions that compile the programs of texts up to `longest` tokens in company, shortest first.

    They are of batches of all slots, which serve any number of texts, or of the `narrow` ones. The functions may
    run in any thread.
    """
    engine, lengths, length = slots.generator, list[int](), bucket(1)
    while length <= min(bucket(longest), engine.context) and slots.count > 1:
        lengths.append(length)
        length *= 2
    batched = [x for x in lengths if x >= min(SHORTEST, engine.context) and slots.slots_of(x) == slots.count]
    widths = slots.widths_of(batched[0]) if batched else []
    for width in reversed(widths[:-1]) if narrow else widths[-1:]:
        for length in batched:
            singles = ((1, single) for single in lengths if single <= length)
            others = [*singles, *((wider, length) for wider in widths if wider > width)]
            yield from _of_batch(slots, (width, length), others)


def _of_batch(slots: Slots, size: tuple[int, int], others: list[tuple[int, int]]) -> Iterator[Callable[[], None]]:
    """Compile the programs of a batch of width and length `size`, which rows of `others` join and leave."""
    ahead, place = slots.generator.programs.ahead, cast(Any, jax.ShapeDtypeStruct((), "int32"))
    batch = jax.eval_shape(lambda: slots.nothing(*size))
    for one in (size, *(other for other in others if other[0] == 1)):
        yield ahead(("zeros", *one), slots.zeros, *one)
    for other in others:
        row = jax.eval_shape(lambda other=other: slots.nothing(*other))
        for into, source in ((batch, row), (row, batch)):
            yield ahead(("move", into.shape, source.shape), slots.move, into, place, source, place)
    # the last, because the batch is taken once this is there
    arrays = SamplingArrays.stacked([SamplingArrays.from_sampling(Sampling())] * size[0])
    yield slots.generator.decode_ahead(batch, arrays, greedy=False)

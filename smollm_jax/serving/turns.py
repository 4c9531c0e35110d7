"""Serve the jobs under way together, a part of each in turn. Only the model's thread calls this.

Our own generator has slots: the texts in them are decoded together. Any other engine serves one job at a time.
"""

import traceback
from collections.abc import Iterator
from typing import Any

from smollm_jax.generation.generator import Generator
from smollm_jax.generation.row import Made, Row
from smollm_jax.generation.slots import Slots
from smollm_jax.runtime.errors import UserError
from smollm_jax.serving.completion import Completer
from smollm_jax.serving.jobs import END, Job
from smollm_jax.serving.text import TextWriter


class Turns:
    """The jobs under way. All have the same engine, because an engine is a whole set of weights."""

    def __init__(self, completer: Completer, slots: int):
        self.completer, engine = completer, completer.engine
        self.slots = Slots(engine, slots) if isinstance(engine, Generator) else None
        self._rows: dict[Row, tuple[Job, TextWriter]] = {}
        self._serial: tuple[Job, Iterator[Any]] | None = None

    @property
    def count(self) -> int:
        """Return how many jobs are served at a time."""
        return self.slots.count if self.slots else 1

    @property
    def jobs(self) -> list[Job]:
        """Return the jobs under way."""
        return [job for job, _ in self._rows.values()] + ([self._serial[0]] if self._serial else [])

    def fits(self, job: Job) -> bool:
        """Return whether a job can begin now."""
        if self.slots is None or not self._rows:
            return not self.jobs
        if job.engine is not self.completer.engine:  # other weights: their time comes when these have no job
            return False
        try:
            return self.slots.fits(self._row_of(job))
        except UserError:  # the job ends with it as soon as it begins
            return True

    def begin(self, job: Job) -> None:
        """Take up a job that fits."""
        self.completer.engine, work = job.engine, job.work
        if self.slots is None:
            self._serial = job, self._serve(job)
            return
        try:
            row, writer = self._row_of(job), TextWriter(self.completer.tokenizer, work.ids, work.stop)
        except BaseException as error:
            job.put(error if isinstance(error, UserError) else failed(error))
            return
        if isinstance(job.engine, Generator):
            self.slots.generator = job.engine
        self.slots.add(row)
        self._rows[row] = job, writer

    def step(self) -> None:
        """Do a part of the work of each job. An error ends the jobs that it concerns, and no other."""
        if self._serial is not None:
            if next(self._serial[1], END) is END:
                self._serial = None
            return
        assert self.slots is not None
        try:
            for row, (job, writer) in list(self._rows.items()):
                if job.left.is_set():
                    self.slots.drop(row)
                    self._end(row, writer.chunk("", "cancelled") if job.work.sampling else None)
            for made in self.slots.step():
                self._give(made)
        except BaseException as error:
            # whatever failed (memory, a device), the thread must survive for the next request
            self.slots.clear()
            for job in self.jobs:
                job.put(failed(error))
            self._rows.clear()

    def _give(self, made: Made) -> None:
        """Give a job what came of its row."""
        if made.row not in self._rows:
            return
        (job, writer), row = self._rows[made.row], made.row
        if job.work.sampling is None:
            job.put(made.prompt_scores)
            if made.reason:
                self._end(row)
            return
        try:
            if made.prompt_scores:
                job.put(writer.chunk("", prompt_scores=made.prompt_scores))
            chunk = writer.feed(made.ids, made.scored)
            if chunk is not None:
                job.put(chunk)
            if writer.stopped:
                self.slots.drop(row) if self.slots else None
                self._end(row)
            elif made.reason:
                self._end(row, writer.end(made.reason))
        except BaseException as error:  # of the tokenizer, a library in Rust: this text ends, the others go on
            self.slots.drop(row) if self.slots else None
            self._rows.pop(row)
            job.put(failed(error))

    def _end(self, row: Row, last: Any = None) -> None:
        job, _ = self._rows.pop(row)
        if last is not None:
            job.put(last)
        job.put(END)

    def _row_of(self, job: Job) -> Row:
        work, engine = job.work, job.engine
        sampling = self.completer.ending(work.sampling) if work.sampling else None
        return Row(
            work.ids, sampling, context=engine.context, vocab_size=self.completer.vocab_size, scored=work.scored,
            reads_scores=work.reads_scores,
        )  # fmt: skip

    def _serve(self, job: Job) -> Iterator[Any]:
        """Serve a job with an engine that has no slots. Yields after each of its parts."""
        work, completer = job.work, self.completer
        try:
            parts: Iterator[Any] = (
                completer.score(work.ids, job.left.is_set) if work.sampling is None
                else completer.stream(
                    work.ids, work.sampling, work.stop, job.left.is_set, scored=work.scored,
                    reads_scores=work.reads_scores,
                )
            )  # fmt: skip
            for part in parts:
                job.put(part)
                yield
            job.put(END)
        except UserError as error:
            job.put(error)
        except GeneratorExit:
            raise
        except BaseException as error:
            job.put(failed(error))


def failed(error: BaseException) -> RuntimeError:
    """Log an error that is no mistake of the client, and return what the client gets."""
    traceback.print_exception(error)
    return RuntimeError(f"the model failed with {type(error).__name__}; the server's log says more")

"""Complete the prompts of a file into another file, row by row in the same order.

A row of results is a row of prompts with its completion, the model and the sampling, so that it can be made again.
After an interruption the same command continues with the first row that has no result.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm_jax.runtime.errors import UserError, one_line, require, say

if TYPE_CHECKING:
    from smollm_jax.generation.sampling import Sampling
    from smollm_jax.serving.completion import Completer

MADE = ("completion", "finish_reason")
OURS = ("model", "sampling", *MADE)  # fields of a row of results beside the row of prompts
SAY_SECONDS = 10.0
Row = dict[str, Any]
Encode = Callable[[Any], list[int]]  # ids of a prompt, a text or a list of messages


class PromptFile:
    """A JSONL file of prompts. Raises `UserError` for a row without prompt or messages, by its line."""

    def __init__(self, path: Path):
        self.path, self.rows = path, list[Row]()
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {path} cannot be read: {one_line(error)}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                self.rows.append(self._row(number, line))
        require(bool(self.rows), f"--input {path} has no row")
        if replaced := sorted({name for row in self.rows for name in OURS if name in row}):
            say(f"the results replace {', '.join(replaced)} of the rows of {path}")

    def complete(
        self, target: Path, completer: "Completer", encode: Encode, *, sampling: "Sampling",
        stop: tuple[str, ...], about: Row,
    ) -> None:  # fmt: skip
        """Append a result for each row to `target`, after the finished ones. `about` goes into each.

        Row i has the seed of `sampling` plus i. Raises `UserError` before the first result.
        """
        from smollm_jax.serving.completion import ROWS

        prompts = [self._encoded(number, row, encode) for number, row in enumerate(self.rows, 1)]
        seeds = [(sampling.seed + i) % 2**32 for i in range(len(self.rows))]
        frames = [
            {name: value for name, value in row.items() if name not in OURS}
            | about
            | {"sampling": about["sampling"] | {"seed": seed}}
            for row, seed in zip(self.rows, seeds, strict=True)
        ]
        done = self._finished(target, frames)
        if done:
            say(f"{target} has {done:,} of {len(frames):,} rows; the others follow")
        began = said = time.monotonic()
        tokens = 0
        with target.open("a", encoding="utf-8") as file:
            for start in range(done, len(frames), ROWS):
                some = slice(start, start + ROWS)
                made = completer.complete(prompts[some], sampling, stop, seeds[some])
                for frame, text in zip(frames[some], made, strict=True):
                    file.write(json.dumps(frame | {"completion": text.text, "finish_reason": text.reason}) + "\n")
                    tokens += text.tokens
                file.flush()
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    say(f"{start + len(made):,} of {len(frames):,} rows, {tokens / (said - began):,.0f} tokens/s")
        say(f"{len(frames):,} rows in {target}, {tokens:,} new tokens in {time.monotonic() - began:,.1f} s")

    def _row(self, number: int, line: str) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path} line {number} is not JSON: {one_line(error)}") from None
        good = isinstance(row, dict) and ("prompt" in row) != ("messages" in row) and _is_prompt(_prompt(row))
        expected = '{"prompt": TEXT} or {"messages": [{"role": ROLE, "content": TEXT}, ...]}'
        require(good, f"{self.path} line {number}: expected {expected}; {line:.60} came")
        return dict(row)

    def _encoded(self, number: int, row: Row, encode: Encode) -> list[int]:
        try:
            return encode(_prompt(row))
        except UserError as error:
            raise UserError(f"row {number} of {self.path}: {one_line(error)}") from None

    def _finished(self, target: Path, frames: list[Row]) -> int:
        """Return how many rows have a result in `target`. Cuts off the part of a row that a kill has left.

        Raises `UserError`, and changes nothing, if `target` has anything but the first results of these rows.
        """
        if not target.exists():
            return 0
        other, again = f"--output {target} is not what this command writes", "give another --output, or remove it"
        require(not os.path.samefile(self.path, target), f"--output {target} is the input; {again}")
        try:
            *lines, tail = target.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"--output {target} cannot be read: {one_line(error)}") from None
        require(len(lines) <= len(frames), f"{other}: it has more rows than {self.path}; {again}")
        for number, (line, frame) in enumerate(zip(lines, frames, strict=False), 1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            known = isinstance(found, dict) and set(found) == {*frame, *MADE}
            require(known, f"{other}: row {number}; {again}")
            odd = next((name for name in frame if found[name] != frame[name]), None)
            require(odd is None, f"{other}: row {number} has another {odd}; {again}")
        begun = json.dumps(frames[len(lines)])[:-1].encode() if len(lines) < len(frames) else b""
        require(tail[: len(begun)] == begun[: len(tail)], f"{other}: its last line; {again}")
        if tail:
            os.truncate(target, target.stat().st_size - len(tail))
        return len(lines)


def _prompt(row: Row) -> Any:
    return row.get("prompt", row.get("messages"))


def _is_prompt(prompt: Any) -> bool:
    """Return whether `prompt` is a text or a list of messages."""
    messages = isinstance(prompt, list) and bool(prompt) and all(isinstance(one, dict) for one in prompt)
    return isinstance(prompt, str) or (
        messages and all(isinstance(one.get(key), str) for one in prompt for key in ("role", "content"))
    )

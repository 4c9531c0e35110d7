"""Talk to a model in the terminal: `smollm chat PATH`."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from smollm_jax.cli.arguments import check_model
from smollm_jax.cli.sampling import SamplingFlags
from smollm_jax.runtime.errors import UserError, one_line, printable, require, say

if TYPE_CHECKING:
    from smollm_jax.generation.sampling import Sampling
    from smollm_jax.serving.completion import Completer
    from smollm_jax.tokenizer.chat_template import Render

LIVELY = SamplingFlags(max_new_tokens=512, temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=None)
HELP = (
    "/reset begins again, /regenerate answers the last message anew, /undo takes it back, /exit or Ctrl-D ends; "
    "Ctrl-C stops an answer"
)


def chat(
    path: Annotated[str, tyro.conf.Positional],
    *,
    system: str = "",
    sampling: SamplingFlags = LIVELY,
    backend: Literal["jax", "torch", "llama"] = "jax",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> int:
    """Talk to a model that has a chat template. For a base model, use `generate`.

    For example: smollm chat HuggingFaceTB/SmolLM2-135M-Instruct

    Args:
        path: Run, exported folder or Hub id.
        system: Instruction before the conversation.
        backend: Library that computes.
        dtype: Compute dtype. auto: float32 on a CPU, bfloat16 elsewhere.
    """
    check_model(path)
    from smollm_jax.serving.completion import open_completer

    chosen = sampling.sampling(LIVELY)
    completer = open_completer(path, backend=backend, dtype=dtype)
    no_chat = f"{path} has no chat template, so it completes text; use generate, or serve"
    require(bool(completer.tokenizer.chat_template), no_chat)
    say(f"{completer.about}; context {completer.context:,} tokens. {HELP}")
    _converse(completer, chosen, [{"role": "system", "content": system}] if system else [])
    return 0


def _converse(completer: "Completer", sampling: "Sampling", first: list[dict[str, str]]) -> None:
    """Read lines and answer them until the end. Every conversation begins with `first`."""
    from smollm_jax.tokenizer.renderer import Renderer

    turns, renderer = list(first), Renderer()  # a template is a program, and may not end
    while (line := _read()) not in (None, "/exit", "/quit"):
        last = max(len(first), len(turns) - 2)
        if line in ("/reset", "/new"):
            turns = list(first)
        elif line == "/undo":
            del turns[last:]
        elif line.startswith("/") and (line != "/regenerate" or last == len(turns)):
            say(HELP)
        elif line:
            asked = [*turns, {"role": "user", "content": line}]
            if line == "/regenerate":  # with another seed: the same one would give the same answer
                asked = turns[: last + 1]
                sampling = replace(sampling, seed=(sampling.seed + 1) % 2**32)
            try:
                turns = [
                    *asked,
                    {"role": "assistant", "content": _answer(completer, sampling, asked, renderer.render)},
                ]
            except UserError as error:  # such as a conversation that no longer fits
                say(f"{one_line(error)}; /reset begins again, /undo takes the last turn back")


def _answer(completer: "Completer", sampling: "Sampling", turns: list[dict[str, str]], render: "Render") -> str:
    """Print an answer while it is generated, and return it. Ctrl-C ends it."""
    from smollm_jax.tokenizer.chat_template import encode_chat

    shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        ids = encode_chat(completer.tokenizer, turns, render=render)
        for piece in completer.stream(ids, sampling):
            answer += piece.text
            print(shown(piece.text), end="", flush=True)
    print()
    return answer


def _read() -> str | None:
    """Return the next line that a person types, without spaces around it. None at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history and its keys
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None

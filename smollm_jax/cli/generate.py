"""Complete a prompt, or every prompt of a file: `smollm generate PATH`."""

import sys
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from smollm_jax.cli.arguments import check_model
from smollm_jax.cli.prompt_file import Encode, PromptFile
from smollm_jax.cli.sampling import SamplingFlags
from smollm_jax.runtime.errors import printable, require, say
from smollm_jax.runtime.files import expand_home

if TYPE_CHECKING:
    from smollm_jax.generation.sampling import Sampling
    from smollm_jax.serving.completion import Completer

GREEDY = SamplingFlags()


def generate(
    path: Annotated[str, tyro.conf.Positional],
    *,
    prompt: str | None = None,
    source: Annotated[str | None, tyro.conf.arg(name="input")] = None,
    output: str | None = None,
    chat: bool = False,
    system: str = "",
    sampling: SamplingFlags = GREEDY,
    stop: tuple[str, ...] = (),
    backend: Literal["jax", "torch", "llama"] = "jax",
    dtype: Literal["float32", "bfloat16"] = "float32",
    special_tokens: Literal["text", "parse"] | None = None,
) -> int:
    """Continue a prompt, or every prompt of a file. A prompt's text goes to stdout while it is generated.

    For example: smollm generate runs/quickstart --prompt "Return the" --temperature 0.7

    Args:
        path: Run, exported folder or Hub id.
        prompt: Text to continue.
        source: JSONL file of rows with a prompt, or messages as for OpenAI's API. Row N has the seed --seed + N,
            counted from 0.
        output: JSONL file for the rows with their completions. The same command continues an unfinished one.
        chat: Apply the chat template, as to a message of a user. The answer alone is printed.
        system: Instruction before the message of --chat.
        stop: Stop before any of these texts.
        backend: Library that computes.
        dtype: Compute dtype.
        special_tokens: Special tokens that the prompt spells out. text: they stay text; parse: they become ids, as
            in transformers. Default: as the run was trained, else text.
    """
    require((prompt is None) != (source is None), "give the text to continue by --prompt, or a file by --input")
    require((source is None) == (output is None), "--input and --output come together: prompts and results")
    require(chat or not system, "--system is an instruction of a conversation; give --chat too")
    check_model(path)
    file = source and PromptFile(Path(expand_home(source)))
    from smollm_jax.runs.load import is_run, newest_step
    from smollm_jax.serving.completion import open_completer

    chosen = sampling.sampling(GREEDY)
    step = newest_step(path) if file and is_run(path) else None  # rows may come later
    completer = open_completer(path, backend=backend, dtype=dtype, special_tokens=special_tokens, step=step)
    encode = _encoder(completer, chat=chat, system=system)
    if not file or output is None:
        _complete(completer, str(prompt), encode(prompt), chosen, stop, chat=chat)
        return 0
    settings: dict[str, Any] = asdict(chosen) | {"stop": list(stop), "chat": chat, "system": system}
    # what no flag of this command sets, and the seed, which each row has of its own
    unneeded = ("stop_ids", "min_new_tokens", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
                "ignore_eos")  # fmt: skip
    engine = {"step": step, "by": completer.about, "special_tokens": completer.tokenizer.mode}
    about = {
        "model": {"path": path} | engine,
        "sampling": {name: settings[name] for name in settings if name not in unneeded},
    }
    file.complete(Path(expand_home(output)), completer, encode, sampling=chosen, stop=stop, about=about)
    return 0


def _complete(
    completer: "Completer", prompt: str, ids: list[int], sampling: "Sampling", stop: tuple[str, ...], *, chat: bool
) -> None:
    pieces = completer.stream(ids, sampling, stop)
    first = list(islice(pieces, 1))  # a refused prompt prints nothing to stdout
    if completer.tokenizer.texts_with_special:
        say(completer.tokenizer.describe_special())
    shown = printable if sys.stdout.isatty() else str  # a model may write what moves a terminal's cursor
    sys.stdout.write("" if chat else shown(prompt))
    for piece in chain(first, pieces):
        sys.stdout.write(shown(piece.text))
        sys.stdout.flush()
    print()
    say(f"stopped: {piece.reason}")


def _encoder(completer: "Completer", *, chat: bool, system: str) -> Encode:
    """Return the function that makes ids of a prompt (a text) or of messages (a list)."""
    from smollm_jax.tokenizer.chat_template import encode_chat
    from smollm_jax.tokenizer.renderer import Renderer

    renderer = Renderer()  # a template is a program, and may not end

    def encode(prompt: Any) -> list[int]:
        if isinstance(prompt, str) and not chat:
            return completer.encode(prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system:
            turns = [{"role": "system", "content": system}, *turns]
        return completer.checked(encode_chat(completer.tokenizer, turns, render=renderer.render))

    return encode

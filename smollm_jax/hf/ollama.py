"""Write a Modelfile, which makes a model for Ollama of a GGUF file.

Ollama has Go templates and runs a model that has none without turns and without end. The pieces that a chat
template puts around messages are found by rendering conversations. A template with other habits is not translated.
"""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.runtime.errors import UserError, say
from smollm_jax.tokenizer.chat_template import Turns, render_chat
from smollm_jax.tokenizer.tokenizer import EOS, Tokenizer

ROLES = ("system", "user", "assistant", "user", "assistant", "user")
WORDS = ("Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot")  # no template has them


class Pieces(NamedTuple):
    """The texts before and after a message of each role. The assistant's turn is begun after a user's message."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str
    """System message of a conversation without one; empty for none."""


def modelfile(name: str, tokenizer: Tokenizer, config: ModelConfig) -> str:
    """Return the Modelfile of the GGUF file `name` in the same folder."""
    pieces = find_pieces(tokenizer) if tokenizer.chat_template else None
    if tokenizer.chat_template and pieces is None:
        say("the chat template has no form that is known here in Ollama's language; the Modelfile has no TEMPLATE")
    lines = [f"FROM ./{name}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
        lines += [f'SYSTEM """{pieces.default}"""'] if pieces.default else []
    lines += [f'PARAMETER stop "{_quoted(text)}"' for text in stop_texts(tokenizer, config)]
    return "\n".join([*lines, f"PARAMETER num_ctx {config.max_seq_len}"]) + "\n"


def stop_texts(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """Return the end tokens and the special tokens of the chat template: both end an answer."""
    special = tokenizer.special_tokens
    ends = [text for text, i in special.items() if i in (*config.stop_ids, tokenizer.eos_id) or text == EOS]
    of_template = [text for text in special if text in (tokenizer.chat_template or "")]
    return list(dict.fromkeys(ends + of_template))


def find_pieces(tokenizer: Tokenizer) -> Pieces | None:
    """Return what the chat template puts around messages. None if it does anything else."""

    def render(turns: Turns) -> str:
        return render_chat(str(tokenizer.chat_template), turns, tokenizer.named_tokens)

    try:
        return _pieces(render)
    except UserError:  # the template refuses a system message, or answers before the last turn
        return None


def _pieces(render: Callable[[Turns], str]) -> Pieces | None:
    parts = re.split("|".join(WORDS[:4]), render(_turns(ROLES[:4])))
    if len(parts) != 5:
        return None
    start, turn, answer, again, last = parts
    alone = render(_turns(["user"]))
    head = alone.removesuffix(f"{WORDS[0]}{last}")
    default = ""
    if head.startswith(start) and head.endswith(turn) and len(head) >= len(start + turn):
        default = head[len(start) : len(head) - len(turn)]
        # the user's turn begins as the system's does
        cut = max(range(len(turn) + 1), key=lambda i: len(_shared(turn[i:], start)))
        head = turn[cut:]
    if not (answer.startswith(last) and turn.endswith(head) and again.endswith(head)):
        return None
    reply = (answer.removeprefix(last), again.removesuffix(head))
    pieces = Pieces((start, turn.removesuffix(head)), (head, last), reply, default)
    is_plain = not any(mark in text for text in (start, *parts, default) for mark in ("{{", '"""'))
    tried = (ROLES, ROLES[1:], ROLES[:2], ROLES[1:2])
    return pieces if is_plain and all(render(_turns(r)) == joined(pieces, _turns(r)) for r in tried) else None


def _shared(one: str, other: str) -> list[tuple[str, str]]:
    """Return the characters that two texts both begin with, as pairs."""
    return list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _turns(roles: Sequence[str]) -> Turns:
    return [{"role": role, "content": word} for role, word in zip(roles, WORDS, strict=False)]


def joined(pieces: Pieces, turns: Turns) -> str:
    """Return the text that Ollama makes of a conversation."""
    if pieces.default and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": pieces.default}, *turns]
    around = pieces._asdict()
    return "".join(f"{around[t['role']][0]}{t['content']}{around[t['role']][1]}" for t in turns)


def go_template(pieces: Pieces) -> str:
    """Return the pieces in Ollama's language, text/template of Go."""
    system, user, assistant = ("{{ .Content }}".join(around) for around in pieces[:3])
    return (
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        f"{{{{ else }}}}{assistant}{{{{ end }}}}{{{{ end }}}}"
    )


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')

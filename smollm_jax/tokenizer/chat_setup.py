"""Set the chat template of a tokenizer, and its eos, which ends a turn."""

import json
import tempfile
from pathlib import Path

from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import expand_home
from smollm_jax.tokenizer.tokenizer import CHAT_TOKENS, Tokenizer, token_text
from smollm_jax.tokenizer.turns import TemplateMisfit, turn_end

# OpenAI's ChatML, as SmolLM2 was trained with it, without its default system message
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def with_chat_template(tokenizer: Tokenizer, choice: str, name: str) -> tuple[Tokenizer, str]:
    """Return the tokenizer with a template, and a note. `name` is the tokenizer's in an error.

    `choice` is "auto" (the tokenizer's own, else ChatML), a name of `BUILT_IN` or a file. The token that ends an
    assistant's turn becomes eos and pad. Raises `UserError` if there is none, or the template is unusable.
    """
    own = choice == "auto" and tokenizer.chat_template
    chosen = "chatml" if choice == "auto" and not own else choice
    template = str(own or BUILT_IN.get(chosen) or _read(chosen))
    if template == CHATML:
        missing = [token for token in CHAT_TOKENS if token not in tokenizer.special_tokens]
        one = f"--tokenizer {name} has no special token {missing and missing[0]}, which chatml needs"
        other = "or give --chat-template FILE, with a template of its own special tokens"
        require(not missing, f"{one}; train the base with --tokenizer train:VOCAB:chat, {other}")
    dated = "writes the date, so that a resumed run would read other rows"
    require("strftime_now" not in template, f"--chat-template {chosen} {dated}; give chatml or another file")
    changed = _rewritten(tokenizer, template, {"bos_token": CHAT_TOKENS[0]} if template == CHATML else {})
    what = f"the chat template of {name}" if own else f"--chat-template {chosen}"
    try:
        end = turn_end(changed)
    except TemplateMisfit as error:
        raise UserError(f"{what} cannot be used: {error}; give --chat-template chatml or a file") from None
    except UserError as error:
        raise UserError(f"{what}: {one_line(error)}") from None
    if end is None:
        never = "ends the assistant's turn with no special token, so no model could learn to stop"
        raise UserError(f"{what} {never}; give --chat-template chatml or a file")
    text = {number: token for token, number in changed.special_tokens.items()}[end]
    if end != changed.eos_id or token_text(changed.settings.get("pad_token")) != text:
        changed = _rewritten(changed, template, {"eos_token": text, "pad_token": text})
    return changed, f"template    {'its own' if own else chosen}; a turn ends with {text}, which becomes the eos"


def _read(file: str) -> str:
    try:
        template = expand_home(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        known = f"expected {', '.join(BUILT_IN)} or a file of a Jinja template"
        raise UserError(f"--chat-template {file}: {known} ({one_line(error)})") from None
    require(bool(template.strip()), f"--chat-template {file} is empty")
    return template


def _rewritten(tokenizer: Tokenizer, template: str, tokens: dict[str, str]) -> Tokenizer:
    """Return a tokenizer of the same files, but with a template and named tokens."""
    with tempfile.TemporaryDirectory(prefix="tokenizer-", ignore_cleanup_errors=True) as folder:
        tokenizer.save(folder)
        Path(folder, "chat_template.jinja").write_text(template, "utf-8")
        for name in SETTINGS:
            if name in tokenizer.files or name == SETTINGS[0]:
                values = json.loads(tokenizer.files.get(name, b"{}"))
                values = {key: value for key, value in values.items() if key != "chat_template"} | tokens
                Path(folder, name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        changed = Tokenizer(folder, special_tokens=tokenizer.mode)
    changed.template, changed.spells = tokenizer.template, tokenizer.spells
    return changed

"""Set up a run on conversations: its length in epochs, and a look at what is trained."""

from collections.abc import Callable
from dataclasses import replace

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import Config
from smollm_jax.data.shuffle import TokenizedDocument, exclusions
from smollm_jax.data.survey import HEAD, describe, survey
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.tokenizer import Tokenizer, token_text


def prompt_ids(config: Config, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a sample prompt: of chat data, a user's turn through the template."""
    if config.data.is_chat:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer.encode(prompt).tolist())


def with_pad_of(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model with the tokenizer's id of padding, which serves batches of prompts."""
    pad = tokenizer.special_tokens.get(token_text(tokenizer.settings.get("pad_token")))
    return model if pad is None else replace(model, pad_token_id=pad)


def counts_epochs(config: Config) -> bool:
    """Return whether --epochs give the run's length: without --steps, except on the recipe's own data."""
    data = config.data
    return data.is_chat and config.run.steps is None and data.epochs > 0 and data.data != RECIPES["sft"].data.data


def survey_run(
    config: Config, tokenizer: Tokenizer, held: list[TokenizedDocument], tell: Callable[[str], None]
) -> tuple[Config, list[str]]:
    """Return the settings with the steps of their epochs, and lines on the conversations.

    Raises `UserError` as `survey` does.
    """
    whole = counts_epochs(config)
    tell(f"talks       reading {'all data, to count its epochs' if whole else f'the first {HEAD:,} documents'}")
    found = survey(config.data, tokenizer, exclusions(held), whole=whole)
    lines = describe(found, tokenizer, whole=whole)
    if whole:
        epochs, batch_size = config.data.epochs, config.main_batch_size
        steps = max(found.rows * epochs // batch_size, 1)
        config = replace(config, run=replace(config.run, steps=steps))
        lines.append(f"epochs      {epochs} of {found.rows:,} rows by {batch_size} are {steps:,} steps")
    return config, lines

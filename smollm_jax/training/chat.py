"""Set up a run on conversations: its length in epochs, and a look at what is trained."""

from collections.abc import Callable
from dataclasses import replace

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import Config
from smollm_jax.data.shuffle import TokenizedDocument, exclusions
from smollm_jax.data.sources import mixture
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


def recipe_of(config: Config) -> Config:
    """Return the recipe for conversations, or for pairs of answers, whichever the data are."""
    return RECIPES["dpo" if config.data.is_pairs else "sft"]


def follows_epochs(config: Config) -> bool:
    """Return whether --epochs give the run's length: on conversations, without --steps and --phases."""
    is_given = config.run.steps is not None or config.run.phases != RECIPES[config.recipe].run.phases
    return config.data.is_chat and config.data.epochs > 0 and not is_given


def estimated_steps(config: Config) -> int:
    """Return the steps of the epochs of the recipe's own data, from the steps of its two epochs."""
    recipe = recipe_of(config)
    of_one = recipe.total_steps * recipe.main_batch_size * recipe.data.seq_len / recipe.data.epochs
    return max(round(of_one * config.data.epochs / (config.main_batch_size * config.data.seq_len)), 1)


def survey_run(
    config: Config, tokenizer: Tokenizer, held: list[TokenizedDocument], notes: list[str],
    tell: Callable[[str], None],
) -> Config:  # fmt: skip
    """Return the settings with the steps of their epochs, and append lines on the conversations to `notes`.

    Text is left alone. Raises `UserError` as `survey` does.
    """
    if not config.data.is_chat:
        return config
    follows = follows_epochs(config)
    whole = follows and config.data.data != recipe_of(config).data.data
    tell(f"talks       reading {'all data, to count its epochs' if whole else f'the first {HEAD:,} documents'}")
    found = survey(config.data, tokenizer, exclusions(one for one, _ in held), whole=whole)
    notes += describe(found, tokenizer, whole=whole, pairs=config.data.is_pairs)
    if not follows:
        return config
    epochs, batch_size = config.data.epochs, config.main_batch_size
    rows = found.rows_of(epochs, mixture(config.data.data))
    steps = max(rows // batch_size, 1) if whole else estimated_steps(config)
    what = f"{rows:,} rows" if whole else "the recipe's data, by estimate"
    notes.append(f"epochs      {epochs}, {what} by {batch_size}: {steps:,} steps")
    return replace(config, run=replace(config.run, steps=steps))

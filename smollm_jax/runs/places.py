"""Check the places that settings name on this machine: no network, nothing heavy imported."""

from smollm_jax.config.settings import Config
from smollm_jax.data.sources import check_source, mixture
from smollm_jax.hf.reader import check_place
from smollm_jax.runs.trackers import trackers_of
from smollm_jax.runtime.files import expand_home
from smollm_jax.tokenizer.load import check_tokenizer


def check_data(data: str) -> None:
    """Raise `UserError` if a part of a mixture names no local file. Does not ask the Hub."""
    for spec, _ in mixture(data):
        check_source(spec)


def check_places(config: Config, *, has_own: bool = False) -> None:
    """Raise `UserError` if a run would find no local data, tokenizer or weights. Does not ask the Hub.

    `has_own` says that tokenizer and weights come from elsewhere, as in a branch.
    """
    check_data(config.data.data)
    if config.data.eval_data is not None:
        check_data(config.data.eval_data)
    trackers_of(config)
    resumes = not config.run.new_run and any(expand_home(config.run_dir).glob("checkpoints/[0-9]*"))
    if resumes or has_own:  # with its own tokenizer and weights
        return
    if config.run.init_from is not None:
        check_place(config.run.init_from)
    check_tokenizer(config.data.tokenizer)

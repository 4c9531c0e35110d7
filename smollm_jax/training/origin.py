"""Describe the origin of a run: the run that it branched from, or weights of another context."""

from pathlib import Path

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import Config
from smollm_jax.runs.load import parent_of
from smollm_jax.runtime.errors import require


def about_parent(run_dir: Path) -> list[str]:
    """Return a line on what a branch began with, none for other runs."""
    if (parent := parent_of(run_dir)) is None:
        return []
    data = "its data go on" if parent.get("data") == "on" else "the data begin afresh"
    return [f"branch      of {parent['parent']} at step {parent['step']:,}; {data}"]


def about_context(before: ModelConfig, config: Config) -> list[str]:
    """Return a line if the context is not the weights' own. Raises `UserError` if adapters cannot have it."""
    model = config.model
    if (before.rope_theta, before.max_seq_len) == (model.rope_theta, model.max_seq_len):
        return []
    same = before.rope_theta == model.rope_theta
    one = f"adapters keep the rope_theta of their base, {before.rope_theta:,g}; {model.rope_theta:,g} came"
    require(same or not config.adapter.is_on, one)
    theta = "rope_theta " + ("" if same else f"{before.rope_theta:,g} -> ") + f"{model.rope_theta:,g}"
    known = "; SmolLM2 went from 2,048 to 8,192 with rope_theta 10,000 -> 100,000"
    longer = known if same and model.max_seq_len > before.max_seq_len else ""
    return [f"context     {before.max_seq_len:,} -> {model.max_seq_len:,} tokens, {theta}{longer}"]

"""Choose the settings that flags and keywords change: of a recipe and a preset, a file, or a run."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from smollm_jax.config.architecture import MODELS
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, read_file
from smollm_jax.config.settings import CONTEXT, Config
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import expand_home


def default_settings(
    *, recipe: str | None = None, preset: str | None = None, file: str | None = None, resume: str | None = None
) -> Config:
    """Return the settings of a recipe and a preset, over them a `file`, or of a run to `resume`.

    Raises `UserError`.
    """
    if resume is not None:
        given = {"--recipe": recipe, "--preset": preset, "--config": file}
        others = [flag for flag, value in given.items() if value is not None]
        require(not others, f"--resume takes the settings of the run; leave out {' and '.join(others)}")
        values = read_file(expand_home(resume) / "config.json")
        no_run = f"{resume} is not a run: its config.json has no settings of one; --init-from starts from weights"
        require({"run", "data"} <= values.keys(), no_run)
        config = from_dict(values)
        alone = replace(config.compute, coordinator=None, num_processes=None, process_id=None)  # of that start
        own = replace(config.run, run_dir=resume, new_run=False, stop_after=None)
        return replace(config, run=own, compute=alone)
    values = {} if file is None else read_file(Path(file))
    recipe = recipe or str(values.get("recipe", "replica"))
    require(recipe in RECIPES, f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    default, preset = RECIPES[recipe], str(preset or values.get("preset", ""))
    if preset:
        require(preset in MODELS, f"--preset {preset}: expected one of {', '.join(MODELS)}")
        shape = MODELS[preset]
        data = replace(default.data, seq_len=min(default.data.seq_len, shape.max_seq_len))
        default = replace(default, preset=preset, model=shape, data=data)
    config = from_dict(values | {"recipe": recipe}, default, where=file or "")
    model = values.get("model", {})
    is_of_a_run = {"hidden_size", "vocab_size"} <= model.keys()  # all are there, so none was given
    return with_own_context(config, () if is_of_a_run else model)


def with_own_context(config: Config, given: Iterable[str]) -> Config:
    """Return the settings with the names among `given` that hold over the weights of --init-from."""
    named = tuple(name for name in CONTEXT if name in {*config.run.own_context, *given})
    return replace(config, run=replace(config.run, own_context=named))

"""Choose the settings that flags and keywords change: of a recipe and a preset, a file, or a run."""

from dataclasses import replace
from pathlib import Path

from smollm_jax.config.architecture import MODELS
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, read_file
from smollm_jax.config.settings import Config
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
        config = from_dict(read_file(expand_home(resume) / "config.json"))
        alone = replace(config.compute, coordinator=None, num_processes=None, process_id=None)  # of that start
        own = replace(config.run, run_dir=resume, new_run=False, stop_after=None)
        return replace(config, run=own, compute=alone)
    values = {} if file is None else read_file(Path(file))
    recipe = recipe or str(values.get("recipe", "replica"))
    require(recipe in RECIPES, f"--recipe {recipe}: expected one of {', '.join(RECIPES)}")
    default, preset = RECIPES[recipe], str(preset or values.get("preset", ""))
    if preset:
        require(preset in MODELS, f"--preset {preset}: expected one of {', '.join(MODELS)}")
        model = MODELS[preset]
        data = replace(default.data, seq_len=min(default.data.seq_len, model.max_seq_len))
        default = replace(default, preset=preset, model=model, data=data)
    return from_dict(values | {"recipe": recipe}, default, where=file or "")

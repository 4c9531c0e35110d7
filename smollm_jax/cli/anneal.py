"""Define the command anneal: a new run that begins at a run's checkpoint and decays from there."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from smollm_jax.cli.arguments import FLAG, parse, parse_part
from smollm_jax.config.optimizer import DecayShape
from smollm_jax.config.settings import Config
from smollm_jax.runtime.devices import has_accelerator, quiet_libtpu
from smollm_jax.runtime.errors import require, say
from smollm_jax.runtime.files import expand_home
from smollm_jax.runtime.signals import StopRequest

# flags of train that choose other settings than the run's, or the schedule, which the branch has of its own
FIXED = ("resume", "config", "recipe", "preset", "learning-rate", "schedule", "warmup-steps", "decay-steps",
         "decay-shape", "extend", "phases", "batch-size")  # fmt: skip


def _branch(
    run: Annotated[str, tyro.conf.Positional],
    *,
    step: Annotated[int, tyro.conf.arg(name="from")],
    steps: int,
    decay: DecayShape = "linear",
    final_learning_rate: float = 0.0,
) -> tuple[str, int, int, DecayShape, float]:
    """Decay the learning rate from a checkpoint of a run, in a new run. The run itself stays as it is.

    For example: smollm anneal runs/mine --from 1600 --steps 400 --decay 1-sqrt

    Optimizer, place in the data and rate are as at that step. Other flags of train may follow, such as --run-dir
    (default: RUN-anneal-STEP), --eval-every or --data: other data begin afresh. The same command again resumes.

    Args:
        run: Run folder.
        step: Step of the checkpoint to begin at.
        steps: Steps of the decay.
        decay: Shape of the decay. 1-sqrt falls fast at first.
        final_learning_rate: Learning rate at the end.
    """
    return run, step, steps, decay, final_learning_rate


def anneal(argv: list[str], prog: str) -> int:
    """Decay the learning rate from a checkpoint of a run, in a new run. The run itself stays as it is."""
    first = bool(argv) and (not argv[0].startswith("-") or argv[0] in ("-h", "--help"))
    require(first, f"the run comes first: {prog} RUN --from STEP --steps N; see {prog} --help")
    (run, step, steps, decay, final), others = parse_part(_branch, argv, prog)
    given = {found[1].replace("_", "-") for word in others if (found := FLAG.fullmatch(word))}
    fixed = [f"--{name}" for name in FIXED if name in given]
    own = "a branch has the settings of its run, and the decay of --decay and --steps"
    require(not fixed, f"{', '.join(fixed)}: {own}; leave it out")
    config: Config = parse(["--resume", run, *others], prog=prog)
    parent = expand_home(run)
    if "run-dir" not in given:
        beside = run.rstrip("/") if Path(run).name not in ("", "..") else str(parent.resolve())
        config = replace(config, run=replace(config.run, run_dir=f"{beside}-anneal-{step}"))
    same = Path(config.run_dir).resolve() == parent.resolve()
    require(not same, f"--run-dir {config.run_dir} is the run itself, which stays as it is; give another folder")
    from smollm_jax.checkpoint.listing import find_checkpoint, steps_in
    from smollm_jax.runs.lock import METRICS
    from smollm_jax.runs.places import check_places

    check_places(config, has_own=True)
    if not steps_in(Path(config.run_dir) / "checkpoints") and not (Path(config.run_dir) / METRICS).exists():
        find_checkpoint(parent / "checkpoints", step, group="step")
    say(f"anneal      {run} from step {step:,}, {decay} in {steps:,} steps; loading JAX")
    if not has_accelerator():
        quiet_libtpu()
    with StopRequest() as stop:
        from smollm_jax.training.branch import Branch
        from smollm_jax.training.fit import fit

        branch = Branch(parent=parent, step=step, steps=steps, shape=decay, final=final)
        return fit(config, stop, branch=branch)

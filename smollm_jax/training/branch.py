"""Begin a run at a checkpoint of another run, to decay from there.

The branch has a copy of that checkpoint: parameters, optimizer state, step and place in the data. Its schedule is
`wsd` whose decay begins after that step, at the rate of that step. So it resumes as any other run, and needs its
parent no more. Nothing is written to the parent.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from smollm_jax.checkpoint.copy import copy_checkpoint
from smollm_jax.checkpoint.listing import steps_in
from smollm_jax.config.defaults import default_settings
from smollm_jax.config.fields import resume_rules
from smollm_jax.config.optimizer import DecayShape
from smollm_jax.config.phases import up_to
from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.data.loader import afresh
from smollm_jax.runs.load import parent_of
from smollm_jax.runs.lock import BEGINNING, METRICS, PARENT, REFERENCE
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import write_json_atomic
from smollm_jax.runtime.trees import flatten
from smollm_jax.training.optimizer import learning_rate_schedule

# settings that make other batches: the place in the data begins afresh if one of them changes
OF_DATA = {
    f"data.{name}"
    for name in (
        "data", "split", "text_column", "loss_on", "seq_len", "shuffle_window", "shards", "epochs",
        "eval_data", "eval_documents",
    )
}  # fmt: skip
OF_EVALUATION = {"data.eval_batches"}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A run that begins at checkpoint `step` of the run `parent`, and decays over `steps` updates to `final`."""

    parent: Path
    step: int
    steps: int
    shape: DecayShape = "linear"
    final: float = 0.0

    def settle(self, config: Config) -> Config:
        """Return the settings of the branch. `config` has the parent's settings, changed by flags.

        Raises `UserError` for a change that a branch cannot have.
        """
        require(self.step > 0, f"--from {self.step}: the parent has no rate before its first step; give 1 or more")
        require(self.steps > 0, f"--steps {self.steps} must be at least 1")
        changed = _changed(default_settings(resume=str(self.parent)), config)
        refused = sorted(changed - OF_DATA - OF_EVALUATION)
        instead = f"train_jax.py --init-from {self.parent} starts anew from its weights"
        require(not refused, f"{', '.join(refused)}: a branch keeps the settings of its run; {instead}")
        pairs = "pairs keep the reference log-probs of the run's own data, so a branch has no other --data"
        require(not (config.data.is_pairs and changed & OF_DATA), f"{pairs}; {instead}")
        ends = config.data.is_chat and config.data.epochs > 0 and not changed & OF_DATA
        few = f"the data of {config.data.epochs} epochs end at step {config.total_steps:,}, before the decay does"
        fits = not ends or self.step + self.steps <= config.total_steps
        require(fits, f"{few}; give fewer --steps, or --epochs or --data, with which the data begin afresh")
        peak, found = config.learning_rate, np.float32(learning_rate_schedule(config)(jnp.int32(self.step - 1)))
        rate = peak if found == np.float32(peak) else float(str(found))
        require(rate > self.final, f"the rate at step {self.step} is {rate:g}, not above the final {self.final:g}")
        phases = up_to(config.phases, self.step + self.steps)
        run = replace(
            config.run, phases=",".join(f"{phase.steps}x{phase.batch_size}" for phase in phases),
            steps=self.step + self.steps, batch_size=None, extend=0,
        )  # fmt: skip
        optimizer = replace(
            config.optimizer, learning_rate=rate, schedule="wsd", warmup_steps=min(config.warmup_steps, self.step),
            decay_steps=self.steps, decay_shape=self.shape, final_learning_rate=self.final,
        )  # fmt: skip
        return replace(config, run=run, optimizer=optimizer)

    def begin(self, run_dir: Path, config: Config) -> None:
        """Make `run_dir` the beginning of the branch with the settings `config`, unless it is that already.

        The record comes first, so that the same command goes on after a kill. Raises `UserError` if the folder is
        another run, or if the parent has no such checkpoint.
        """
        record = asdict(self) | {
            "parent": str(self.parent.absolute()),
            "learning_rate": config.learning_rate,
            "data": "afresh" if _changed(default_settings(resume=str(self.parent)), config) & OF_DATA else "on",
        }
        before, give = parent_of(run_dir), "give another --run-dir, or --new-run"
        if before is None:
            held = [name for name in BEGINNING if (run_dir / name).exists()]
            require(not held, f"{run_dir} holds another run; {give}")
        else:
            others = [name for name, value in record.items() if before.get(name) != value]
            came = ", ".join(f"{name} was {before.get(name)}, is {record[name]}" for name in others)
            require(not others, f"{run_dir} is another branch: {came}; {give}")
            if steps_in(run_dir / "checkpoints") or (run_dir / METRICS).exists():
                return  # it has begun: without its checkpoints it is refused, not started over
        write_json_atomic(run_dir / PARENT, record)

        def changed(meta: dict[str, Any]) -> dict[str, Any]:
            no_run = f"checkpoint {self.step} of {self.parent} is an import, without optimizer and data"
            require(
                "progress" in meta, f"{no_run}; train_jax.py --init-from {self.parent} starts from its weights"
            )
            cursor, progress = meta["cursor"], meta["progress"]
            if record["data"] == "afresh":
                cursor = afresh(self.step, cursor["tokenizer"])
                # the first loss is of the new data
                progress = progress | {"nats": 0.0, "targets": 0, "figures": {}}
            progress = progress | {"cursor": cursor}
            own = {"config": to_dict(config), "cursor": cursor, "progress": progress}
            return meta | own | {"annealed_from": {"run": record["parent"], "step": self.step}}

        shutil.copytree(self.parent / "tokenizer", run_dir / "tokenizer", dirs_exist_ok=True)
        if config.data.is_pairs:
            shutil.copyfile(self.parent / REFERENCE, run_dir / REFERENCE)
        copy_checkpoint(
            self.parent / "checkpoints", self.step, run_dir / "checkpoints", changed
        )  # the sign of all


def _changed(before: Config, config: Config) -> set[str]:
    """Return the names of settings that differ and would change the result of a resumed run."""
    then, now = flatten(to_dict(before), "."), flatten(to_dict(config), ".")
    return {
        name for name, rule in resume_rules(config).items() if rule in ("", "schedule") and then[name] != now[name]
    }

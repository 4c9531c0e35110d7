"""Define the commands export, import, push, checkpoints, batch, plan and verify-resume.

Results go to stdout, everything else to stderr. A command is a function: its signature gives the flags, its
docstring the help. A command imports what it needs when it runs, so that `--help` answers at once.
"""

import contextlib
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from smollm_jax.cli.arguments import parse
from smollm_jax.runtime.errors import EXIT_FAILED, UserError, require, say
from smollm_jax.runtime.files import expand_home

Positional = Annotated[str, tyro.conf.Positional]
FileDtype = Literal["float32", "bfloat16", "f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
DTYPES = {"hf": ("float32", "bfloat16"), "gguf": get_args(FileDtype)[2:]}  # the default first


def export(
    run: Positional,
    *,
    out: str,
    step: int | None = None,
    format: Literal["hf", "gguf"] = "hf",
    dtype: FileDtype | None = None,
    verify: bool = True,
    merge: bool = False,
    ema: bool = False,
) -> int:
    """Write a Hugging Face folder that AutoModelForCausalLM loads, or a GGUF file for llama.cpp and Ollama.

    Adapters become a folder that PEFT loads, or a whole model with --merge.

    For example: smollm export runs/quickstart --out my-model

    Args:
        run: Run folder. For GGUF also a Hugging Face folder or Hub id.
        out: Folder to write.
        step: Step of the checkpoint. Default: the newest good one.
        format: hf, a Hugging Face folder, or gguf, a folder with a GGUF file and Ollama's Modelfile.
        dtype: Dtype of the file. hf: float32 keeps the bits of the checkpoint and is the default; or bfloat16.
            gguf: f16, the default, or another of the shorter names; q8_0 halves it with next to no loss.
        verify: Compare what was written with the checkpoint, and remove it if they differ.
        merge: Merge adapters with their base in float32, and write a whole model.
        ema: Write the moving average of the weights, of a run trained with --ema.
    """
    given = dtype or DTYPES[format][0]
    expected = f"--format {format} writes {', '.join(DTYPES[format])}; --dtype {given} came"
    require(given in DTYPES[format], expected)
    require(not merge or format == "hf", "a GGUF file always has adapters merged; leave --merge out")
    from smollm_jax.runs.convert import export_model, export_run

    try:
        if format == "gguf":
            written, checked = export_model(run, out, step=step, dtype=given, verify=verify, ema=ema)
        else:
            exported, checked = export_run(run, out, step=step, dtype=given, verify=verify, merge=merge, ema=ema)
            written, checked = Path(out), f"step {exported:,}: {checked}"
    except RuntimeError as error:
        say(f"error: the export was rolled back: {error}")
        return EXIT_FAILED
    say(checked)
    print(written)
    return 0


def import_(path: Positional, *, out: str) -> int:
    """Make a run of Hugging Face or GGUF weights, to serve or for `smollm train --init-from`.

    For example: smollm import HuggingFaceTB/SmolLM2-135M --out runs/base

    Args:
        path: Hugging Face folder, Hub id or GGUF file.
        out: Run folder to make.
    """
    from smollm_jax.runs.convert import import_run

    model = import_run(path, out)
    say(f"{model.num_parameters:,} parameters; continue with: python train_jax.py --init-from {out} --data ...")
    print(out)
    return 0


def push(folder: Positional, repo: Positional, *, dry_run: bool = False, private: bool = False) -> int:
    """Upload an exported folder to the Hugging Face Hub.

    For example: smollm push my-model OWNER/NAME --dry-run

    Args:
        folder: Folder that `export` wrote.
        repo: OWNER/NAME on the Hub.
        dry_run: List the files and upload nothing.
        private: Make the repository private if it is new.
    """
    from smollm_jax.hf.publish import push

    print(push(folder, repo, dry_run=dry_run, private=private))
    return 0


def checkpoints(run: Positional) -> int:
    """List a run's checkpoints with step, size, age, verdict, and why one is kept.

    For example: smollm checkpoints runs/quickstart

    Args:
        run: Run folder.
    """
    from smollm_jax.checkpoint.listing import Retention, table
    from smollm_jax.runs.load import read_run

    retention = None
    with contextlib.suppress(UserError):  # checkpoints alone can be listed too
        config = read_run(run)
        own = config.run
        retention = Retention(keep_last=own.keep_last, keep_every=own.keep_every, before=config.decay_start)
    print(table(expand_home(run), retention))
    return 0


def batch(run: Positional, *, step: int, data: str | None = None, eval_data: str | None = None) -> int:
    """Print a training step's documents, one JSON line each: source, file, row, text.

    For example: smollm batch runs/quickstart --step 120

    Args:
        run: Run folder.
        step: Number of the step, counted from 1.
        data: Where the run's data is now. Default: where it was.
        eval_data: Where the held-out data of --eval-data is now. Default: where it was.
    """
    from smollm_jax.runs.replay import replay_step

    documents, verdict = replay_step(run, step, data=data, eval_data=eval_data)
    for document in documents:
        line = json.dumps(document, ensure_ascii=False)
        try:
            line.encode(sys.stdout.encoding)
        except UnicodeEncodeError:  # of the locale. An escape of print's would be no JSON
            line = json.dumps(document)
        print(line)
    say(verdict)
    return 0


@dataclass(frozen=True)
class VerifyFlags:
    """Flags of this command alone."""

    verify_steps: int = 12
    """Steps to train, twice."""


def verify_resume(argv: list[str], prog: str) -> int:
    """Train a few steps twice, once with kill -9 in between. Print whether both agree.

    For example: smollm verify-resume --recipe quickstart --verify-steps 8

    Takes every flag of train. The two runs are in a temporary folder, or below --run-dir if given, and are removed
    if they agree.
    """
    import shutil
    import tempfile

    own, config = parse(argv, prog=prog, about=str(inspect.getdoc(verify_resume)), own=VerifyFlags())
    from smollm_jax.runs.places import check_places

    check_places(config)
    from smollm_jax.training.verify_resume import verify_resume as verify

    place = None if config.run.run_dir is None else config.run_dir
    if place is not None:
        Path(place).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=place))
    result = verify(config, folder, steps=own.verify_steps)
    for what, difference in result.compared.items():
        print(f"{what:<26} {difference or 'exact'}")
    if result.exact and not result.resumes:
        print("verdict: NOT TESTED, the run was over before it could be killed; give more --verify-steps")
        return EXIT_FAILED
    words = "exact" if result.exact else "NOT EXACT"
    print(f"verdict: {words} over {result.steps} steps, killed and resumed {result.resumes} times")
    if not result.exact:
        say(f"both runs are kept in {folder}")
        return EXIT_FAILED
    shutil.rmtree(folder)
    return 0


@dataclass(frozen=True)
class PlanFlags:
    """Flags of this command alone."""

    topology: str = ""
    """Devices, such as v5e:4x4, v5p:2x2x1, gpu-h100:8 or cpu:1."""
    json: bool = False
    """Print one line of JSON in place of the table."""


def plan(argv: list[str], prog: str) -> int:
    """Plan a run on devices that this machine does not have. Exit code 1 if it would not fit.

    Takes every flag of train. For example: smollm plan --topology v5e:2x2 --batch-size 32
    """
    own, config = parse(argv, prog=prog, about=str(inspect.getdoc(plan)), own=PlanFlags())
    import jax

    jax.config.update("jax_platforms", "cpu")  # leave accelerators of this machine to other programs
    from smollm_jax.planning.plan import as_dict, make_plan, table

    made = make_plan(config, own.topology)
    print(json.dumps(as_dict(made)) if own.json else table(made))
    return 0 if made.fits else EXIT_FAILED

"""From a command line to a Config, and from a mistake to one line."""

import re
import resource
import subprocess
import sys

import pytest

from smollm_jax.cli.arguments import parse, parse_command
from smollm_jax.cli.generate import generate
from smollm_jax.runtime.errors import UserError
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--steps", "many"], "many"),
        (["--step", "5"], "--step"),
        (["--recipe", "replicate"], "expected one of replica, smollm2, fast, quickstart"),
        (["--preset", "7B"], "expected one of 135M, 360M, 1.7B, quickstart"),
        (["--num-heads", "9", "--num-kv-heads", "4"], "num_heads=9 must be a multiple of num_kv_heads=4"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be above 0"),
        (["--learning-rate", "nan"], "learning_rate=nan must be a finite number"),
        (["--learning-rate", "inf"], "learning_rate=inf must be a finite number"),
        (["--grad-accum", "3"], "grad_accum=3 must divide the batch size 32"),
        (["--decay-steps", "5"], "decay_steps=5 belongs to --schedule wsd"),
        (["--schedule", "wsd", "--warmup-steps", "80", "--decay-steps", "80", "--steps", "100"], "together"),
        (["--seq-len", "9000"], "seq_len=9000 must not exceed the model's max_seq_len=8192"),
        (["--dtype", "float8"], "float8"),
        (["--phases", "5x"], "must read STEPSxBATCH"),
        (["--beta2", "1"], "beta2=1.0 must be in [0, 1)"),
        (["--final-learning-rate", "1"], "must not be above"),
        (["--data-timeout", "0"], "data_timeout=0.0"),
        (["--seed", str(2**32)], "seed=4294967296 must be below 2**32"),
        (["--steps", "9999999999"], "must be below 2**31"),
        (["--sample-prompts", "a", ""], "every prompt must have text"),
        (["--schedule", "constant", "--final-learning-rate", "1e-5"], "belongs to a schedule that decays"),
        (["--schedule", "cosine", "--decay-shape", "1-sqrt"], "decay_shape=1-sqrt belongs to --schedule wsd"),
        (["--extend", "9"], "extend=9: more steps would change every rate of the linear schedule; smollm anneal"),
        (["--eval-data", "x.jsonl", "--eval-documents", "0"], "must be above 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--data", "a.jsonl", "--steps", "5", "--data", "b.jsonl"],
            "--data is given 2 times; give it once: --data A,B",
        ),
        (["--eval-data=a.jsonl", "--eval_data", "b.jsonl"], "--eval-data is given 2 times"),
        (["--sample-prompts", "a", "b", "--sample-prompts", "c"], "--sample-prompts A B"),
    ],
)
def test_a_flag_that_may_mean_several_is_refused_if_given_twice(argv, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(argv)
    with pytest.raises(UserError, match="--stop is given 2 times; give it once: --stop A B"):
        parse_command(generate, ["x", "--prompt", "y", "--stop", "a", "--stop", "b"], "smollm generate")


def test_of_any_other_flag_the_last_counts_and_a_line_says_so(capsys):
    config = parse(
        ["--recipe", "smollm2", "--recipe=quickstart", "--seed", "1", "--no-export", "--seed=2", "--export"]
    )
    assert (config.recipe, config.run.seed, config.run.export) == ("quickstart", 2, True)
    said = [f"--{name} is given 2 times; the last one counts" for name in ("recipe", "seed", "export")]
    assert capsys.readouterr().err.splitlines() == said


def test_a_value_that_looks_like_a_flag_is_no_flag(capsys):
    argv = ["x", "--prompt=--seed=1 --seed", "--seed", "3"]
    call = parse_command(generate, argv, "smollm generate")
    assert (call.keywords["prompt"], call.keywords["sampling"].seed) == ("--seed=1 --seed", 3)
    assert not capsys.readouterr().err


def test_a_mistake_on_the_command_line_exits_with_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_jax.py"), "--steps", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: steps=0 must be at least 1; see train_jax.py --help\n"


@pytest.mark.parametrize("command", [["train_jax.py"], ["-m", "smollm_jax"], ["-m", "smollm_jax", "export"]])
def test_help_answers_at_once(command):
    """Within a second of the processor, in the best of three tries: others share the machine."""
    taken = []
    while not taken or (min(taken) >= 1 and len(taken) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "usage" in done.stdout
    heavy = {"jax", "numpy", "torch", "datasets", "transformers", "gradio", "orbax"}
    assert not heavy & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert min(taken) < 1


def run_and_imports(*arguments, code):
    command = [sys.executable, "-X", "importtime", "-m", "smollm_jax", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    return done, {line.split("|")[-1].strip() for line in lines}


def test_a_listing_of_checkpoints_loads_no_jax(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    done, imported = run_and_imports("checkpoints", str(tmp_path), code=0)
    assert done.stdout.splitlines()[-1].endswith("the folder is empty")
    assert not {"jax", "orbax", "torch"} & imported


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "{}", "--prompt", "x"],
        ["chat", "{}"],
        ["serve", "{}"],
        ["export", "{}", "--out", "x"],
        ["evaluate", "{}", "--data", "x"],
        ["import", "{}", "--out", "x"],
    ],
)
def test_a_folder_that_is_not_there_is_said_before_anything_heavy_is_imported(tmp_path, arguments):
    done, imported = run_and_imports(*(word.format(tmp_path / "gone") for word in arguments), code=2)
    assert re.search(r"^error: .*gone", done.stderr, re.MULTILINE)
    assert not {"jax", "gradio", "torch"} & imported


@pytest.mark.parametrize(
    "package", ["runtime", "config", "tokenizer", "data", "hf", "checkpoint", "runs", "cli.commands"]
)
def test_public_names_of_a_package_need_no_jax(package):
    program = f"import sys, smollm_jax.{package} as package"
    program += "; [getattr(package, name) for name in getattr(package, '__all__', ())]"
    program += "; assert not {'jax', 'flax', 'orbax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

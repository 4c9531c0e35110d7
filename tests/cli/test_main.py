"""The console command: every command is found, described, and answers a mistake in one line."""

import json
import subprocess
import sys

import pytest
import yaml

from smollm_jax import __version__
from smollm_jax.cli.arguments import SPELLINGS, parse
from smollm_jax.cli.main import LIKE_TRAIN, SIMPLE, command, overview
from smollm_jax.config.serialization import to_dict
from smollm_jax.runtime.errors import UserError
from tests.support.paths import ROOT

NAMES = ["train", "serve", "chat", "generate", "evaluate", "export", "import", "push", "checkpoints", "batch",
         "average", "anneal", "verify-resume", "plan"]  # fmt: skip


def test_the_overview_has_a_line_for_every_command():
    lines = overview("smollm").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == NAMES
    assert len(SIMPLE) + len(LIKE_TRAIN) + 1 == len(NAMES)
    assert all(len(line) < 120 for line in lines)


def ran(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "smollm_jax", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_no_command_shows_the_commands_and_a_wrong_one_the_right_one():
    assert ran().stdout == ran("--help").stdout == overview("python -m smollm_jax") + "\n"
    assert ran("--version").stdout == f"{__version__}\n"
    done = ran("trian", "--steps", "3")
    assert (done.returncode, done.stderr) == (
        2,
        "error: python -m smollm_jax has no command 'trian'; did you mean train?\n",
    )
    with pytest.raises(UserError, match="has no command 'x'; expected one of train, serve"):
        command("x", [], "smollm")


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_help_of_a_command_has_its_flags_and_an_example_or_the_flags_of_train(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command(name, ["--help"], "smollm")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: smollm {name} ")
    assert "STR STR" not in shown
    assert "{None}" not in shown
    assert "For example: smollm " in shown


def test_flags_of_plan_and_verify_resume_are_described(capsys):
    for name, flag in (
        ("plan", "--topology STR Devices, such as"),
        ("verify-resume", "--verify-steps INT Steps to train"),
    ):
        with pytest.raises(SystemExit):
            command(name, ["--help"], "smollm")
        shown = " ".join(capsys.readouterr().out.split())
        assert flag in shown
        assert "--learning-rate" in shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-steps", "5"], "--max-steps is no flag here; did you mean --steps?"),
        (["--lr=3e-4"], "--lr is no flag here; did you mean --learning-rate?"),
        (["--per_device_train_batch_size", "5"], "did you mean --batch-size?"),
        (["--num-head", "5"], "did you mean --num-heads?"),
        (["--nonsense"], "--nonsense is no flag here; see train_jax.py --help"),
        (["--steps", "1.5"], "--steps 1.5: expected INT"),
        (["texts.jsonl"], "'texts.jsonl' is one argument too many"),
    ],
)
def test_a_flag_of_another_trainer_is_answered_with_ours(argv, words):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 150


def test_every_flag_that_is_suggested_exists(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    known = capsys.readouterr().out + "--max-new-tokens"
    for ours, theirs in SPELLINGS.items():
        assert ours.split()[0] in known, ours
        assert not [name for name in theirs.split() if f"--{name} " in known]


def test_a_command_without_its_arguments_names_the_missing_one():
    for argv, words in (
        (["export", "x"], "--out is missing"),
        (["batch", "x"], "--step is missing"),
        (["push"], "FOLDER is missing"),
    ):
        with pytest.raises(UserError, match=f"^{words}; see smollm {argv[0]} --help"):
            command(argv[0], argv[1:], "smollm")


def test_settings_come_from_a_file_and_flags_go_before_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: quickstart\nrun: {steps: 30, batch_size: 2}\noptimizer:\n  learning_rate: 1e-3\n")
    config = parse(["--config", str(path), "--steps", "20"])
    assert (config.recipe, config.total_steps, config.main_batch_size) == ("quickstart", 20, 2)
    assert (config.optimizer.learning_rate, config.model.hidden_size) == (1e-3, 256)
    path.write_text("run: {steps: 30}\n")
    assert parse(["--recipe", "quickstart", "--config", str(path)]).model.hidden_size == 256
    whole = tmp_path / "config.json"
    whole.write_text(json.dumps(to_dict(config)))
    assert parse(["--config", str(whole)]) == parse(["--config", str(whole), "--seed", "0"])
    assert to_dict(parse(["--config", str(whole)])) == to_dict(config)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert to_dict(parse(["--config", str(tmp_path / "again.yaml")])) == to_dict(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {stepz: 3}", "unknown fields: 'stepz'"),
        ("run: 3", "run must be an object, 3 came"),
        ("recipe: [3]", "expected one of replica"),
        ("- 3", "must hold an object"),
        ("a: b: c", "cannot be read"),
        ("run: {steps: many}", "steps must be int, 'many' came"),
        ("!!python/object:os.system {}", "cannot be read"),
        ("[" * 5_000, "cannot be read"),
    ],
)
def test_a_file_of_settings_that_is_wrong_is_one_line(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert words in str(caught.value)
    assert str(path) in str(caught.value) or "--recipe" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_by_its_folder_alone(tmp_path):
    job = "--coordinator other:1 --num-processes 2 --process-id 0".split()
    config = parse(["--recipe", "quickstart", "--seed", "5", "--stop-after", "3", "--run-dir", "elsewhere", *job])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    again = parse(["--resume", str(tmp_path), "--log-every", "7"])
    assert (again.run_dir, again.run.seed, again.run.log_every, again.run.stop_after) == (
        str(tmp_path),
        5,
        7,
        None,
    )
    assert (again.compute.coordinator, again.compute.num_processes, again.compute.process_id) == (None,) * 3
    with pytest.raises(UserError, match=r"config\.json is missing"):
        parse(["--resume", str(tmp_path / "nowhere")])
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"export is not a run: its config\.json has no settings of one"):
        parse(["--resume", str(tmp_path / "export")])
    with pytest.raises(UserError, match="leave out --recipe"):
        parse(["--resume", str(tmp_path), "--recipe", "quickstart"])

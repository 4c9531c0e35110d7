"""Every command of the README and of docs/ has a rule: it runs here with tiny settings, or a reason says why not.

A page's commands run in their order, in one scratch folder, without network.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.markdown import Block, blocks, commands
from tests.support.paths import ROOT
from tests.support.server import Server
from tests.support.texts import make_pairs, make_talks, write_rows

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:7860"
SHAPE = (
    "--hidden-size 32 --num-layers 1 --num-heads 2 --num-kv-heads 1 --head-dim 16 --intermediate-size 32 "
    "--vocab-size 300 --seq-len 32"
).split()
SHORT = (
    "--steps 4 --batch-size 2 --eval-every 0 --sample-tokens 0 --shuffle-window 16 --warmup-steps 1 --no-export"
).split()
NEW = [*SHAPE, "--tokenizer", "train:300", *SHORT]
SCORED = [*NEW, "--eval-every", "4", "--eval-batches", "1"]  # what a picture needs


ROOM = [*SHAPE, *SHORT]  # for ChatML's tokens
TALK = ["--seq-len", "128", *SHORT]


class Rule(NamedTuple):
    """What to do with the commands that match: append `flags` and run, or not, because of `reason`."""

    pattern: str
    flags: tuple[str, ...] | list[str] = ()
    reason: str = ""
    swap: tuple[str, str] = ("", "")


RULES = [
    Rule(r"#!/bin/bash\n#SBATCH", reason="a script for SLURM"),
    Rule(r"git clone ", reason="needs a network"),
    Rule(r"cd ", reason="belongs to the line before"),
    Rule(r"python3 -m venv ", reason="an environment of its own; .ci/run makes one"),
    Rule(r"\. ", reason="an environment of its own; .ci/run makes one"),
    Rule(r"pip install ", reason="needs a package index; its extras are checked"),
    Rule(r"(ruff|mypy|python -m pytest)\b", reason="what .ci/run does"),
    Rule(r"gcloud ", reason="needs Google Cloud"),
    Rule(r"python train_jax\.py .*--coordinator ", reason="needs two hosts; tests/end_to_end/test_jobs.py"),
    Rule(r"python train_jax\.py .*--mesh ", reason="needs eight devices; tests/distributed has them"),
    Rule(r".* HuggingFace(TB|H4)/", reason="needs the Hub"),
    Rule(r"python train_jax\.py --resume runs/steady", swap=("--extend 500", "--extend 2")),
    Rule(r"python train_jax\.py --resume "),
    Rule(r"python train_jax\.py --config ", ["--steps", "4"]),
    Rule(r"python train_jax\.py --init-from ", ["--seq-len", "32", *SHORT]),
    Rule(r"python train_jax\.py --recipe smollm2", ["--data", "texts/*.jsonl", *NEW, "--batch-size", "16"]),
    Rule(r"python train_jax\.py --recipe (sft|dpo)", TALK),
    Rule(r"python train_jax\.py --recipe quickstart --tokenizer", ROOM, swap=("train:4096", "train:300")),
    Rule(r"(\w+=\S+ )?python train_jax\.py --recipe quickstart", SCORED, swap=("-after 800", "-after 2")),
    Rule(r"python train_jax\.py$", ["--data", "texts/*.jsonl", *NEW]),
    Rule(r"python train_jax\.py --data .*--schedule wsd", [*NEW, "--decay-steps", "2", "--checkpoint-every", "1"]),
    Rule(r"python train_jax\.py --data ", NEW),
    Rule(r"smollm anneal runs/wsd", ["--no-export"], swap=("1600 --steps 200", "2 --steps 2")),
    Rule(r"smollm anneal runs/steady", ["--no-export"], swap=("2000 --steps 400", "4 --steps 2")),
    Rule(r"smollm average .*1600", swap=("/1600", "/2")),
    Rule(r"smollm average "),
    Rule(r"smollm verify-resume ", [*NEW, "--checkpoint-every", "2"]),
    Rule(r"smollm plan --topology v", ["--preset", "quickstart", "--batch-size", "4", "--seq-len", "256"]),
    Rule(r"smollm plan --topology gpu-"),
    Rule(r"smollm batch ", swap=("--step 120", "--step 3")),
    Rule(r"smollm generate ", ["--max-new-tokens", "4"]),
    Rule(r"smollm evaluate .*--tasks smollm2", reason="needs the Hub; tests/evaluation has local copies"),
    Rule(r"smollm evaluate .*--data-kind chat", ["--seq-len", "128"]),
    Rule(r"smollm evaluate .*builtin", ["--max-batches", "1", "--batch-size", "2"]),
    Rule(r"smollm (evaluate|export|import|push|checkpoints) "),
    Rule(r"python serve\.py ", ["--backend", "jax"]),
    Rule(r"curl "),
    Rule(r"python -m benchmarks\.\w+ --help$"),
    Rule(r"python -m benchmarks\.(ngram|picture) ", ["--orders", "1"]),
]  # fmt: skip
LANGUAGES = {"bash": "run", "python": "run", "text": "shown", "yaml": "shown", "": "shown"}
SHOWN = {"architecture.md"}  # pages whose blocks without a language are drawings


def rule_of(command: str) -> Rule:
    """The first rule that matches a command; no rule is a mistake of whoever wrote the command."""
    found = next((rule for rule in RULES if re.match(rule.pattern, command)), None)
    assert found is not None, f"no rule in tests/docs/test_commands.py runs or passes over: {command}"
    return found


def every_command() -> Iterator[tuple[Path, int, str]]:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                yield from ((page, command.line, command.text) for command in commands(block))


def test_every_block_has_a_language_and_every_command_a_rule():
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            assert block.language in LANGUAGES, f"{where}: is {block.language!r} to be run or shown?"
            assert block.language or page.name in SHOWN, f"{where}: say bash, python, yaml or text"
    used = {rule_of(text).pattern for _, _, text in every_command()}
    assert used == {rule.pattern for rule in RULES}, "rules that no command needs"


def test_a_command_without_a_rule_fails():
    with pytest.raises(AssertionError, match="no rule"):
        rule_of("smollm frobnicate runs/quickstart")


def test_every_extra_that_is_installed_exists():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        extra
        for page in PAGES
        for found in re.findall(r"(?:\.|smollm-jax)\[([\w,]+)\]", page.read_text())
        for extra in found.split(",")
    }
    assert {"serve", "cuda13", "tpu"} <= named <= extras


def test_readme_has_the_two_lines_of_a_fresh_machine():
    """`.ci/run` takes the second from here; a newcomer takes the first."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e "
    assert [line for line in lines if line.startswith(start)] == [
        f"{start}. && python train_jax.py --recipe quickstart",
        f"{start}'.[dev]' && ruff check && ruff format --check && mypy && python -m pytest -n 2 --dist loadfile",
    ]
    assert next(line for line in lines if "pytest" in line).startswith(start)


def quiz_of(page: Path) -> str:
    """The task that the page of scores writes down."""
    return next(block.text for block in blocks(page) if block.language == "yaml")


class Place:
    """A scratch folder with texts, in which the commands of a page run one after the other."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.server = folder, None
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"),
        }  # fmt: skip
        self.cache = ["--compilation-cache-dir", str(cache)]
        (folder / "texts").mkdir()
        for name in ("a.jsonl", "b.jsonl", "texts/one.jsonl"):
            lines = [json.dumps({"text": f"{name} {i} the cat sat on a mat " * 4}) for i in range(250)]
            (folder / name).write_text("\n".join(lines) + "\n")
        (folder / "quiz.yaml").write_text(quiz_of(ROOT / "docs" / "scores.md"))
        asked = [{"question": f"cat {i} sat on", "choices": ["a mat", "a moon"], "answer": 0} for i in range(8)]
        write_rows(folder / "quiz.jsonl", asked)
        for name in ("chats.jsonl", "questions.jsonl"):
            write_rows(folder / name, [{"messages": talk} for talk in make_talks(60)])
        write_rows(folder / "pairs.jsonl", make_pairs(60))

    def run(self, command: str) -> str:
        """Run a command as its rule says; returns what it printed to stdout."""
        rule = rule_of(command)
        command = command.replace(*rule.swap) if rule.swap[0] else command
        words = [*shlex.split(command), *rule.flags]
        environment = dict(self.environment)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[:2] == ["python", "serve.py"]:
            path = self.folder / words.pop(2)
            self.close()
            self.server = Server(path, *words[2:])
            return self.server.url
        if words[0] == "curl":
            words = [word.replace(ADDRESS, self.server.url.rstrip("/")) for word in words]
        elif words[0] == "smollm":
            words = ["python", "-m", "smollm_jax", *words[1:]]
        elif "train_jax.py" in words:
            words[words.index("train_jax.py")] = str(ROOT / "train_jax.py")
            words += self.cache
        if words[0] == "python":
            words[0] = sys.executable
        return self.done(words, environment, command)

    def python(self, text: str) -> str:
        """Run a Python block, against the server if it names its address."""
        if ADDRESS in text:
            text = text.replace(ADDRESS, self.server.url.rstrip("/"))
        return self.done([sys.executable, "-c", text], self.environment, text)

    def done(self, words: list[str], environment: dict[str, str], shown: str) -> str:
        ended = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        # 75: `--stop-after` saved and stopped on request
        assert ended.returncode in ({0, 75} if "--stop-after" in shown else {0}), f"{shown}\n{ended.stderr}"
        return ended.stdout

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    made = Place(tmp_path_factory.mktemp("docs"), cache)
    made.run("python train_jax.py --recipe quickstart --run-dir runs/quickstart")
    made.run("smollm export runs/quickstart --out my-model")
    yield made
    made.close()


def runs_here(block: Block) -> bool:
    return block.language == "python" or (
        block.language == "bash" and any(not rule_of(command.text).reason for command in commands(block))
    )


@pytest.mark.release
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(runs_here, blocks(page)))], ids=lambda p: p.name
)
def test_the_commands_of_a_page_run(page, place):
    try:
        for block in blocks(page):
            if block.language == "python":
                place.python(block.text)
            elif block.language == "bash":
                for command in commands(block):
                    if not rule_of(command.text).reason:
                        place.run(command.text)
    finally:
        place.close()

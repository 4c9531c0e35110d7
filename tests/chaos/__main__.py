"""Stop runs at random moments in random ways and compare what comes of them: `python -m tests.chaos`.

A scenario is a small run over what makes resuming hard: phases, epochs, a mixture, conversations, pairs of
answers, the end of the data. It is run straight once; then again and again in pieces, each stopped somewhere else,
until it is finished. Ledger, losses, samples, parameters, optimizer state and cursor must be those of the straight
run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from smollm_jax.checkpoint.listing import steps_in
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.preference import PreferenceConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.runs.lock import REFERENCE
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.errors import EXIT_STOPPED
from smollm_jax.runtime.signals import AGAIN_SECONDS
from smollm_jax.tokenizer.load import train_tokenizer
from smollm_jax.training.verify_resume import compare_runs, last_step, start

STOPS_A_RUN = 8  # after so many a run is left to finish
LONGEST_SECONDS = 60.0  # no moment is waited for any longer
SIGNAL_SECONDS = 10.0  # within which a signal has to have ended a run
WORDS = "the cat sat on a mat and saw one bird fly over tall grey hills near our old red house".split()


@dataclass
class Target:
    """A run under way, as the moments see it."""

    config: Config
    process: subprocess.Popen[str]
    run_dir: Path
    rng: random.Random
    log_from: int = 0
    """Where this process's words begin in the log."""
    began: float = field(default_factory=time.monotonic)

    def wait(self, condition: Callable[[], bool]) -> None:
        while self.process.poll() is None and time.monotonic() - self.began < LONGEST_SECONDS and not condition():
            time.sleep(0.002)

    def pause(self, seconds: float) -> None:
        """Up to `seconds`, unless the run ends before."""
        until = time.monotonic() + self.rng.uniform(0, seconds)
        while self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)

    def has(self, prefix: str) -> bool:
        folder = self.run_dir / "checkpoints"
        return folder.is_dir() and any(path.name.startswith(prefix) for path in folder.iterdir())

    def first_second(self) -> None:
        self.pause(1.0)

    @property
    def words(self) -> str:
        """What this process has logged."""
        return self.run_dir.with_suffix(".log").read_text()[self.log_from :]

    def reference(self) -> None:
        self.wait(lambda: "reference   computing" in self.words)
        self.pause(0.5)

    def compile(self) -> None:
        self.wait((self.run_dir / "config.json").exists)
        self.pause(2.0)

    def step(self) -> None:
        before = last_step(self.run_dir)
        self.wait(lambda: last_step(self.run_dir) > before)
        self.pause(1.5)

    def save(self) -> None:
        self.wait(lambda: self.has(".tmp-"))
        self.pause(0.05)

    def retention(self) -> None:
        kept = self.config.run.keep_last
        self.wait(lambda: self.has(".trash-") or len(steps_in(self.run_dir / "checkpoints")) > kept)
        self.pause(0.02)

    def evaluation(self) -> None:
        every, begun = self.config.run.eval_every, last_step(self.run_dir)

        def under_way() -> bool:
            lines = read_metrics(self.run_dir)
            return bool(lines) and lines[-1]["step"] > begun and lines[-1]["step"] % every == 0

        self.wait(under_way)
        self.pause(0.3)

    def last_second(self) -> None:
        self.wait(lambda: last_step(self.run_dir) >= self.config.total_steps - 1)
        self.pause(1.0)


MOMENTS = {
    "first second": Target.first_second,
    "compile": Target.compile,
    "reference log-probs": Target.reference,
    "step": Target.step,
    "save": Target.save,
    "evaluation": Target.evaluation,
    "retention": Target.retention,
    "last second": Target.last_second,
}
WAYS = ("kill -9", "SIGTERM", "Ctrl-C", "SIGTERM twice")


def moments(config: Config, run_dir: Path) -> list[str]:
    """The moments to choose from. A run on pairs computes its reference log-probs once, so often stop it there."""
    usual = [name for name in MOMENTS if name != "reference log-probs"]
    is_ahead = config.data.is_pairs and not (run_dir / REFERENCE).exists()
    return usual + ["reference log-probs"] * (len(usual) if is_ahead else 0)


@dataclass(frozen=True)
class Stop:
    """How a piece was ended, and whether it ended as promised; `wrong` is None if so."""

    way: str
    moment: str
    hit: bool
    """Whether the run was still going."""
    wrong: str | None = None


def stop(target: Target, way: str, moment: str) -> Stop:
    """Wait for the moment, end the run in that way, and judge how it went."""
    process = target.process
    MOMENTS[moment](target)
    if process.poll() is not None:
        code = process.wait()
        return Stop(way, moment, False, None if code == 0 else f"ended by itself with {code}")
    sent, heard = time.monotonic(), hears_signals(process)
    number = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT}.get(way, signal.SIGTERM)
    process.send_signal(number)
    if way == "SIGTERM twice":
        target.pause(2 * AGAIN_SECONDS)
        process.send_signal(number)
    try:
        code = process.wait(SIGNAL_SECONDS * (1 if way != "kill -9" else 6))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        # before our handlers stand, Python may lose a Ctrl-C in a callback of its imports: then this was a kill -9
        lost = way == "Ctrl-C" and not heard
        return Stop(
            way, moment, True, None if lost else f"still there {time.monotonic() - sent:.0f} s after {way}"
        )
    if way == "kill -9" and code == 0:  # it was done a moment before
        return Stop(way, moment, False)
    if code == EXIT_STOPPED and (broken := promise_broken(target)):
        return Stop(way, moment, True, broken)
    allowed = {"kill -9": {-9}, "SIGTERM twice": {75, 0, 1}}.get(way, {75, 0})
    if not heard:
        allowed = allowed | {-number, 1}
    return Stop(way, moment, True, None if code in allowed else f"exit code {code} after {way}")


def hears_signals(process: subprocess.Popen[str]) -> bool:
    """Whether the handlers stand already: the first tenths of a second are Python's own."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    except (OSError, TypeError):
        return False
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def promise_broken(target: Target) -> str | None:
    """What is wrong when the run said at which step it stopped, and that this was saved."""
    said = re.findall(r"stopped at step ([\d,]+) of", target.words)
    saved = (steps_in(target.run_dir / "checkpoints") or [0])[0]
    if said and int(said[-1].replace(",", "")) != saved:
        return f"said that step {said[-1]} was saved; the newest checkpoint is {saved}"
    return None


def scenarios(folder: Path, cache: Path) -> dict[str, Config]:
    """The runs by name, over small texts written below `folder`."""
    rng = random.Random(0)
    texts: dict[str, list[str]] = {}
    for name, count in (("a", 300), ("b", 120)):
        texts[name] = [f"{name}{i} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for i in range(count)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts[name]]
        for part in range(3):
            (folder / f"{name}-{part}.jsonl").write_text("".join(lines[part::3]))
    train_tokenizer(texts["a"], 300).save(folder / "tokenizer")
    train_tokenizer(texts["a"], 300, chat=True).save(folder / "chat-tokenizer")
    talks = [
        {"prompt": one, "completion": other} for one, other in zip(texts["a"][::2], texts["a"][1::2], strict=True)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    pairs = [
        {"prompt": one[:40], "chosen": other[:60], "rejected": third[:60]}
        for one, other, third in zip(texts["a"][::3], texts["a"][1::3], texts["a"][2::3], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    base = Config(
        model=ModelConfig(
            vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
            intermediate_size=24,
        ),
        data=DataConfig(
            data=f"{folder}/a-*.jsonl", tokenizer=str(folder / "tokenizer"), seq_len=32, shuffle_window=16,
            eval_documents=5, eval_batches=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        compute=ComputeConfig(loss_chunk=64, compilation_cache_dir=str(cache)),
        run=RunConfig(
            phases="200x4", checkpoint_every=20, eval_every=50, log_every=1, sample_tokens=4, export=False,
            sample_prompts=("the cat",),
        ),
    )  # fmt: skip
    changed = {
        "phases": {"run": replace(base.run, phases="120x4,80x2", checkpoint_every=13)},
        "muon and average": {
            "optimizer": replace(base.optimizer, optimizer="muon", ema=0.95, z_loss=1e-3),
            "run": replace(base.run, checkpoint_every=11),
        },
        "epochs": {"data": replace(base.data, data=f"{folder}/b-*.jsonl"), "run": replace(base.run, keep_last=1)},
        "mixture": {"data": replace(base.data, data=f"{folder}/a-*.jsonl=0.7,{folder}/b-*.jsonl=0.3", shards=4)},
        "conversations": {
            "data": replace(
                base.data,
                data_kind="chat",
                data=f"{folder}/talks.jsonl=0.8,{folder}/b-*.jsonl=0.2",
                seq_len=256,
                tokenizer=str(folder / "chat-tokenizer"),
                shards=2,
            ),
        },
        "pairs": {
            "data": replace(
                base.data,
                data_kind="pairs",
                data=f"{folder}/pairs.jsonl",
                seq_len=192,
                tokenizer=str(folder / "chat-tokenizer"),
                shards=2,
            ),
            "preference": PreferenceConfig(beta=0.1),
        },
        "end of the data": {
            "data": replace(base.data, epochs=3),
            "run": replace(base.run, phases="900x4", eval_every=30, checkpoint_every=7, export=True),
        },
    }
    return {name: replace(base, **change) for name, change in changed.items()}


def in_folder(config: Config, run_dir: Path) -> Config:
    return replace(config, run=replace(config.run, run_dir=str(run_dir)))


def quiet(config: Config) -> subprocess.Popen[str]:
    log = Path(config.run_dir).with_suffix(".log").open("a")
    return start(config, stdout=log, stderr=log)


def in_pieces(config: Config, straight: Path, seed: int, most: int) -> tuple[list[Stop], str | None]:
    """Stop a run up to `most` times, then let it finish. The stops, and what differs from the straight run."""
    rng, run_dir, stops = random.Random(seed), Path(config.run_dir), []
    while len(stops) < most:
        log = run_dir.with_suffix(".log")
        log_from = len(log.read_text()) if log.exists() else 0
        target = Target(config, quiet(config), run_dir, rng, log_from)
        made = stop(target, rng.choice(WAYS), rng.choice(moments(config, run_dir)))
        if not made.hit and made.wrong is None:
            break
        stops.append(made)
    code = quiet(config).wait()
    if code != 0:
        return stops, f"could not be finished: exit code {code}, see {run_dir.with_suffix('.log')}"
    differences = [f"{what}: {words}" for what, words in compare_runs(straight, run_dir).items() if words]
    return stops, "; ".join(differences) or None


def chaos(
    folder: Path, *, stops: int, seed: int, jobs: int, cache: Path, only: Sequence[str] = ()
) -> tuple[list[tuple[Stop, bool]], list[str]]:
    """At least `stops` stops over all scenarios, or the named ones. Each with whether its run came out exact, and
    what went wrong."""
    made: list[tuple[Stop, bool]] = []
    wrong: list[str] = []
    # a shell's background job ignores Ctrl-C, and so would all that it starts until their handlers stand
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plans = {name: config for name, config in scenarios(folder, cache).items() if not only or name in only}
    first, most = {name: threading.Lock() for name in plans}, min(stops, STOPS_A_RUN)

    def straight(name: str) -> Path:
        run_dir = folder / f"straight {name}"
        with first[name]:
            if not run_dir.exists():
                code = quiet(in_folder(plans[name], run_dir)).wait()
                assert code == 0, run_dir.with_suffix(".log").read_text()
        return run_dir

    def one(number: int) -> None:
        name = list(plans)[number % len(plans)]
        run_dir = folder / f"run-{number}"
        done, difference = in_pieces(
            in_folder(plans[name], run_dir), straight(name), seed * 100_000 + number, most
        )
        problems = [made.wrong for made in done if made.wrong] + ([difference] if difference else [])
        wrong.extend(f"{name}, {run_dir}: {problem}" for problem in problems)
        made.extend((stop, difference is None and stop.wrong is None) for stop in done if stop.hit)
        if not problems:
            shutil.rmtree(run_dir)
        print(f"{name}: {len(done)} stops, {'; '.join(problems) or 'exact'} ({len(made)} so far)", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        number = 0
        while len(made) < stops:
            batch = range(number, number + jobs)
            number += jobs
            list(pool.map(one, batch))
    return made, wrong


def table(made: list[tuple[Stop, bool]]) -> str:
    """Markdown: a row for each way and moment, with tries, exact, lost."""
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for done, exact in made:
        counts[done.way, done.moment].append(exact)
    lines = ["| way | moment | tries | exact | lost |", "|---|---|---:|---:|---:|"]
    for way in WAYS:
        for moment in MOMENTS:
            results = counts.get((way, moment))
            if results:
                lines.append(f"| {way} | {moment} | {len(results)} | {sum(results)} | {results.count(False)} |")
    results = [exact for _, exact in made]
    lines.append(f"| **all** | | {len(results)} | {sum(results)} | {results.count(False)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCENARIO", help="conversations, pairs, ...")
    settings = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    made, wrong = chaos(
        folder,
        stops=settings.stops,
        seed=settings.seed,
        jobs=settings.jobs,
        cache=folder / "compiled",
        only=settings.only,
    )
    print(table(made))
    print(f"{len(made)} stops in {time.monotonic() - began:.0f} s, seed {settings.seed}", file=sys.stderr)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark runs in tiny shapes and prints a line of JSON with the documented fields."""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.harness.sides import Outcome
from smollm_jax.cli.arguments import parse_command
from tests.support.paths import ROOT
from tests.support.server import export_model

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the peer is PyTorch")
ALONE = ("--preset", "quickstart", "--seq-len", "32", "--documents", "2", "--rounds", "1")


@pytest.fixture
def anew():
    """Run a benchmark in a process of its own, whose memory is its own."""

    def run(name, *flags):
        command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), done.stderr

    return run


@pytest.fixture
def ran(capfd, monkeypatch):
    """Run a benchmark in this process; return its line of JSON, and the tables that it prints to stderr."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # of the sides, which are processes

    def run(name, *flags, code=0):
        benchmark = getattr(importlib.import_module(f"benchmarks.{name}"), name)
        capfd.readouterr()
        assert parse_command(benchmark, list(flags), f"python -m benchmarks.{name}")() == code
        out, err = capfd.readouterr()
        lines = out.splitlines()
        assert len(lines) == 1, "only the line of JSON belongs on stdout"
        return json.loads(lines[0]), err

    yield run
    import jax

    jax.config.update("jax_default_matmul_precision", None)  # a command sets it for its dtype


def positive(spread):
    return 0 < spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.slow
def test_train_gives_speed_memory_and_compile_time_of_each_batch_size(ran):
    found, table = ran("train", *ALONE, "--batch-sizes", "1", "2", "--dtypes", "float32", "--peers")
    assert [(row["side"], row["batch"]) for row in found["rows"]] == [("ours", 1), ("ours", 2)]
    for row in found["rows"]:
        assert positive(row["tokens/s"])
        assert min(row["compile, s"], row["peak GiB"], row["planned GiB"], row["first loss"]) > 0
        assert row["threads, s a step"] > 0
        assert row["system, s a step"] >= 0
        assert row["page faults a step"] >= 0
        assert row["MFU"] is None  # no peak is known for a CPU
    best = max(row["tokens/s"]["median"] for row in found["rows"])
    assert [row["tokens/s"] for row in found["summary"]] == [best]
    assert "tokens/s" in table
    assert found["machine"]["cores"] == os.cpu_count()


@pytest.mark.slow
def test_fine_tuning_compares_steps_of_the_same_tokens(ran):
    found, _ = ran("fine_tuning", *ALONE, "--batch-size", "1")
    assert [row["side"] for row in found["rows"]] == ["pre-training", "SFT", "DPO"]
    assert all(positive(row["tokens/s"]) and positive(row["time over SFT's"]) for row in found["rows"])
    assert found["rows"][1]["time over SFT's"]["median"] == 1


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("more", [[], pytest.param(["--alone"], marks=pytest.mark.release)])
def test_train_sets_the_peer_beside_ours(ran, more):
    found, _ = ran("train", *ALONE, "--documents", "1", "--dtypes", "float32", "--peers", "eager", *more)
    ours, peer = found["rows"]
    assert peer["side"] == "HF + PyTorch eager"
    assert positive(peer["tokens/s"])
    assert peer["peak GiB"] > 0
    assert positive(peer["ours is faster by"])
    assert ours["first loss"] == pytest.approx(peer["first loss"], abs=1e-4)  # the same weights and tokens


@needs_torch
@pytest.mark.release
def test_train_runs_torch_compile_on_a_cpu(ran):
    found, _ = ran("train", *ALONE, "--dtypes", "float32", "--peers", "compile")
    assert positive(found["rows"][1]["tokens/s"])


def test_a_side_that_fails_is_named_and_the_others_go_on(tmp_path):
    script = (
        "from functools import partial\n"
        "from benchmarks.harness.sides import Ready, compare\n"
        "import os\n"
        "def good(): return Ready(lambda: {'round': float(os.environ['FOR_GOOD'])})\n"
        "def bad(): raise MemoryError('out of memory')\n"
        "def gone(): os._exit(3)\n"
        "if __name__ == '__main__':\n"
        "    sides, its_own = {'good': good, 'bad': bad, 'gone': gone}, {'good': {'FOR_GOOD': '1.0'}}\n"
        "    found = compare(sides, rounds=2, environments=its_own)\n"
        "    assert 'FOR_GOOD' not in os.environ\n"
        "    print([(name, len(one.rounds), one.failed) for name, one in found.items()])\n"
    )
    path = tmp_path / "failing_side.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert "('good', 2, None)" in done.stdout
    assert "('bad', 0, 'out of memory')" in done.stdout
    assert "('gone', 0, 'its process ended with exit code 3')" in done.stdout


@pytest.mark.release
def test_breakdown_adds_up_to_the_whole_step(ran):
    found, _ = ran("breakdown", *ALONE)
    rows = {row["part"]: row for row in found["rows"]}
    whole = rows.pop("whole step")
    explained, rest = rows.pop("sum of the parts"), rows.pop("rest")
    assert {"attention: scores to values", "feed-forward", "norms", "head and loss", "optimizer"} < rows.keys()
    assert sum(row["ms"]["median"] for row in rows.values()) == pytest.approx(explained["ms"])
    assert explained["ms"] + rest["ms"] == pytest.approx(whole["ms"]["median"])
    assert whole["share"] == 1


@pytest.mark.slow
def test_profile_attributes_the_time_of_a_step_to_the_parts_of_the_model(ran, tmp_path):
    found, _ = ran("profile", *ALONE[:-2], "--steps", "2", "--out", str(tmp_path))
    shares = {row["part"]: row["share"] for row in found["rows"]}
    parts = {"attention: scores to values", "attention: projections and rope", "feed-forward", "norms"}
    parts |= {"head and loss", "embedding", "optimizer"}
    assert parts < shares.keys()
    assert shares.pop("all") == 1
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["feed-forward"] > shares["norms"]
    assert not {"rest", "not in the program"} & {part for part, share in shares.items() if share > 0.1}
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_the_time_of_a_loop_is_the_time_of_its_operations():
    from collections import Counter

    from benchmarks.profile import by_part

    operations = {"while.1": ("while", "rest"), "dot.2": ("dot", "feed-forward"), "copy.3": ("copy", "rest")}
    rows = by_part(Counter({"while.1": 4.0, "dot.2": 3.0, "copy.3": 1.0}), operations, steps=2)
    assert [(row["part"], row["ms a step"], row["share"]) for row in rows] == [
        ("feed-forward", 1_500.0, 0.75),
        ("rest", 500.0, 0.25),
    ]


def test_an_operation_belongs_to_its_innermost_scope():
    from benchmarks.profile import part_of, read_operations

    layer = "jit(step)/transpose(jvp(layers))/while/body/closed_call"
    assert part_of(f"{layer}/feed_forward/BTD,DF->BTF/dot_general") == "feed-forward"
    assert part_of(f"{layer}/checkpoint/rematted_computation/transpose(jvp(norm))/mul") == "norms"
    assert part_of(f"{layer}/projections/scores/add") == "attention: scores to values"
    assert part_of(f"{layer}/add") == "scan over layers, residuals"
    assert part_of("jit(step)/mul") == "rest"
    program = f'  %dot.2 = f32[4,4]{{1,0}} dot(%a, %b), metadata={{op_name="{layer}/norm/dot_general"}}\n'
    program += "  %copy.3 = f32[4,4]{1,0} copy(%dot.2), metadata={op_name=\"state['params']['head']\"}\n"
    program += "  ROOT %copy.4 = f32[4,4]{1,0} copy(%copy.3)"
    own = ("copy", "XLA's own: copies, fills")
    assert read_operations(program) == {"dot.2": ("dot", "norms"), "copy.3": own, "copy.4": own}


def test_the_flops_of_the_parts_add_up_to_the_whole():
    from benchmarks.breakdown import part_flops
    from benchmarks.harness.workload import config_of
    from smollm_jax.config.architecture import MODELS

    config = config_of("135M", 2, 2_048)
    flops = part_flops(config)
    whole = flops.pop("whole step")
    norms = 6 * (2 * MODELS["135M"].num_layers + 1) * MODELS["135M"].hidden_size
    assert sum(flops.values()) + norms == whole


@pytest.mark.release
def test_attention_times_the_kernels_that_run_here_and_says_why_others_do_not(ran):
    found, _ = ran("attention", *ALONE, "--kernels", "plain", "pallas")
    plain, pallas = found["rows"]
    assert positive(plain["ms"])
    assert plain["faster than the first"]["median"] == 1
    assert "GPU" in pallas["failed"]


@pytest.mark.slow
def test_decode_gives_prefill_and_decoding_apart(ran):
    flags = ("--preset", "quickstart", "--prompt-tokens", "5", "--new-tokens", "9", "--rounds", "1")
    found, _ = ran("decode", *flags, "--batch-sizes", "1", "2", "--dtypes", "float32", "--peers")
    assert [(row["batch"], row["side"]) for row in found["rows"]] == [(1, "ours"), (2, "ours")]
    for row in found["rows"]:
        assert positive(row["tokens/s"])
        assert positive(row["first token, s"])
        assert row["prefill, tokens/s"] > 0
        assert "decode alone, tokens/s" in row


def test_decoding_alone_is_all_tokens_but_the_first():
    from benchmarks.decode import row_of
    from benchmarks.harness.workload import Prompts

    work = Prompts(Path(), batch_size=2, prompt_tokens=7, new_tokens=5, vocab_size=9, seed=0)
    outcome = Outcome([{"first token": 1.0, "all": 3.0}], {"tokens": [1, 2, 3, 4, 5]})
    row = row_of("ours", "float32", outcome, work)
    assert row["tokens/s"]["median"] == pytest.approx(2 * 5 / 3)
    assert row["decode alone, tokens/s"] == 2 * 4 / (3 - 1)
    assert row["prefill, tokens/s"] == 2 * 7
    assert row["begins"] == "1 2 3 4"


@needs_torch
@pytest.mark.release
def test_all_sides_decode_the_same_tokens(ran):
    flags = ("--preset", "quickstart", "--prompt-tokens", "5", "--new-tokens", "9", "--rounds", "1")
    found, _ = ran("decode", *flags, "--batch-sizes", "1", "--dtypes", "float32", "--kinds", "f32")
    sides = [row["side"] for row in found["rows"]]
    assert sides[:3] == ["ours", "HF generate, dynamic cache", "HF generate, static cache"]
    assert (sides[3:] == ["llama.cpp"]) == found["settings"]["llama_cpp_installed"]
    assert len({row["begins"] for row in found["rows"]}) == 1


@pytest.mark.release
@pytest.mark.usefixtures("optimized")
def test_startup_times_help_imports_and_both_first_steps(ran):
    found, _ = ran("startup", "--preset", "quickstart", "--seq-len", "32", "--rounds", "1")
    seconds = {row["what"]: row["seconds"]["median"] for row in found["rows"]}
    assert seconds["import jax"] < seconds["first step, warm"] < seconds["first step, cold"]
    assert seconds["python itself"] < seconds["--help"]


@pytest.mark.slow
def test_data_sets_the_stream_against_the_tokenizer(ran):
    flags = ("--documents", "200", "--tokenizer", "train:300", "--seq-len", "32", "--rounds", "1")
    found, _ = ran("data", *flags, "--device-tokens-per-second", "1000")
    rows = {row["stage"]: row for row in found["rows"]}
    assert rows["tokenizers.encode_batch"]["of encode_batch"]["median"] == 1
    stream = rows["stream"]
    assert positive(stream["tokens/s"])
    assert stream["of what the device eats"] == pytest.approx(stream["tokens/s"]["median"] / 1000)


@pytest.mark.release
def test_memory_samples_twelve_times_and_reads_at_the_pace(anew):
    flags = ("--documents", "200", "--tokenizer", "train:300", "--seq-len", "32", "--minutes", "0.05")
    found, _ = anew("memory", *flags, "--tokens-per-second", "5000")
    rows = found["rows"]
    assert len(rows) == 12
    assert rows[-1]["tokens"] == pytest.approx(5_000 * 3, rel=0.2)
    assert 0 < rows[-1]["resident GiB"] <= rows[-1]["at most"] < 2


@pytest.mark.release
def test_limits_bound_training_and_decoding(ran):
    found, _ = ran("limits", "--preset", "quickstart", "--tokens", "64", "--rounds", "1", "--dtypes", "float32")
    row = found["rows"][0]
    assert (row["side"], row["on"]) == ("JAX float32", "cpu")
    assert all(positive(row[f"{product}, GFLOP/s"]) for product in ("X @ W", "G @ W.T", "X.T @ G"))
    read = row["read, GB/s"]["median"] * 1e9
    assert row["decodes at most, tokens/s"] == pytest.approx(read / (3_262_208 * 4), rel=0.01)


def test_sides_on_different_devices_are_not_compared():
    ours = Outcome(rounds=[{"round": 1.0}], facts={"device": "cpu"})
    peer = Outcome(rounds=[{"round": 1.0}], facts={"device": "cuda"})
    assert peer.on(ours).failed == "it ran on cuda, the other side on cpu"
    assert ours.on(ours) is ours


@pytest.mark.release
def test_checkpoint_times_the_save_and_the_work_in_the_background(ran):
    found, _ = ran("checkpoint", "--preset", "quickstart", "--rounds", "1")
    assert {"the loop stands still", "written behind it", "verified", "restored"} < {
        row["what"] for row in found["rows"]
    }
    assert found["settings"]["bytes"] > 3 * 4 * 3_262_208


@pytest.mark.release
def test_curve_compares_the_losses_of_two_dtypes_and_another_seed(ran):
    flags = ("--preset", "quickstart", "--steps", "4", "--batch-size", "2", "--seq-len", "32")
    found, _ = ran("curve", *flags)
    assert [row["step"] for row in found["rows"]] == [1, 2, 3, 4]
    assert all(row["loss bfloat16"] and row["loss float32"] for row in found["rows"])
    bf16, f32, other = found["summary"]
    assert 0 < bf16["largest gap"] < 0.1
    assert bf16["held-out loss"] == pytest.approx(f32["held-out loss"], abs=0.1)
    assert other["run"] == "float32 seed 1"
    assert 0 < abs(bf16["held-out gap"]) < abs(other["held-out gap"])


@pytest.mark.release
def test_minutes_gives_each_variant_the_steps_of_its_time(ran):
    tiny = "--seq-len 32 --num-layers 1 --tokenizer train:300 --vocab-size 300"
    flags = ["--of", "0.001", "--rounds", "2", "--variants", f"AdamW: {tiny}", f"Muon: --optimizer muon {tiny}"]
    found, _ = ran("minutes", *flags)
    assert [(row["variant"], row["minutes"]) for row in found["rows"]] == [("AdamW", 0.001), ("Muon", 0.001)]
    for row, timed in zip(found["rows"], found["summary"], strict=True):
        assert row["steps"] == max(int(0.06 / timed["step, median s"]), 2)
        assert 0 < row["bits per byte"] < 20


def test_curve_names_the_run_that_failed(capfd):
    from benchmarks.curve import curve

    assert curve(preset="quickstart", seq_len=99_999) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("the run bfloat16 ended with exit code 2")


@pytest.mark.slow
def test_ngram_beats_a_guess(ran):
    found, _ = ran("ngram", "--orders", "1", "2")
    unigram, bigram = found["rows"]
    assert bigram["nats a token"] < unigram["nats a token"] < 8.3


def test_picture_draws_a_run_beside_ngrams(ran, tmp_path, corpus, tokenizer):
    from benchmarks.picture import picture
    from smollm_jax.config.serialization import to_dict
    from smollm_jax.config.settings import Config, DataConfig
    from smollm_jax.runtime.errors import UserError

    run, out = tmp_path / "run", tmp_path / "pictures/loss.png"
    shutil.copytree(tokenizer, run / "tokenizer")
    data = DataConfig(data=f"{corpus}/*.jsonl", tokenizer=str(tokenizer), eval_documents=20)
    (run / "config.json").write_text(json.dumps(to_dict(Config(data=data))))
    lines = [{"step": step, "loss": 6.0 - step / 10} for step in (1, 5, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="no evaluation; train with --eval-every"):
        picture(str(run), out=out)
    lines.append({"step": 10, "eval_loss": 5.0, "eval_bits_per_byte": 2.5, "eval_tokens": 100})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = ran("picture", str(run), "--out", str(out), "--orders", "1", "2")
    rows = {row["model"]: row["bits per byte"] for row in found["rows"]}
    assert rows["step 10"] == 2.5
    assert 0 < rows["2-gram"] < rows["1-gram"]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chromium-browser")), reason="no Chromium here")
def test_screenshot_photographs_a_finished_text(ran, tmp_path):
    pytest.importorskip("gradio")
    out = tmp_path / "page.png"
    found, _ = ran(
        "screenshot", str(export_model(tmp_path)), "--out", str(out), "--width", "900", "--height", "700"
    )
    assert found == {"picture": str(out)}
    size = struct.unpack(">II", out.read_bytes()[16:24])
    assert size == (900, 700)


@pytest.mark.slow
def test_gpu_files_the_results_of_its_parts_and_names_parts_without_time(ran, tmp_path):
    flags = ("--small", "--out", str(tmp_path), "--parts", "data")
    found, _ = ran("gpu", *flags)
    assert found["parts"] == {"data": "done"}
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["part"] == "data"
    assert "encode_batch" in (tmp_path / "tables.txt").read_text()
    found, _ = ran("gpu", *flags, "--minutes", "0.1", code=1)
    assert found["parts"] == {"data": "no time left"}


@pytest.mark.slow
@pytest.mark.parametrize("anew", [pytest.param(False, marks=pytest.mark.release), True])
def test_a_part_of_gpu_shares_the_compilation_cache_or_does_not_use_it(anew, tmp_path):
    import io

    from benchmarks.gpu import Part, run

    words = "benchmarks.profile --preset quickstart --seq-len 32 --steps 1"
    part, compiled = Part("profile", words, 100, compiles_anew=anew), tmp_path / "compiled"
    compiled.mkdir()
    assert run(part, tmp_path, 100, io.StringIO(), str(compiled)) == "done"
    assert any(compiled.iterdir()) != anew


def test_gpu_names_a_part_that_fails_and_one_that_takes_too_long(tmp_path):
    import io

    from benchmarks.gpu import Part, run

    talk, cache = io.StringIO(), str(tmp_path / "compiled")
    assert "exit code 2" in run(Part("wrong", "benchmarks.data --no-such-flag", 60), tmp_path, 60, talk, cache)
    assert run(Part("slow", "benchmarks.ngram", 1), tmp_path, 1, talk, cache).startswith("took longer than 1 s")
    assert "no-such-flag" in talk.getvalue()


@pytest.mark.release
def test_clients_compares_them_at_once_and_in_turn(ran):
    found, _ = ran("clients", "--layers", "1", "--dtypes", "float32", "--numbers", "2", "--slots", "2",
                   "--new-tokens", "24", "--rounds", "1", "--long-prompt", "200")  # fmt: skip
    speed, *waits, memory = found["rows"]
    assert positive(speed["at once, tokens/s"])
    assert speed["ratio"] > 0
    assert {row["text"] for row in waits} == {"alone", "beside a long prompt"}
    assert all(positive(row["wait between chunks, s"]) for row in waits)
    assert memory["memory, GiB"] > 0


@pytest.mark.release
@needs_torch
def test_race_trains_both_sides_on_the_same_rows_for_the_same_time(ran, tmp_path):
    flags = "--preset quickstart --seconds 4 --batch-size 2 --seq-len 64 --dtype float32 --form eager"
    found, _ = ran(
        "race", *flags.split(), "--tokenizer", "train:512", "--evaluations", "2", "--out", str(tmp_path / "race")
    )
    ours, peer = (next(row for row in found["rows"] if row["side"] == side) for side in ("ours", "peer"))
    assert ours["tokens"] / ours["step"] == pytest.approx(peer["tokens"] / peer["step"], rel=0.02)
    assert all(row["held-out loss"] < 6.3 for row in found["summary"]), "below the logarithm of the vocabulary"
    assert (tmp_path / "race" / "race.png").stat().st_size > 5_000


def test_prose_keeps_sentences_once(tmp_path):
    from benchmarks.prose import _read, paragraphs

    sentence = "This is a sentence of more than eight words that a person wrote."
    body = f"<p>{sentence}</p><pre>int main(void);</pre><p>{sentence}</p>"
    page = f"<html><head><title>x</title></head><body>{body}</body></html>"
    (tmp_path / "page.html").write_text(page)
    seen = set()
    blocks = _read(tmp_path / "page.html")
    assert list(paragraphs(blocks, seen)) == [sentence]
    assert list(paragraphs([sentence, "x = 1 + 2 * 3 / 4 - 5 + 6 * 7;", "Too short."], seen)) == []

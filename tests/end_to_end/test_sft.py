"""Fine-tuning on conversations, from a base model to a folder that chats, and exact after kill -9."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.serialization import from_dict
from smollm_jax.data.heldout import held_out, pack_to_score
from smollm_jax.data.loader import BatchIterator, Loader
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.hf.export import export_folder
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.runs.load import load_model
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import run_main
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.chat_template import encode_chat
from smollm_jax.tokenizer.load import load_tokenizer, train_tokenizer
from smollm_jax.training.evaluation import score_batches
from smollm_jax.training.fit import fit
from smollm_jax.training.step import create, make_nll, make_step
from smollm_jax.training.verify_resume import verify_resume
from tests.support.texts import make_talks, make_texts, write_rows

pytestmark = pytest.mark.usefixtures("settings_restored")
MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    max_seq_len=256, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model without a template, and conversations."""
    path = tmp_path_factory.mktemp("sft")
    train_tokenizer(make_texts(50), 300, chat=True).save(path / "tokenizer")
    export_folder(init_params(MODEL, 0), MODEL, path / "base", tokenizer_folder=path / "tokenizer", verify=False)
    write_rows(path / "talks.jsonl", [{"messages": talk} for talk in make_talks(120)])
    return path


def flags_of(place, run, *more):
    return [
        "--recipe", "sft", "--init-from", str(place / "base"), "--data", str(place / "talks.jsonl"),
        "--seq-len", "128", "--batch-size", "4", "--run-dir", str(place / run), "--mesh", "data=1",
        "--eval-documents", "8", "--eval-every", "4", "--log-every", "1", "--sample-tokens", "4",
        "--sample-prompts", "the cat", "--compilation-cache-dir", str(place.parent / "compiled"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(place):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm_jax.runs.metrics.say", lines.append)
        code = run_main(lambda: fit(parse(flags_of(place, "run")), StopRequest()))
    assert code == 0, lines
    return place / "run", "\n".join(lines)


def test_the_start_shows_what_is_trained_and_the_steps_are_counted_from_the_epochs(finished):
    run, told = finished
    assert "template    chatml; a turn ends with <|im_end|>, which becomes the eos" in told
    assert "112 conversations, by all data" in told
    assert "<|im_end|> ends a turn and is trained" in told
    assert "<|im_start|>assistant\n[[" in told
    config = from_dict(json.loads((run / "config.json").read_text()))
    assert f": {config.total_steps:,} steps" in told
    lines = read_metrics(run)
    assert lines[-1]["step"] == config.total_steps
    assert (config.learning_rate, config.warmup_steps) == (1e-3, config.total_steps // 10)
    data = config.data
    epochs = sum(1 for _ in iter_batches(config, run)) / config.total_steps
    assert 1 <= epochs < 1.2, data


def iter_batches(config, run):
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    endless = replace(config, run=replace(config.run, steps=10_000))
    batches = BatchIterator(Loader(endless, tokenizer, held_out(config.data, tokenizer)), None)
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return


def test_metrics_have_padding_dropped_and_the_loss_on_answers(finished):
    run, _ = finished
    lines = [line for line in read_metrics(run) if "loss" in line]
    config = from_dict(json.loads((run / "config.json").read_text()))
    batch, _ = next(iter_batches(config, run))
    assert lines[0]["padding_share"] == pytest.approx(1 - np.count_nonzero(batch.segment_ids) / batch.tokens.size)
    assert lines[0]["tokens"] == np.sum(batch.segment_ids[:, 1:] > 0)
    assert all(line["dropped_conversations"] == 0 for line in lines)
    assert all(line["packed_tokens_per_second"] > line["tokens_per_second"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert evaluations(read_metrics(run))[-1]["eval_tokens"] > 0
    assert "the cat" in (run / "samples.txt").read_text()


def test_the_held_out_loss_before_the_first_step_is_the_base_models_own(place, finished):
    run, _ = finished
    config = from_dict(json.loads((run / "config.json").read_text()))
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    nll = jax.jit(make_nll(config, make_mesh(config, jax.devices()[:1]), dtype=np.dtype("float32"), remat="none"))
    rows = pack_to_score(held_out(config.data, tokenizer), tokenizer, 128, 4, chat=True)
    score = score_batches(nll, load_model(place / "base")[1], rows)
    first, *_, last = evaluations(read_metrics(run))
    assert first["step"] == 0
    assert (first["eval_tokens"], first["eval_loss"]) == (score.tokens, pytest.approx(score.loss, rel=1e-5))
    assert last["eval_loss"] < first["eval_loss"]
    assert (run / "samples.txt").read_text().startswith("=== step 0\n")


def test_the_export_chats_as_an_instruct_model(finished):
    transformers = pytest.importorskip("transformers")
    run, _ = finished
    folder = run / "export"
    config, generation = (
        json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ids.items() <= config.items()
    assert (ids | {"do_sample": True}).items() <= generation.items()
    card = (folder / "README.md").read_text()
    assert "An instruct model" in card
    assert "'role': 'user', 'content': 'the cat'" in card
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "the cat"}]
    _, _, ours = load_model(folder)
    assert theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] == encode_chat(ours, talk)
    assert (theirs.eos_token, theirs.pad_token, ours.eos_id) == ("<|im_end|>", "<|im_end|>", 2)


def test_the_same_command_goes_on_and_another_loss_is_refused(finished, place, capfd):
    run, _ = finished
    before = (run / "metrics.jsonl").read_bytes()
    assert run_main(lambda: fit(parse(flags_of(place, "run")), StopRequest())) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    capfd.readouterr()
    assert run_main(lambda: fit(parse(flags_of(place, "run", "--loss-on", "all")), StopRequest())) == 2
    assert "data.loss_on was assistant, is all" in capfd.readouterr().err


@pytest.mark.slow
def test_the_loss_of_a_batch_is_torch_s_cross_entropy_on_the_same_rows(finished):
    torch = pytest.importorskip("torch")
    run, _ = finished
    config = from_dict(json.loads((run / "config.json").read_text()))
    batch, _ = next(iter_batches(config, run))
    params = init_params(MODEL, 1)
    model = jax.jit(SmolLM.from_params(MODEL, params))
    logits = np.asarray(model(batch.tokens[:, :-1], segment_ids=np.abs(batch.segment_ids[:, :-1])))
    labels = np.where(batch.segment_ids[:, 1:] > 0, batch.tokens[:, 1:], -100)
    starts = np.abs(batch.segment_ids[:, 1:]) != np.abs(batch.segment_ids[:, :-1])
    assert (labels[starts] == -100).all(), "a conversation begins with a target"
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).flatten(0, 1), torch.tensor(labels).flatten().long()
    )
    for parts in (1, 2):  # the weights of the whole batch divide, whatever the micro-batches
        one = replace(config, model=MODEL, compute=replace(config.compute, grad_accum=parts))
        step = jax.jit(make_step(one, None, dtype=np.float32, remat="none"))
        _, metrics = step(create(one, params), batch.tokens, batch.segment_ids)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
        assert int(metrics["targets"]) == (labels != -100).sum()


def test_a_packed_row_is_its_conversations_alone(finished):
    run, _ = finished
    config = from_dict(json.loads((run / "config.json").read_text()))
    batch, _ = next(iter_batches(config, run))
    nll = jax.jit(make_nll(config, None, dtype=np.float32, remat="none"))
    params, alone = init_params(MODEL, 1), 0.0
    tokens, segments = batch.tokens[:1], batch.segment_ids[:1]
    count = np.abs(segments).max()
    assert count > 1
    for segment in range(1, count + 1):
        inside = np.abs(segments[0]) == segment
        row, kinds = np.zeros_like(tokens), np.zeros_like(segments)
        row[0, : inside.sum()] = tokens[0, inside]
        kinds[0, : inside.sum()] = np.sign(segments[0, inside])
        alone += float(nll(params, row, kinds))
    assert math.isclose(float(nll(params, tokens, segments)), alone, rel_tol=1e-5)


@pytest.mark.slow
def test_kill_9_and_resume_are_exact_for_conversations(place, tmp_path):
    write_rows(place / "texts.jsonl", [{"text": text} for text in make_texts(60, longest=120)])
    mixed = {str(place / "talks.jsonl"): f"{place / 'talks.jsonl'}=0.8,{place / 'texts.jsonl'}=0.2"}
    flags = flags_of(place, "killed", "--shuffle-window", "16", "--steps", "24", "--shards", "2")
    result = verify_resume(parse([mixed.get(flag, flag) for flag in flags]), tmp_path, steps=20)
    assert result.exact, result.compared
    assert result.resumes >= 1


@pytest.mark.slow
@pytest.mark.release
def test_conversations_are_annealed_with_the_same_and_with_other_ones(place, finished):
    run_main(lambda: fit(parse(flags_of(place, "stopped", "--stop-after", "6")), StopRequest()))
    write_rows(place / "more.jsonl", [{"messages": talk} for talk in make_talks(60, seed=5)])
    for name, flags in (("on", []), ("afresh", ["--data", str(place / "more.jsonl")])):
        argv = [str(place / "stopped"), *"--from 6 --steps 3 --run-dir".split(), str(place / name), *flags]
        assert run_main(lambda argv=argv: command("anneal", argv, "smollm")) == 0
    ledgers = [
        {line["step"]: line["ledger"] for line in read_metrics(run) if "ledger" in line}
        for run in (finished[0], place / "on", place / "afresh")
    ]
    assert list(ledgers[1]) == list(ledgers[2]) == [7, 8, 9]
    assert ledgers[1][9] == ledgers[0][9] != ledgers[2][9]

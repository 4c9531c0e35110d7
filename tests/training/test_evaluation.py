"""Held-out figures against sums over single documents, without packed rows or batches."""

import json
import math
from itertools import islice
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from smollm_jax.cli.main import command
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.data.packing import num_targets, pack
from smollm_jax.data.sources import Document
from smollm_jax.distributed.processes import Processes
from smollm_jax.hf.export import export_folder
from smollm_jax.model.transformer import SmolLM, init_params
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.training.evaluation import HeldOutScore, evaluate_model, evaluate_run
from smollm_jax.training.run import Progress
from smollm_jax.training.summary import _held_out

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24,
    max_seq_len=64, initializer_range=0.3,
)  # fmt: skip
SEQ_LEN = 16
TEXTS = ["the cat sat on a mat", "naïve birds — café", "one old red house near our hills saw grey birds fly", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random model as a Hugging Face folder, with the tokenizer of the tests."""
    path = tmp_path_factory.mktemp("model") / "hf"
    export_folder(init_params(CONFIG, 0), CONFIG, path, tokenizer_folder=tokenizer, verify=False)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def parts(documents):
    """Documents cut where a row of SEQ_LEN + 1 tokens is full; the rest begins with the last token once more."""
    room, found = SEQ_LEN + 1, []
    for ids in documents:
        at = 0
        while at < len(ids):
            part = ids[at : at + room]
            found.append(part)
            at, room = at + len(part), room - len(part)
            if room == 0:
                at, room = at - (at < len(ids)), SEQ_LEN + 1
    return found


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Nats, targets and bytes: every token but the first of a part is a target, eos too."""
    opened, logits = Tokenizer(tokenizer), jax.jit(SmolLM.from_params(CONFIG, init_params(CONFIG, 0)))
    nats, text_bytes = 0.0, 0
    documents = [[*opened.encode(text).tolist(), opened.eos_id] for text in TEXTS]
    for ids in parts(documents):
        padded = [*ids, *[0] * (SEQ_LEN + 1 - len(ids))]  # one shape: what follows has no influence
        logits_TV = np.asarray(logits(np.asarray([padded]))[0], np.float64)
        log_z_T = np.log(np.exp(logits_TV).sum(axis=-1))
        nats += sum(log_z_T[t] - logits_TV[t, ids[t + 1]] for t in range(len(ids) - 1))
    for text, ids in zip(TEXTS, documents, strict=True):
        text_bytes += len(text.encode()) - len(opened.decode(ids[:1]).encode())
    return nats, sum(map(len, documents)) - len(documents), text_bytes


def evaluated(folder, data, **options):
    settings = DataConfig(data=str(data))
    return evaluate_model(folder, settings, seq_len=SEQ_LEN, batch_size=2, dtype="float32", **options)


def test_held_out_loss_and_bits_per_byte_are_sums_over_documents(folder, data, expected):
    nats, targets, text_bytes = expected
    found = evaluated(folder, data)
    assert (found["tokens"], found["bytes"]) == (targets, text_bytes)
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.e ** (nats / targets), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_max_batches_limits_what_is_read(folder, data, expected):
    """The first batch of two rows holds 2 x 16 positions, less one for each document begun in them."""
    whole, one = evaluated(folder, data), evaluated(folder, data, max_batches=1)
    assert one["tokens"] <= 2 * SEQ_LEN < whole["tokens"] == expected[1]
    assert one["loss"] != whole["loss"]


def test_the_command_prints_the_score_as_one_json_line(folder, data, expected, capsys):
    flags = ["evaluate", str(folder), "--data", str(data), "--seq-len", str(SEQ_LEN), "--batch-size", "2"]
    assert command(flags[0], flags[1:], "smollm") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == expected[1]
    assert found["loss"] == pytest.approx(expected[0] / expected[1], rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_evaluation_reads_as_much_whatever_the_accumulation(parts):
    """Three batches of four rows, in parts that fit the memory of a micro-batch."""
    rng, lines, rows = np.random.default_rng(0), [], []
    tokens = [rng.integers(1, 300, size=rng.integers(5, 40), dtype=np.int32) for _ in range(60)]
    documents = [(Document(str(i), "a", "a", i, {}), ids) for i, ids in enumerate(tokens)]

    def nll(_, tokens_BT1, segment_ids_BT1):
        rows.append(len(tokens_BT1))
        return np.sum(segment_ids_BT1)

    run = SimpleNamespace(
        config=Config(
            run=RunConfig(phases="9x4", sample_tokens=0), compute=ComputeConfig(grad_accum=parts),
            data=DataConfig(seq_len=SEQ_LEN, eval_batches=3),
        ),
        heldout=documents, interrupted=False, job=Processes(), stop=StopRequest(),
        progress=Progress(step=9), evaluated=0, nll=nll, state={"params": None},
        tokenizer=SimpleNamespace(byte_counts=lambda _, ids: np.ones_like(ids)),
        report=SimpleNamespace(evaluation=lambda line, _: lines.append(line)),
    )  # fmt: skip
    evaluate_run(run)
    assert (sum(rows), set(rows)) == (12, {4 // parts})
    whole = islice(pack(documents, SEQ_LEN, 4), 3)
    assert lines[0]["eval_tokens"] == sum(map(num_targets, whole))


def test_the_start_says_how_much_of_the_held_out_documents_an_evaluation_reads():
    documents = [(Document(str(i), "a", "a", i, {}), np.zeros(100, np.int32)) for i in range(50)]
    config = Config(run=RunConfig(phases="9x4"), data=DataConfig(seq_len=SEQ_LEN, eval_batches=3))
    said = _held_out(SimpleNamespace(config=config, heldout=documents))
    assert said == "50 documents, 5,000 tokens, never trained on; an evaluation reads the first 192 (4%)"
    assert _held_out(SimpleNamespace(config=config, heldout=documents[:1])).endswith("reads all")
    assert _held_out(SimpleNamespace(config=config, heldout=[])) == "none"


def test_a_score_over_nothing_is_no_division_by_zero():
    assert HeldOutScore(0.0, 0, 0).loss == 0
    assert HeldOutScore(0.0, 0, 0).bits_per_byte == 0
    assert math.isfinite(HeldOutScore(1e9, 1, 1).perplexity)

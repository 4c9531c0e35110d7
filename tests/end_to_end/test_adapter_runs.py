"""Runs that train adapters: what is kept, resumed, opened and exported."""

import math
import shutil

import jax
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.cli.main import command
from smollm_jax.config.adapters import AdapterConfig, adapter_shapes
from smollm_jax.hf.adapters import merge, open_adapters, read_adapters
from smollm_jax.hf.export import compare_merged, export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.runs.convert import export_model, export_run, import_run
from smollm_jax.runs.load import load_model
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.runtime.trees import flatten, unflatten
from smollm_jax.tokenizer.load import train_tokenizer
from smollm_jax.training.fit import fit
from tests.support.hf_folders import TINY, assert_same_bits, numpy_params
from tests.support.runs import assert_same_run
from tests.support.texts import make_pairs, make_talks, make_texts, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_restored")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two bases, texts, and a run of six steps with adapters over the first base."""
    folder = tmp_path_factory.mktemp("adapters")
    train_tokenizer(make_texts(50), TINY.vocab_size).save(folder / "tokenizer")
    for name, seed in (("base", 3), ("other", 4)):
        params = jax.tree.map(lambda x: x * 0.2, numpy_params(TINY, seed))
        export_folder(params, TINY, folder / name, tokenizer_folder=folder / "tokenizer", verify=False)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in make_texts(60)])
    assert train(folder, "run") == 0
    return folder


def train(folder, run, *more):
    flags = (
        f"--init-from {folder / 'base'} --data {folder / 'texts.jsonl'} --run-dir {folder / run} "
        "--lora-rank 4 --lora-targets q,o,up --dora --steps 6 --batch-size 4 --seq-len 32 --warmup-steps 1 "
        "--shuffle-window 8 --learning-rate 0.02 --eval-documents 5 --eval-batches 2 --sample-tokens 2 "
        "--log-every 1 --eval-every 3 --checkpoint-every 2 --dtype float32 --mesh data=1 "
        f"--compilation-cache-dir {folder.parent / 'compiled'}"
    )
    with StopRequest() as stop:
        return fit(parse([*flags.split(), *more]), stop)


def test_a_run_learns_and_its_model_is_base_and_adapters(place):
    losses = [line["eval_loss"] for line in evaluations(read_metrics(place / "run"))]
    assert losses[-1] < losses[0]
    found, adapters = read_params(place / "run" / "checkpoints")
    shapes = adapter_shapes(AdapterConfig(lora_rank=4, dora=True, lora_targets="q,o,up"), TINY)
    assert {name: leaf.shape for name, leaf in flatten(adapters, "/").items()} == shapes
    assert found.meta["base"]["path"] == str(place / "base")
    assert not any("base" in name or "embedding" in name for name in found.leaves)
    assert_same_bits(load_model(place / "run")[1], merge(read_folder(place / "base")[1], adapters, 2.0))
    export = place / "run" / "export"
    assert_same_bits(load_model(export)[1], load_model(place / "run")[1])
    read, scale = read_adapters(open_adapters(export), TINY)
    assert_same_bits(read, adapters)
    assert scale == 2.0


def test_a_stopped_run_resumes_exactly_over_a_base_that_moved(place, tmp_path):
    train(place, "pieces", "--stop-after", "3")
    with pytest.raises(UserError, match="other is another base than the adapters were trained on"):
        train(place, "pieces", "--init-from", str(place / "other"))
    with pytest.raises(UserError, match=r"adapter\.lora_rank was 4, is 3"):
        train(place, "pieces", "--lora-rank", "3")
    shutil.copytree(place / "base", tmp_path / "elsewhere")
    assert train(place, "pieces", "--init-from", str(tmp_path / "elsewhere")) == 0
    assert_same_run(place / "run", place / "pieces")
    (tmp_path / "elsewhere").rename(tmp_path / "moved")  # after the last step: no more checkpoint names the place
    with pytest.raises(UserError, match="--init-from of the run's own command"):
        load_model(place / "pieces")
    assert train(place, "pieces", "--init-from", str(tmp_path / "moved")) == 0
    assert_same_bits(load_model(place / "pieces")[1], load_model(place / "run")[1])


def test_merge_writes_a_whole_model_whose_logits_agree(place, tmp_path):
    _, checked = export_run(place / "run", tmp_path / "whole", merge=True)
    assert "logits of the merged weights differ from base and adapters by" in checked
    assert_same_bits(read_folder(tmp_path / "whole")[1], load_model(place / "run")[1])
    (_, adapters), (_, base) = read_params(place / "run" / "checkpoints"), read_folder(place / "base")
    with pytest.raises(RuntimeError, match="of the largest; at most 1e-03 is allowed"):
        compare_merged(base, adapters, 2.0, base, place / "base")
    named = {name: leaf for name, leaf in flatten(adapters, "/").items() if not name.endswith("_m")}
    tiny = unflatten({name: leaf * (1e-3 if name.endswith("_B") else 1) for name, leaf in named.items()}, "/")
    with pytest.raises(RuntimeError, match=r"the adapters change them by .*, of which rounding may cost 10%"):
        compare_merged(base, tiny, 2.0, base, place / "base")
    with pytest.raises(RuntimeError, match="give --dtype float32"):
        export_run(place / "run", tmp_path / "rounded", merge=True, dtype="bfloat16")
    assert not (tmp_path / "rounded").exists()
    with pytest.raises(UserError, match="adapters are written in float32"):
        export_run(place / "run", tmp_path / "rounded", dtype="bfloat16")


def test_a_gguf_file_has_the_adapters_merged(place, tmp_path):
    pytest.importorskip("gguf")
    file, _ = export_model(place / "run", tmp_path / "gguf", dtype="f32")
    assert_same_bits(load_model(file)[1], load_model(place / "run")[1])


def test_a_run_over_a_run_keeps_the_step_of_its_base(place, tmp_path):
    """Adapters over adapters: the base is merged, and stays the checkpoint that it was."""
    train(place, "first", "--stop-after", "2")
    train(place, "second", "--init-from", str(place / "first"), "--stop-after", "2")
    found, _ = read_params(place / "second" / "checkpoints")
    assert found.meta["base"]["step"] == 2
    before = load_model(place / "second")[1]
    export_run(place / "second", tmp_path / "peft")
    assert train(place, "first") == 0
    assert_same_bits(load_model(place / "second")[1], before)
    assert_same_bits(load_model(tmp_path / "peft")[1], before)
    (place / "first").rename(place / "gone")
    with pytest.raises(UserError, match=r"the base of the adapters cannot be opened; .*: there is no folder"):
        load_model(place / "second")


@pytest.mark.parametrize("recipe", [pytest.param("sft", marks=pytest.mark.release), "dpo"])
def test_adapters_train_on_conversations_and_on_pairs(place, recipe):
    rows = {"sft": [{"messages": talk} for talk in make_talks(40)], "dpo": make_pairs(40)}[recipe]
    write_rows(place / f"{recipe}.jsonl", rows)
    train_tokenizer(make_texts(50), 300, chat=True).save(place / "chat")
    export_folder(numpy_params(TINY), TINY, place / recipe, tokenizer_folder=place / "chat", verify=False)
    flags = (
        f"--recipe {recipe} --init-from {place / recipe} --data {place / recipe}.jsonl --seq-len 96 --steps 3 "
        f"--lora-rank 2 --dora --batch-size 4 --learning-rate 0.01 --eval-documents 4 --eval-every 3 "
        f"--log-every 1 --sample-tokens 0 --mesh data=1 --compilation-cache-dir {place.parent / 'compiled'} "
        f"--run-dir {place}/run-{recipe}"
    )
    with StopRequest() as stop:
        assert fit(parse(flags.split()), stop) == 0
    run = place / f"run-{recipe}"
    if recipe == "dpo":  # the reference is the base: adapters change nothing yet
        first = next(line for line in read_metrics(run) if "loss" in line)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "An instruct model" in (run / "export" / "README.md").read_text()
    assert (run / "export" / "chat_template.jinja").exists()
    assert_same_bits(load_model(run / "export")[1], load_model(run)[1])


def test_merge_is_for_adapters(place):
    import_run(place / "base", place / "whole_run")
    with pytest.raises(UserError, match="--merge is for runs with adapters"):
        export_run(place / "whole_run", place / "whole", merge=True)


@pytest.mark.release
def test_adapters_are_annealed_over_the_same_base_and_averaged_with_it(place, tmp_path):
    argv = [str(place / "run"), *"--from 4 --steps 3 --no-export --run-dir".split(), str(tmp_path / "annealed")]
    assert command("anneal", argv, "smollm") == 0
    bases = [read_params(run / "checkpoints")[0].meta["base"] for run in (place / "run", tmp_path / "annealed")]
    assert bases[0] == bases[1]
    paths, whole = [str(tmp_path / "annealed"), str(place / "run")], tmp_path / "whole"
    assert command("average", [*paths, "--out", str(whole), "--no-verify"], "smollm") == 0
    a, b, mean = (flatten(load_model(path)[1], "/") for path in (*paths, whole))
    for name, leaf in mean.items():
        assert (leaf == ((a[name].astype("float64") + b[name]) / 2).astype("float32")).all()

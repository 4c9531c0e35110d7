"""A run, an export and an import are one and the same model to whoever opens them."""

import json
import os
import shutil
from dataclasses import replace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from smollm_jax.checkpoint.manager import CheckpointManager, read_params
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import Config, RunConfig
from smollm_jax.hf import export as convert
from smollm_jax.hf.card import model_card
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.model.transformer import init_params
from smollm_jax.runs.about import about_run
from smollm_jax.runs.convert import export_run, import_run
from smollm_jax.runs.load import is_run, load_model, read_run, with_ids_of
from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.load import train_tokenizer
from smollm_jax.tokenizer.tokenizer import Tokenizer
from tests.support.families import tokenizer_folder

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    rope_theta=5_000.0, max_seq_len=64, eos_token_id=0,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    train_tokenizer([convert.TEXT], CONFIG.vocab_size).save(tmp_path / "tokenizer")
    params = jax.tree.map(np.asarray, init_params(CONFIG, 7))
    export_folder(params, CONFIG, tmp_path / "hf", tokenizer_folder=tmp_path / "tokenizer", verify=False)
    return tmp_path / "hf"


def test_a_home_that_the_shell_leaves_to_us_is_the_same_to_every_command(folder, tmp_path, monkeypatch):
    """As in --run-dir=~/run; a folder that is named so is still that folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    import_run(folder, "~/run")
    assert Config(run=RunConfig(run_dir="~/run")).run_dir == str(tmp_path / "home" / "run")
    assert is_run("~/run")
    assert load_model("~/run")[0].vocab_size == CONFIG.vocab_size
    export_run("~/run", "~/export", verify=False)
    assert (tmp_path / "home" / "export" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
    (tmp_path / "~" / "run").mkdir(parents=True)
    assert Config(run=RunConfig(run_dir="~/run")).run_dir == "~/run"


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_an_import_is_a_run_with_the_same_bits_architecture_and_tokenizer(folder, tmp_path):
    assert import_run(folder, tmp_path / "run") == CONFIG
    assert is_run(tmp_path / "run")
    found, params = read_params(tmp_path / "run" / "checkpoints")
    assert found.step == 0
    assert "progress" not in found.meta  # weights to begin with, no run to go on with
    assert_same_bits(params, read_folder(folder)[1])
    assert read_run(tmp_path / "run").model == CONFIG
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    for name in ("hf", "run"):
        model, again, tokenizer = load_model(tmp_path / name)
        assert model == CONFIG
        assert tokenizer.eos_id == 0
        assert_same_bits(again, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run", "tokenizer"]


def test_a_folder_goes_through_an_import_and_an_export_unchanged(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    model, params, _ = load_model(tmp_path / "run")
    export_folder(params, model, tmp_path / "out", tokenizer_folder=tmp_path / "run" / "tokenizer", verify=False)
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors"))
    for file in folder.iterdir():
        # safetensors writes the notes in its header in any order
        if file.name != "model.safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_ends_of_text_survive_an_import_and_an_export(folder, tmp_path):
    for name, ends in (("config.json", [7, 9]), ("generation_config.json", [9, 11])):
        content = json.loads((folder / name).read_text()) | {"eos_token_id": ends, "pad_token_id": 5}
        (folder / name).write_text(json.dumps(content))
    import_run(folder, tmp_path / "run")
    assert load_model(folder)[0].stop_ids == load_model(tmp_path / "run")[0].stop_ids == (7, 9, 11, 0)
    export_run(tmp_path / "run", tmp_path / "out", verify=False)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / name).read_text())
        assert (set(content["eos_token_id"]), content["pad_token_id"]) == ({7, 9, 11, 0}, 5)


def test_bos_and_eos_of_an_export_are_the_tokenizers(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder("byte fallback", tmp_path / "tokenizer"))
    model = with_ids_of(CONFIG, tokenizer)
    assert (model.bos_token_id, model.stop_ids) == (1, (2,))
    assert with_ids_of(model.ending_at([4, 2]), tokenizer).stop_ids == (2, 4)
    del tokenizer.settings["bos_token"]
    assert with_ids_of(replace(CONFIG, bos_token_id=9), tokenizer).bos_token_id == 9


def test_an_export_of_an_older_run_takes_the_ids_of_its_tokenizer(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    tokenizer_folder("words", tmp_path / "run" / "tokenizer")
    export_run(tmp_path / "run", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_special_tokens_are_read_as_the_run_was_trained_unless_told_otherwise(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    assert load_model(folder)[2].mode == load_model(tmp_path / "run")[2].mode == "text"
    assert load_model(folder, special_tokens="parse")[2].mode == "parse"
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    content["data"]["special_tokens"] = "parse"
    file.write_text(json.dumps(content))
    assert load_model(tmp_path / "run")[2].mode == "parse"
    assert load_model(tmp_path / "run", special_tokens="text")[2].mode == "text"


def test_a_context_shorter_than_a_recipes_rows_still_makes_a_run(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    assert read_run(tmp_path / "run").data.seq_len == CONFIG.max_seq_len


def test_an_import_that_fails_leaves_nothing_and_one_that_would_overwrite_is_refused(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ValueError, match="full is not empty; give another --out"):
        import_run(folder, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        import_run(folder, tmp_path / "full" / "mine")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        import_run(folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "hf", "tokenizer"]


def test_what_is_put_into_the_folder_during_an_import_stays(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()

    def write(*_):
        (out / "thesis.tex").write_text("mine")

    monkeypatch.setattr("smollm_jax.runs.convert.write_json_atomic", write)
    with pytest.raises(ValueError, match="is not empty"):
        import_run(folder, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_disk_that_fills_up_leaves_no_half_imported_run(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("smollm_jax.checkpoint.manager.store", full)
    with pytest.raises(ValueError, match=r"run could not be written: step 0: .*No space left"):
        import_run(folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "tokenizer"]


def test_a_step_is_picked_by_number_and_a_missing_one_is_named(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=5, keep_every=0)
    later = jax.tree.map(lambda p: p + 1, read_folder(folder)[1])
    checkpoints.save(3, {"params": later}, {})
    assert checkpoints.wait()
    assert_same_bits(load_model(tmp_path / "run")[1], later)
    assert_same_bits(load_model(tmp_path / "run", 0)[1], read_folder(folder)[1])
    with pytest.raises(ValueError, match="2"):
        load_model(tmp_path / "run", 2)
    with pytest.raises(ValueError, match="is not a run, so it has no step 3"):
        load_model(folder, 3)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"run": 3}', '{"model": {"vocab_size": "x"}}', '{"nix": 1}'])
def test_a_damaged_run_config_is_one_line(folder, tmp_path, content):
    import_run(folder, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json|vocab_size|nix") as caught:
        load_model(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_what_is_neither_run_nor_folder_nor_id_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run: "):
        read_run(tmp_path)


def test_a_folder_without_a_tokenizer_and_one_with_too_large_a_tokenizer_are_named(folder):
    train_tokenizer([convert.TEXT * 3 + "Sphinx of black quartz, judge my vow."], 320).save(folder)
    with pytest.raises(ValueError, match="the tokenizer has 320 entries, the model only 300"):
        load_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_model(folder)


def test_train_and_serve_start_from_an_import(folder, tmp_path):
    from smollm_jax.config.settings import Config
    from smollm_jax.generation.sampling import Sampling
    from smollm_jax.serving.completion import open_completer
    from smollm_jax.training.restore import resolve_start

    import_run(folder, tmp_path / "run")
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=1, keep_every=1)
    asked = Config(data=replace(Config().data, seq_len=CONFIG.max_seq_len))
    origin = resolve_start(asked, tmp_path / "run", checkpoints)
    assert origin.checkpoint is None
    assert origin.config.model == CONFIG
    assert_same_bits(origin.params, read_folder(folder)[1])
    texts = []
    for name in ("run", "hf"):
        pieces = open_completer(tmp_path / name).stream("The water", Sampling(max_new_tokens=8), ())
        texts.append("".join(piece.text for piece in pieces))
    assert texts[0] == texts[1]


def test_a_run_config_is_plain_json(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["hidden_size"] == 16


@pytest.mark.parametrize("name", ["merges.txt", "model.safetensors", "config.json"])
def test_an_import_copies_no_link_out_of_the_folder(folder, tmp_path, name):
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    with pytest.raises(ValueError, match=f"{name} is a link out of the folder"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_export_of_a_run_writes_nothing_into_the_run(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 2.5}\n\xff\n7\n')
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    export_run(tmp_path / "run", tmp_path / "out", verify=False)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]} == before
    assert (tmp_path / "out" / "loss.png").exists()


def test_a_run_of_a_billion_layers_is_one_line(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    values["model"]["num_layers"] = 10**9
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="1,000,000,000 layers; at most 10,000"):
        export_run(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "[" * 100_000, "cannot be read"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no entries"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(folder, tmp_path, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        import_run(folder, tmp_path / "run")


def test_a_chat_template_without_a_usable_name_is_none(folder, tmp_path):
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": [{"name": ["x"]}]}))
    import_run(folder, tmp_path / "run")
    assert load_model(tmp_path / "run")[2].chat_template is None


STATES = {"tokens": 300, "documents": 7}, {"tokens": 100, "documents": 2}


def test_the_card_of_a_run_says_what_it_learned_from_and_how(folder, tmp_path):
    import_run(folder, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text(
        '{"step": 0, "loss": 2.0, "tokens_per_second": 1234.6}\n'
        '{"step": 0, "eval_loss": 2.5, "eval_bits_per_byte": 1.25, "eval_seconds": 1}\n'
    )
    (tmp_path / "run/samples.txt").write_text(
        "=== step 0\n  The⟶ cat\n  sat | there\n  Once⟶ more\n=== step 9\n  The⟶ end\n"
    )
    values = json.loads((tmp_path / "run/config.json").read_text())
    values["data"]["data"] = "HuggingFaceTB/smollm-corpus:cosmopedia-v2=0.7,a/b.jsonl=0.3"
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    found, _ = read_params(tmp_path / "run/checkpoints")
    found.meta.update(
        {
            "progress": {"tokens": 5_000, "elapsed_seconds": 200.0},
            "cursor": {
                "step": 0,
                "tokenizer": "",
                "lanes": {"0": {"sources": list(STATES)}, "1": {"sources": list(STATES)}},
            },
            "sources": [{"revision": "c0ffee", "license": "odc-by"}, {"revision": None, "license": None}],
            "imported_from": "HuggingFaceTB/SmolLM2-135M",
            "computed": {"platform": "gpu", "device": "NVIDIA H200", "dtype": "bfloat16", "devices": 8},
        }
    )
    about = about_run(tmp_path / "run", found)
    card = model_card(CONFIG, about, dtype="float32", checked="yes", picture=None)
    for words in (
        "license: apache-2.0", "base_model: HuggingFaceTB/SmolLM2-135M", "- HuggingFaceTB/smollm-corpus\n",
        "# run\n",
        "| Tokens | 5,000 |", "| Held-out bits per byte | 1.25 |", "| Tokens per second | 1,235 |",
        "about 3 minutes",
        "    The cat\n    sat | there\n", "write('The'",
        "| Optimizer | `AdamW, betas 0.9 and 0.95, epsilon 1e-08` |", "| Peak learning rate | 0.0006 |",
        "| Schedule | `linear, 100 steps of warm-up` |", "| Weight decay | 0.01 |", "| Seed | 0 |",
        "| Computed on | `NVIDIA H200, gpu, bfloat16` |", "| Devices | 8 |",
        "| `HuggingFaceTB/smollm-corpus:cosmopedia-v2` | 75.0% | 14 | 600 | `c0ffee` | `odc-by` |",
        "| `a/b.jsonl` | 25.0% | 4 | 200 |  |  |",
    ):  # fmt: skip
        assert words in card, words
    assert "b.jsonl" not in card.partition("---\n# ")[0].partition("tags")[0]
    assert "The end" not in card
    assert about.language is None, "of b.jsonl nobody knows the language"
    values["data"]["data"] = "builtin:python-docs"
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    english = model_card(CONFIG, about_run(tmp_path / "run", found), dtype="float32", checked="", picture=None)
    assert "\nlanguage: en\n" in english
    assert "Trained on" not in english, "another number of sources than in the cursor"


@pytest.mark.parametrize("damage", [
    {"cursor": None}, {"cursor": {"lanes": [1]}}, {"cursor": {"lanes": {"0": {"sources": [1]}}}}, {"sources": [1]},
    {"cursor": {"lanes": {"0": {"sources": [{"tokens": "x", "documents": None}]}}}}, {"sources": 5},
    {"cursor": {"lanes": {"0": {"sources": [{"tokens": float("inf"), "documents": 1}]}}}},
    {"cursor": {"lanes": {}}},
])  # fmt: skip
def test_a_damaged_cursor_costs_the_card_only_its_table(folder, tmp_path, damage):
    import_run(folder, tmp_path / "run")
    found, _ = read_params(tmp_path / "run/checkpoints")
    state = {"tokens": 300, "documents": 7}
    found.meta.update({"cursor": {"lanes": {"0": {"sources": [state]}}}, "sources": [{"revision": "r"}]})
    (use,) = about_run(tmp_path / "run", found).uses
    assert (use.documents, use.tokens, use.revision, use.license) == (7, 300, "r", None)
    del state["documents"]
    assert about_run(tmp_path / "run", found).uses[0].documents is None, "as an earlier version counted"
    found.meta["sources"] = [{"revision": "a|b", "license": "x`\n\n# Heading"}]
    card = model_card(CONFIG, about_run(tmp_path / "run", found), dtype="float32", checked="", picture=None)
    assert "| `a\\|b` | `x' # Heading` |" in card, "a data set's card may hold anything"
    found.meta.update(damage)
    assert about_run(tmp_path / "run", found).uses == ()


@pytest.mark.parametrize(("lost", "told"), [
    ("checkpoints", "is a run without checkpoints; its export can be opened"),
    ("config.json", "is a run without config.json; its export can be opened"),
    ("tokenizer", "tokenizer is missing; restore it, or open"),
])  # fmt: skip
def test_a_run_that_has_lost_a_part_says_which(folder, tmp_path, lost, told):
    import_run(folder, broken := tmp_path / "run")
    (broken / "export").mkdir(exist_ok=True)
    (shutil.rmtree if (broken / lost).is_dir() else os.remove)(broken / lost)
    with pytest.raises(UserError, match=told):
        load_model(broken)


@pytest.mark.parametrize(("path", "told"), [
    ("trained/b", r"there is no folder trained/b; trained holds a$"),
    ("runs/quickstart", r"there is no folder runs/quickstart; runs holds no run$"),
    ("owner/b", "cannot be fetched from the Hub"),
])  # fmt: skip
def test_the_hub_is_not_asked_for_a_run_but_for_a_model_beside_one_of_the_same_owner(
    tmp_path, monkeypatch, path, told
):
    monkeypatch.setattr("smollm_jax.hf.reader.download_snapshot", Mock(side_effect=OSError("asked")))
    (tmp_path / "trained" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "owner" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        load_model(path)

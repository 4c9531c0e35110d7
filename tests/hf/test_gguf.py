"""GGUF: the weights and the ids come back, llama.cpp's names and keys stand in the file, damage is one line."""

import json
import random
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.main import command
from smollm_jax.hf import gguf_export
from smollm_jax.hf.card import About
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.gguf_export import export_gguf
from smollm_jax.hf.gguf_file import read_file, write_file
from smollm_jax.hf.gguf_model import DTYPES, read_gguf
from smollm_jax.hf.mapping import tensors, to_hf
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import UserError, run_main
from smollm_jax.tokenizer.tokenizer import Tokenizer
from tests.support.families import FAMILIES
from tests.support.families import tokenizer_folder as family_folder
from tests.support.gguf_files import CHATML, LLAMA, WIDE, same_ids
from tests.support.hf_folders import TINY, UNTIED, assert_same_bits, numpy_params


@pytest.fixture(scope="module")
def exported(tmp_path_factory, digits):
    """A GGUF file in f32, with its params, config and tokenizer."""
    config = replace(WIDE, bos_token_id=1, eos_token_id=2, extra_eos_token_ids=(0,), pad_token_id=2)
    params, tokenizer = numpy_params(config), Tokenizer(digits)
    out = tmp_path_factory.mktemp("gguf") / "out"
    path, _ = export_gguf(params, config, tokenizer, out, dtype="f32", about=About(title="A small/one"))
    return path, params, config, tokenizer


@pytest.mark.parametrize("config", [TINY, UNTIED, WIDE], ids=["tied", "untied", "whole blocks"])
def test_f32_gives_every_bit_back(tmp_path, tokenizer_folder, config):
    config = replace(config, bos_token_id=0, eos_token_id=0)
    params, tokenizer = numpy_params(config), Tokenizer(tokenizer_folder)
    path, checked = export_gguf(params, config, tokenizer, tmp_path / "out", dtype="f32")
    read_config, read, vocabulary = read_gguf(path)
    assert replace(read_config, initializer_range=config.initializer_range) == config
    assert_same_bits(read, params)
    assert same_ids(vocabulary, tokenizer)
    assert "equal weights" in checked


def test_a_tokenizer_with_single_digits_comes_back(exported):
    path, params, config, tokenizer = exported
    read_config, read, vocabulary = read_gguf(path)
    assert replace(read_config, initializer_range=config.initializer_range) == config
    assert_same_bits(read, params)
    assert same_ids(vocabulary, tokenizer)
    assert vocabulary.special_tokens == tokenizer.special_tokens
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.chat_template) == (1, 2, CHATML)


# relative rms error on numbers of a normal distribution
@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        ("f16", 3e-4), ("bf16", 3e-3), ("q8_0", 0.0062), ("q5_1", 0.04), ("q5_0", 0.046), ("q4_1", 0.082),
        ("q4_0", 0.09),
    ],
)  # fmt: skip
def test_other_formats_keep_their_error(tmp_path, tokenizer_folder, dtype, most):
    params = numpy_params(WIDE)
    path, checked = export_gguf(params, WIDE, Tokenizer(tokenizer_folder), tmp_path / "out", dtype=dtype)
    read = read_gguf(path)[1]
    ours, theirs = params["blocks"]["mlp"]["gate"], read["blocks"]["mlp"]["gate"]
    error = np.sqrt(np.square(theirs - ours).mean() / np.square(ours).mean())
    assert most / 4 < error < most
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == dtype.upper()
    assert kinds["token_embd.weight"] == (dtype.upper() if dtype in DTYPES[:4] else "Q8_0")
    assert kinds["output_norm.weight"] == kinds["blk.1.attn_norm.weight"] == "F32"
    assert "weights within" in checked


def test_the_keys_and_names_are_those_of_llama_cpp(exported):
    path, _, config, _ = exported
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    lists = {key: fields.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")}
    assert fields == {
        "general.architecture": "llama", "general.type": "model", "general.name": "A small/one",
        "general.basename": "A small/one", "general.size_label": "112K", "general.license": "apache-2.0",
        "general.file_type": 0, "general.quantization_version": 2, "llama.block_count": 3,
        "llama.context_length": 96, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 12345.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "llama.vocab_size": 300,
        "llama.rope.dimension_count": 16, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }  # fmt: skip
    assert lists["token_type"][:4] == [3, 3, 3, 1]
    at = lists["tokens"].index("<think>")
    assert lists["token_type"][at] == 4
    assert lists["tokens"][-1] == "[PAD299]"
    assert lists["token_type"][at + 1 :] == [5] * (299 - at)
    assert lists["merges"][0] == "h e"
    parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
    names = {f"blk.{i}.{part}.weight" for i in range(3) for part in parts}
    assert {t.name for t in reader.tensors} == names | {"token_embd.weight", "output_norm.weight"}
    assert path.name == "A-small-one-f32.gguf"
    assert config.vocab_size == 300


def test_query_and_key_have_the_rows_that_llama_cpp_turns_as_neighbours(exported):
    path, params, config, _ = exported
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for part, heads in (("q", 4), ("k", 2)):
        (tensor,) = (t for t in tensors(config) if t.name == f"model.layers.1.self_attn.{part}_proj.weight")
        ours, theirs = to_hf(params, tensor), stored[f"blk.1.attn_{part}.weight"]
        for head in range(heads):
            for i in range(8):  # Hugging Face turns row i with row i + 8
                row = head * 16
                np.testing.assert_array_equal(theirs[row + 2 * i], ours[row + i])
                np.testing.assert_array_equal(theirs[row + 2 * i + 1], ours[row + i + 8])


def test_rows_without_whole_blocks_are_f16_and_a_line_says_so(tmp_path, tokenizer_folder, capsys):
    config = replace(TINY, bos_token_id=0, eos_token_id=0)
    path, _ = export_gguf(numpy_params(config), config, Tokenizer(tokenizer_folder), tmp_path / "o", dtype="q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_output.weight"]) == ("F16", "Q4_0")
    assert (
        "q4_0 needs rows of a multiple of 32: 19 tensors with rows of 24, 40 are in f16" in capsys.readouterr().err
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "byte level"])
def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused_in_one_line(tmp_path, family):
    tokenizer = Tokenizer(family_folder(family, tmp_path / "tokenizer"))
    config = replace(WIDE, vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match="only byte-level BPE as in gpt-2 and smollm") as caught:
        export_gguf(numpy_params(config), config, tokenizer, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def change_tokenizer(folder, out, change):
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    told = json.loads((out / "tokenizer.json").read_text())
    change(told)
    (out / "tokenizer.json").write_text(json.dumps(told))
    return Tokenizer(out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "no name for the tok"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=False), "no name for the tok"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].reverse(), "no name for the tokenizer's rule"),
        (lambda t: t.update(decoder=None), "no name for the tokenizer's rule"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges=True"),
        (lambda t: t["model"].update(merges=[]), "has no merges"),
        (lambda t: t["added_tokens"][1].update(lstrip=True), "takes the spaces beside it"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "has a normalizer, NFC"),
    ],
)
def test_what_gguf_has_no_field_for_is_refused(tmp_path, digits, change, named):
    tokenizer = change_tokenizer(digits, tmp_path / "changed", change)
    with pytest.raises(UserError, match=named):
        export_gguf(numpy_params(WIDE), WIDE, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("ends", [False, True])
def test_bos_and_eos_that_the_tokenizer_adds_come_back(tmp_path, digits, ends):
    def change(told):
        parts = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        parts += [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}] if ends else []
        known = {
            text: {"id": text, "ids": [i], "tokens": [text]}
            for i, text in [(1, "<|im_start|>"), (2, "<|im_end|>")]
        }
        told["post_processor"] = {
            "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": known,
        }  # fmt: skip

    tokenizer = change_tokenizer(digits, tmp_path / "changed", change)
    config = replace(WIDE, bos_token_id=1, eos_token_id=2)
    path, _ = export_gguf(numpy_params(config), config, tokenizer, tmp_path / "out")
    fields = read_file(path).fields
    assert (fields["tokenizer.ggml.add_bos_token"], "tokenizer.ggml.add_eos_token" in fields) == (True, ends)
    ids = read_gguf(path)[2].encode("ab").tolist()
    assert ids == tokenizer.encode("ab").tolist()
    assert (ids[0], ids[-1] == 2) == (1, ends)


def test_the_export_never_takes_the_place_of_a_file_of_a_person(tmp_path, exported):
    _, params, config, tokenizer = exported
    out = tmp_path / "out"
    first, _ = export_gguf(params, config, tokenizer, out, dtype="f32")
    second, _ = export_gguf(params, config, tokenizer, out, dtype="q8_0")
    assert not first.exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(["Modelfile", "README.md", second.name])
    (out / "Modelfile").write_text("mine")
    with pytest.raises(UserError, match="Modelfile, which has changed since its export"):
        export_gguf(params, config, tokenizer, out)
    assert second.exists()
    with pytest.raises(UserError, match="is a file; give another --out"):
        export_gguf(params, config, tokenizer, second)


def test_an_export_that_reads_back_otherwise_is_rolled_back(tmp_path, exported, monkeypatch):
    _, params, config, tokenizer = exported
    out = tmp_path / "out"
    path, _ = export_gguf(params, config, tokenizer, out)
    before = path.read_bytes()
    monkeypatch.setitem(gguf_export.ERRORS, "Q4_0", 0.001)
    with pytest.raises(RuntimeError, match="reads back otherwise than it was written, as Q4_0"):
        export_gguf(params, config, tokenizer, out, dtype="q4_0")
    large = params | {"final_norm": params["final_norm"], "embedding": params["embedding"] * 1e9}
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight reads back otherwise"):
        export_gguf(large, config, tokenizer, out, dtype="f16")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def run(*argv):
    return run_main(lambda: command(argv[0], [str(word) for word in argv[1:]], "smollm"))


def test_the_commands_convert_there_and_back(tmp_path, exported, digits, capsys):
    _, params, config, _ = exported
    export_folder(params, config, tmp_path / "hf", tokenizer_folder=digits, verify=False)
    assert run("export", tmp_path / "hf", "--format", "gguf", "--dtype", "q8_0", "--out", tmp_path / "gguf") == 0
    path = tmp_path / "gguf" / "hf-q8_0.gguf"
    assert capsys.readouterr().out == f"{path}\n"
    assert run("import", path, "--out", tmp_path / "run") == 0
    assert (
        "F32 and Q8_0, 8.59 bits per weight): what the file has rounded stays rounded" in capsys.readouterr().err
    )
    found, read = read_params(tmp_path / "run" / "checkpoints")
    assert "Q8_0" in found.meta["imported_from"]
    assert_same_bits(read, read_gguf(path)[1])
    # the rounded weights are rounded to themselves
    assert run("export", tmp_path / "run", "--format", "gguf", "--dtype", "q8_0", "--out", tmp_path / "again") == 0
    assert_same_bits(read_gguf(tmp_path / "again" / "run-q8_0.gguf")[1], read)
    assert "Q8_0" in (tmp_path / "again" / "README.md").read_text()
    model, _, vocabulary = load_model(path, special_tokens="parse")
    assert (model.stop_ids, vocabulary.mode) == ((2, 0), "parse")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dtype", "q8_0"], "--format hf writes float32, bfloat16; --dtype q8_0 came"),
        (["--format", "gguf", "--dtype", "float32"], "--format gguf writes f16, f32, bf16, q8_0"),
    ],
)
def test_a_dtype_of_the_other_format_is_a_mistake(tmp_path, capsys, flags, named):
    assert run("export", tmp_path, "--out", tmp_path / "out", *flags) == 2
    assert named in capsys.readouterr().err


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run("import", exported[0], "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "GGUF files need the gguf package: pip install -c constraints.txt -e '.[gguf]'" in err
    assert err.count("\n") == 1


def rewritten(exported, path, fields=None, drop=()):
    """The file again with other fields and without some tensors."""
    held = read_file(exported[0])
    changed = {k: v for k, v in (held.fields | (fields or {})).items() if v is not ...}
    listed = [(name, one.shape, "F32") for name, one in held.tensors.items() if name not in drop]
    write_file(path, changed, listed, held.read)
    return path


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; only 'none'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; only 0"),
        ({"llama.attention.key_length": 32}, "llama.attention.key_length is 32, expected 16"),
        ({"llama.rope.dimension_count": 8}, r"tensor blk.0.attn_\w+.weight is \(\d+, \d+\), expected"),
        ({"llama.attention.head_count": 3}, "num_heads=3 must be a multiple"),
        ({"llama.block_count": ...}, "num_hidden_layers must be a whole number"),
        ({"llama.block_count": 4}, r"lacks tensor blk.3.attn_k.weight \(9 missing\)"),
        ({"llama.block_count": 2}, r"holds tensor blk.2.attn_k.weight.* \(9 such\)"),
        ({"llama.block_count": 2**31 - 1}, "from 1 to 10,000"),
        ({"llama.vocab_size": 301}, r"token_embd.weight is \(300, 64\), expected \(301, 64\)"),
        ({"tokenizer.ggml.model": "llama"}, "its tokenizer is 'llama' with the rule 'smollm'; only gpt2"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "with the rule 'llama-bpe'; only gpt2"),
        ({"tokenizer.ggml.pre": ...}, "with the rule None; only gpt2"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has 2 tokens, and 300 types"),
        ({"tokenizer.ggml.token_type": [1] * 300, "tokenizer.ggml.tokens": ["a"] * 300}, "same token twice"),
        ({"tokenizer.ggml.merges": ["a"]}, "a merge is not of two tokens"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "its vocabulary makes no tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id must be an id below vocab_size=300"),
        ({"tokenizer.ggml.unknown_token_id": 300}, "unknown_token_id is 300; there are 300 tokens"),
        ({"tokenizer.ggml.bos_token_id": "a"}, "bos_token_id must be an id"),
        ({"split.count": 2}, "split.count is 2; only 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours_to_read_is_refused_by_its_field(tmp_path, exported, fields, named):
    path = rewritten(exported, tmp_path / "x.gguf", fields)
    with pytest.raises(UserError, match=named) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_missing_tensors_are_named(tmp_path, exported):
    path = rewritten(exported, tmp_path / "x.gguf", drop=["blk.1.ffn_up.weight"])
    with pytest.raises(UserError, match=r"lacks tensor blk.1.ffn_up.weight \(1 missing\)"):
        read_gguf(path)


def test_a_damaged_file_is_one_line_and_takes_no_memory(tmp_path, exported):
    """Cut short anywhere, and with bytes changed anywhere in its header: sizes of exabytes are among them."""
    content, path, rng = exported[0].read_bytes(), tmp_path / "x.gguf", random.Random(0)
    end = content.index(b"output_norm.weight") + 40
    damaged = [content[:at] for at in (0, 3, 8, 20, 100, 5_000, end - 9, len(content) // 2, len(content) - 33)]
    for _ in range(150):
        at = rng.randrange(end)
        new = bytes(rng.choices([0, 1, 9, 127, 255], k=rng.choice([1, 8])))
        damaged.append(content[:at] + new + content[at + len(new) :])
    refused = []
    for one in damaged:
        path.write_bytes(one)
        try:
            read_gguf(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert "\n" not in "".join(refused)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """Otherwise a small file could ask for much memory."""
    path, ones = tmp_path / "x.gguf", np.ones((2, 4), np.float32)
    write_file(path, LLAMA, [("one", ones.shape, "F32"), ("two", ones.shape, "F32")], lambda _: ones)
    content = path.read_bytes()
    at = content.index(b"two") + 3 + 4 + 16 + 4
    assert content[at : at + 8] == (32).to_bytes(8, "little")
    path.write_bytes(content[:at] + bytes(8) + content[at + 8 : -32])
    with pytest.raises(UserError, match="its tensors overlap"):
        read_file(path)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q2_K", "IQ4_XS", "BF16", "MXFP4"])
def test_other_formats_of_ggml_can_be_read(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (3, 256 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    held = read_file(tmp_path / "x.gguf")
    assert held.tensors["x"].shape == (3, 256)
    np.testing.assert_array_equal(held.read("x"), gguf.dequantize(data, kind))
    assert f"{8 * size / block:.3g} bits per weight" in held.bits


def test_a_format_that_gguf_cannot_read_is_named(tmp_path):
    write_file(
        tmp_path / "x.gguf",
        LLAMA,
        [("x", (2, 4), "F32")],
        lambda _: np.ones((2, 4), "f4"),
    )
    content = (tmp_path / "x.gguf").read_bytes()
    at = content.index(b"x" + (2).to_bytes(4, "little")) + 1 + 4 + 16
    (tmp_path / "x.gguf").write_bytes(content[:at] + bytes([26]) + content[at + 1 :])  # I32
    with pytest.raises(UserError, match=r"tensor x cannot be read: .*I32"):
        read_file(tmp_path / "x.gguf").read("x")
    (tmp_path / "x.gguf").write_bytes(content[:at] + bytes([250]) + content[at + 1 :])
    with pytest.raises(UserError, match="tensor x has format 250, which"):
        read_file(tmp_path / "x.gguf")

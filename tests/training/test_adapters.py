"""Low-rank adapters: their formula, their gradients, and runs that train them."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.cli.arguments import parse
from smollm_jax.config.adapters import AdapterConfig, adapter_shapes
from smollm_jax.config.architecture import PARAMETER_DIMS
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, RunConfig
from smollm_jax.distributed.sharding import make_mesh
from smollm_jax.hf.adapters import merge, open_adapters, read_adapters
from smollm_jax.hf.export import compare_merged, export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.runs.convert import export_run
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.signals import StopRequest
from smollm_jax.runtime.trees import flatten, unflatten
from smollm_jax.tokenizer.load import train_tokenizer
from smollm_jax.training.adapters import whole_weights
from smollm_jax.training.fit import fit
from smollm_jax.training.step import init_state, make_nll, make_step
from tests.support.hf_folders import TINY, assert_same_bits, numpy_params
from tests.support.runs import assert_same_run

TEXT = "the water cycle moves water between the sea and the land, and some of it falls again as rain or snow "


def config_of(rank=3, **adapter):
    return Config(
        model=TINY,
        run=RunConfig(phases="20x4", init_from="base"),
        data=DataConfig(seq_len=12),
        compute=ComputeConfig(loss_chunk=16, dtype="float32"),
        adapter=AdapterConfig(lora_rank=rank, **adapter),
    )


def batch(rows=4, length=12):
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (rows, length + 1)).astype(np.int32)
    return tokens, np.ones_like(tokens)


def started(config):
    mesh = make_mesh(config, jax.devices()[:1])
    return mesh, init_state(config, mesh, numpy_params(TINY))


def moved(adapters, seed=1):
    """Adapters that change the weights: B is zero at the start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.05, x.shape), np.float32), adapters)


@pytest.mark.parametrize("dora", [False, True])
def test_at_the_start_adapters_change_nothing(dora):
    config = config_of(dora=dora)
    mesh, state = started(config)
    nll = make_nll(config, dtype=jnp.float32, remat="none")
    plain = jax.jit(nll)(numpy_params(TINY), *batch())
    with_adapters = jax.jit(nll)(state["params"], *batch(), base=state["base"])
    np.testing.assert_allclose(with_adapters, plain, rtol=1e-6)
    whole = flatten(whole_weights(config, state, mesh), "/")
    for name, leaf in flatten(numpy_params(TINY), "/").items():
        np.testing.assert_allclose(whole[name], leaf, rtol=2e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_gradients_of_a_and_b_are_those_of_the_merged_weight(remat):
    """With G the gradient of W + s·A·B: dA = s·G·Bᵀ and dB = s·Aᵀ·G."""
    config = config_of(lora_alpha=5.0)
    _, state = started(config)
    adapters, base = moved(state["params"]), numpy_params(TINY)
    nll, scale = make_nll(config, dtype=jnp.float32, remat=remat), 5.0 / 3
    found = flatten(jax.jit(jax.grad(nll))(adapters, *batch(), base=base), "/")
    of_merged = flatten(jax.jit(jax.grad(nll))(merge(base, adapters, scale), *batch()), "/")
    named, inputs = flatten(adapters, "/"), {"blocks/attention/o": 2}
    for path in config.adapter.targets:
        A, B, G = named[f"{path}_A"], named[f"{path}_B"], np.asarray(of_merged[path])
        rows = int(np.prod(G.shape[1 : 1 + inputs.get(path, 1)]))
        A2, B2, G2 = A.reshape(len(A), rows, 3), B.reshape(len(B), 3, -1), G.reshape(len(G), rows, -1)
        expected = scale * G2 @ B2.swapaxes(1, 2), scale * A2.swapaxes(1, 2) @ G2
        for part, value in zip("AB", expected, strict=True):
            ours = np.asarray(found[f"{path}_{part}"]).reshape(value.shape)
            np.testing.assert_allclose(ours, value, rtol=2e-4, atol=1e-4 * np.abs(value).max())


def test_dora_is_its_formula_and_the_norm_is_a_constant_of_the_gradient():
    config = config_of(dora=True, lora_targets="o,down")
    _, state = started(config)
    adapters, base = moved(state["params"]), numpy_params(TINY)
    scale = config.adapter.scale
    named, weights = flatten(adapters, "/"), flatten(base, "/")
    path = "blocks/attention/o"

    def formula(adapters, norms):
        merged = dict(weights)
        for name, letters in ((path, "lnhr,lrd->lnhd"), ("blocks/mlp/down", "lfr,lrd->lfd")):
            whole = weights[name] + scale * jnp.einsum(letters, adapters[f"{name}_A"], adapters[f"{name}_B"])
            norm = jnp.sqrt(jnp.sum(whole**2, axis=tuple(range(1, whole.ndim - 1)), keepdims=True))
            ours = adapters[f"{name}_m"].reshape(norm.shape)
            merged[name] = ours * whole / (norm if norms is None else norms[name])
        return unflatten(merged, "/")

    ours = flatten(merge(base, adapters, scale), "/")
    np.testing.assert_allclose(ours[path], flatten(formula(named, None), "/")[path], rtol=1e-5)
    norms = {}
    for name, letters in ((path, "lnhr,lrd->lnhd"), ("blocks/mlp/down", "lfr,lrd->lfd")):
        whole = weights[name] + scale * np.einsum(letters, named[f"{name}_A"], named[f"{name}_B"])
        norms[name] = np.sqrt(np.sum(whole**2, axis=tuple(range(1, whole.ndim - 1)), keepdims=True))
    nll = make_nll(config, dtype=jnp.float32, remat="none")
    found = flatten(jax.jit(jax.grad(nll))(adapters, *batch(), base=base), "/")
    expected = jax.jit(jax.grad(lambda named: nll(formula(named, norms), *batch())))(named)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())


def test_a_step_trains_adapters_alone():
    config = config_of(rank=2, dora=True, lora_targets="q,v")
    mesh, state = started(config)
    step = jax.jit(make_step(config, mesh, dtype=jnp.float32, remat="none"))
    after = state
    for _ in range(2):  # A has no gradient while B is zero
        after, _ = step(after, *batch())
    assert_same_bits(state["base"], after["base"])
    shapes = {name: leaf.shape for name, leaf in flatten(after["params"], "/").items()}
    assert shapes == adapter_shapes(config.adapter, TINY)
    assert {name.split("/")[-1] for name in shapes} == {"q_A", "q_B", "q_m", "v_A", "v_B", "v_m"}
    for before, now in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(after["params"]), strict=True):
        assert not np.array_equal(before, now)


def test_the_base_is_held_in_the_compute_dtype():
    config = config_of()
    config = replace(config, compute=replace(config.compute, dtype="bfloat16"))
    mesh, state = started(config)
    assert state["base"]["blocks"]["attention"]["q"].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))
    _, metrics = jax.jit(make_step(config, mesh, dtype=jnp.bfloat16, remat="none"))(state, *batch())
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["grad_norm"] > 0
    assert set(PARAMETER_DIMS) > set(config.adapter.targets)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--lora-rank 4 --lora-targets q,embedding",
            "lora_targets='embedding': expected some of q, k, v",
        ),
        ("--lora-rank 4 --lora-targets q,q", "names a matrix twice"),
        ("--dora", "dora=True is for adapters: give --lora-rank"),
        ("--lora-alpha 4", "lora_alpha=4.0 is for adapters: give --lora-rank"),
        ("--recipe quickstart --lora-rank 4", "lora_rank=4 needs the weights of a base: give --init-from"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    base = [] if "quickstart" in flags else ["--init-from", "base"]
    with pytest.raises(UserError, match=message):
        parse([*flags.split(), *base])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, texts, and a run of six steps with adapters on it."""
    folder = tmp_path_factory.mktemp("adapters")
    train_tokenizer([TEXT], TINY.vocab_size).save(folder / "tokenizer")
    params = jax.tree.map(lambda x: x * 0.2, numpy_params(TINY, 3))
    for name, seed in (("base", 3), ("other", 4)):
        params = jax.tree.map(lambda x: x * 0.2, numpy_params(TINY, seed))
        export_folder(params, TINY, folder / name, tokenizer_folder=folder / "tokenizer", verify=False)
    rows = [json.dumps({"text": f"{i} {TEXT * (1 + i % 3)}"}) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(rows))
    train(folder, "run")
    return folder


def without(words, more):
    """The flags and values that `more` does not give anew. `--dora` has no value."""
    pairs = [(w, words[i + 1]) for i, w in enumerate(words) if w.startswith("--") and w != "--dora"]
    kept = [word for pair in pairs if pair[0] not in more for word in pair]
    return kept + ([] if "--no-dora" in more else ["--dora"])


def train(folder, run, *more):
    words = (
        f"--init-from {folder / 'base'} --data {folder / 'texts.jsonl'} --run-dir {folder / run} "
        "--lora-rank 4 --dora --steps 6 --batch-size 4 --seq-len 32 --warmup-steps 1 --shuffle-window 8 "
        "--learning-rate 0.02 --eval-documents 5 --eval-batches 2 --sample-tokens 2 --log-every 1 --eval-every 3 "
        "--checkpoint-every 2 --dtype float32"
    ).split()
    with StopRequest() as stop:
        return fit(parse([*without(words, more), *more]), stop)


def test_a_run_learns_and_its_model_is_base_and_adapters(trained):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]
    found, adapters = read_params(trained / "run" / "checkpoints")
    assert set(flatten(adapters, "/")) == set(adapter_shapes(AdapterConfig(lora_rank=4, dora=True), TINY))
    assert found.meta["base"]["path"] == str(trained / "base")
    assert not any(name.startswith("base") for name in found.leaves)
    _, params, _ = load_model(trained / "run")
    _, base = read_folder(trained / "base")
    assert_same_bits(params, merge(base, adapters, 2.0))


def test_the_export_is_a_folder_of_adapters_that_opens_with_its_base(trained):
    folder = trained / "run" / "export"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_dora"]) == (4, 8.0, True)
    assert_same_bits(load_model(folder)[1], load_model(trained / "run")[1])
    _, adapters = read_params(trained / "run" / "checkpoints")
    read, scale = read_adapters(open_adapters(folder), TINY)
    assert_same_bits(read, adapters)
    assert scale == 2.0


def test_a_stopped_run_resumes_exactly_and_finds_its_base_again(trained):
    train(trained, "pieces", "--stop-after", "3")
    train(trained, "pieces")
    assert_same_run(trained / "run", trained / "pieces")


def test_a_base_that_moved_is_found_where_the_flag_says(trained, tmp_path):
    train(trained, "moved", "--stop-after", "2")
    shutil.copytree(trained / "base", tmp_path / "elsewhere")
    assert train(trained, "moved", "--init-from", str(tmp_path / "elsewhere")) == 0
    assert_same_run(trained / "run", trained / "moved")


def test_another_base_is_refused(trained, tmp_path):
    train(trained, "another", "--stop-after", "2")
    with pytest.raises(UserError, match="other is another base than the adapters were trained on"):
        train(trained, "another", "--init-from", str(trained / "other"))
    folder = shutil.copytree(trained / "run" / "export", tmp_path / "adapters")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(trained / "other")})
    )
    with pytest.raises(UserError, match="other is another base than the adapters were trained on"):
        load_model(folder)


def test_merge_writes_a_whole_model_whose_logits_agree(trained, tmp_path):
    _, checked = export_run(trained / "run", tmp_path / "whole", merge=True)
    assert "logits of the merged weights differ from base and adapters by" in checked
    assert_same_bits(read_folder(tmp_path / "whole")[1], load_model(trained / "run")[1])


def test_merge_refuses_weights_that_do_not_agree(trained, tmp_path):
    _, adapters = read_params(trained / "run" / "checkpoints")
    _, base = read_folder(trained / "base")
    with pytest.raises(RuntimeError, match="of the largest; at most 1e-03 is allowed"):
        compare_merged(base, adapters, 2.0, base, trained / "base")
    with pytest.raises(RuntimeError, match="give --dtype float32"):
        export_run(trained / "run", tmp_path / "rounded", merge=True, dtype="bfloat16")
    assert not (tmp_path / "rounded").exists()


def test_merge_is_for_adapters(trained, tmp_path):
    train(trained, "full", "--lora-rank", "0", "--no-dora", "--steps", "2")
    with pytest.raises(UserError, match="--merge is for runs with adapters"):
        export_run(trained / "full", tmp_path / "whole", merge=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; LORA can be read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": 0}, "says r=0; expected a number above 0"),
        ({"r": 5}, r"expected shape \(5, 24\) from the base, got \(4, 24\)"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused(trained, tmp_path, change, message):
    folder = shutil.copytree(trained / "run" / "export", tmp_path / "adapters")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        load_model(folder)

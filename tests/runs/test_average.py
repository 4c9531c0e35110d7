"""Means of models: the arithmetic, and what has none."""

from dataclasses import replace

import numpy as np
import pytest

from smollm_jax.cli.arguments import parse_command
from smollm_jax.cli.average import average
from smollm_jax.hf.export import export_folder
from smollm_jax.runs.average import averaged, on_circle
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import UserError
from smollm_jax.runtime.trees import flatten
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.hf_folders import TINY, assert_same_bits, numpy_params
from tests.support.texts import make_texts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: three models, one of another context, one with another tokenizer."""
    place = tmp_path_factory.mktemp("models")
    train_tokenizer(make_texts(50), TINY.vocab_size).save(place / "tokenizer")
    train_tokenizer(make_texts(50, seed=9), TINY.vocab_size).save(place / "other-tokenizer")
    for name, seed, config, tokenizer in (
        ("a", 0, TINY, "tokenizer"),
        ("b", 1, TINY, "tokenizer"),
        ("c", 2, TINY, "tokenizer"),
        ("longer", 1, replace(TINY, rope_theta=5e5), "tokenizer"),
        ("words", 1, TINY, "other-tokenizer"),
    ):
        params = numpy_params(config, seed)
        export_folder(params, config, place / name, tokenizer_folder=place / tokenizer, verify=False)
    return place


def of(models, names):
    return [str(models / name) for name in names]


def test_the_mean_is_taken_in_float64_and_rounded_once(models):
    seen = []
    _, params, _ = averaged(of(models, "abc"), [1, 2, 4], lambda name, *_: seen.append(name))
    parts = [flatten(numpy_params(TINY, seed), "/") for seed in (0, 1, 2)]
    for name, leaf in flatten(params, "/").items():
        exact = sum(w * part[name].astype(np.float64) for w, part in zip((1, 2, 4), parts, strict=True)) / 7
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf.astype(np.float64), exact, rtol=2**-24)  # of one rounding
    assert seen == of(models, "abc")
    _, same, _ = averaged(of(models, "aaa"), [1, 1, 1], lambda *_: None)
    assert_same_bits(same, numpy_params(TINY, 0))


def test_slerp_goes_along_the_great_circle_of_each_layer():
    x, y = np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [np.cos(0.5), np.sin(0.5)]])
    for t in (0.0, 0.3, 1.0):
        turned = [[3 * np.cos(t * np.pi / 2), 3 * np.sin(t * np.pi / 2)], [np.cos(t * 0.5), np.sin(t * 0.5)]]
        np.testing.assert_allclose(on_circle("blocks/mlp/up", x, y, t), turned, atol=1e-12)
    whole = on_circle("embedding", x, y, 0.5)  # one vector: one angle for all of it
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(whole, (x + y) / (2 * np.cos(np.arccos(cosine) / 2)), atol=1e-12)
    np.testing.assert_allclose(on_circle("head", x, 2 * x, 0.25), 1.25 * x)  # parallel: the line
    np.testing.assert_allclose(on_circle("head", x, np.zeros_like(x), 0.25), 0.75 * x)
    np.testing.assert_allclose(on_circle("head", x, -x, 0.25), 0.5 * x)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("a longer", "have other architectures, so no average: rope_theta 12345.0 and 500000.0"),
        ("a words", "have other tokenizers"),
        ("a", "give one run with --last K, or several paths without it"),
        ("a b --last 2", "give one run with --last K"),
        ("a --last 2", "--last 2 is for one run; .*a is none"),
        ("a b --weights 1", "--weights: 1 for 2 models"),
        ("a b --weights 1 0", "--weights must be above 0"),
        ("a b c --slerp 0.5", "--slerp is the point between two models"),
        ("a b --slerp 2", r"--slerp 2.0 must be in \[0, 1\]"),
        ("a nowhere", "nowhere"),
    ],
)
def test_what_has_no_average_is_one_line(models, tmp_path, argv, words):
    names = [str(models / x) if x.isalpha() else x for x in argv.split()]
    call = parse_command(average, [*names, "--out", str(tmp_path / "out")], "smollm average")
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_without_a_run_are_averaged_and_a_line_says_that_nothing_is_scored(models, tmp_path, capsys):
    out = str(tmp_path / "out")
    call = parse_command(
        average, [*of(models, "ab"), "--slerp", "0.3", "--out", out, "--no-verify"], "smollm average"
    )
    assert call() == 0
    written, said = capsys.readouterr()
    assert written == f"{out}\n"
    assert "no rows to score on: no path is a run" in said
    a, b = (flatten(numpy_params(TINY, seed), "/") for seed in (0, 1))
    model, params, _ = load_model(out)
    assert model.rope_theta == TINY.rope_theta
    for name, leaf in flatten(params, "/").items():
        np.testing.assert_array_equal(leaf, on_circle(name, a[name], b[name], 0.3).astype(np.float32))
    assert "slerp 0.3" in (tmp_path / "out" / "README.md").read_text()

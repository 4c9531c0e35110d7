"""Adapters against PEFT, the library whose folders they are."""

import jax
import numpy as np
import pytest

from smollm_jax.config.adapters import AdapterConfig, adapter_shapes
from smollm_jax.hf.adapters import merge, open_adapters, read_adapters, weights_sha256, write_adapters
from smollm_jax.hf.export import TEXT, export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.model.transformer import Adapters, SmolLM
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.trees import unflatten
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.hf_folders import TINY, numpy_params

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 20))
CASES = [
    {"lora_rank": 4},
    {"lora_rank": 3, "lora_alpha": 5.0, "lora_targets": "q,v"},
    {"lora_rank": 4, "dora": True},
    {"lora_rank": 2, "dora": True, "lora_targets": "o,down"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer([TEXT], TINY.vocab_size).save(folder / "tokenizer")
    params = numpy_params(TINY)
    export_folder(params, TINY, folder / "base", tokenizer_folder=folder / "tokenizer", verify=False)
    return folder / "base"


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def llama(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_our_logits(base, tmp_path, case):
    config, rng = AdapterConfig(**case), np.random.default_rng(1)
    shapes = adapter_shapes(config, TINY)
    adapters = unflatten({n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()}, "/")
    _, params = read_folder(base)
    record = {"path": str(base), "sha256": weights_sha256(params)}
    write_adapters(tmp_path, adapters, config, TINY, base=record)
    theirs = torch_logits(peft.PeftModel.from_pretrained(llama(base), str(tmp_path)))

    @jax.jit
    def ours(params, adapters):
        model = SmolLM.from_params(TINY, params)
        return model.features(TOKENS, adapters=Adapters(adapters, config.scale)) @ model.head_VD.T

    np.testing.assert_allclose(ours(params, adapters), theirs, atol=2e-5 * np.abs(theirs).max())
    read, scale = read_adapters(open_adapters(tmp_path), TINY)
    whole = jax.jit(lambda params: SmolLM.from_params(TINY, params)(TOKENS))(merge(params, read, scale))
    np.testing.assert_allclose(whole, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_pefts_folder_opens_as_a_model_with_its_logits(base, tmp_path, kind):
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM", **kind,
    )  # fmt: skip
    model = peft.get_peft_model(llama(base), settings)
    model.save_pretrained(tmp_path)
    model.peft_config["default"].base_model_name_or_path = str(base)
    config, params, _ = load_model(tmp_path)
    ours = jax.jit(lambda params: SmolLM.from_params(config, params)(TOKENS))(params)
    theirs = torch_logits(model)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())

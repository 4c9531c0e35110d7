"""Ids, masks and the losses of 20 steps against TRL's SFTTrainer, where TRL is installed."""

import logging

import jax
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.data.best_fit import BestFitPacker
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.model.transformer import init_params
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import encode_turns, render_turns
from smollm_jax.training.step import create, make_step
from tests.support.texts import chat_tokenizer, make_talks

trl = pytest.importorskip("trl")
STEPS, BATCH, SEQ_LEN = 20, 4, 127
MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    max_seq_len=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def trained_by_trl(folder, talks, out):
    """The tokenized data and the loss of each step, in the order of the data."""
    import datasets
    import torch
    import transformers

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TAGGED
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = trl.SFTConfig(
        output_dir=str(out), assistant_only_loss=True, packing=False, max_length=SEQ_LEN + 1, max_steps=STEPS,
        per_device_train_batch_size=BATCH, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, bf16=False, fp16=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
        eos_token="<|im_end|>",
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"messages": talk} for talk in talks])
    trainer = InOrder(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return list(trainer.train_dataset), losses


@pytest.mark.slow
def test_ids_masks_and_losses_are_those_of_trl(tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chat_tokenizer().save(tmp_path / "tokenizer")
    folder = tmp_path / "base"
    export_folder(init_params(MODEL, 0), MODEL, folder, tokenizer_folder=tmp_path / "tokenizer", verify=False)
    talks = make_talks(STEPS * BATCH, longest=3)
    rows, theirs = trained_by_trl(folder, talks, tmp_path / "out")
    tokenizer = Tokenizer(folder)
    encoded = encode_turns(tokenizer, [render_turns(tokenizer, talk, loss_on="assistant") for talk in talks])
    assert [one.ids.tolist() for one in encoded] == [row["input_ids"] for row in rows]
    assert [one.trained.astype(int).tolist() for one in encoded] == [row["assistant_masks"] for row in rows]
    config = Config(
        model=MODEL, data=DataConfig(data_kind="chat", seq_len=SEQ_LEN), compute=ComputeConfig(),
        run=RunConfig(phases=f"{STEPS}x{BATCH}"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0, beta2=0.999, clip_norm=1.0
        ),
    )  # fmt: skip
    _, params = read_folder(folder)
    state, step = create(config, params), jax.jit(make_step(config, None, dtype=np.float32, remat="none"))
    ours = []
    for first in range(0, len(talks), BATCH):
        rows_of_one = []
        for one in encoded[first : first + BATCH]:
            packer = BestFitPacker(SEQ_LEN)
            packer.add(0, np.where(one.trained, one.ids, ~one.ids))
            rows_of_one.append(packer.batch(1))
        tokens, segments = (
            np.concatenate([getattr(row, name) for row in rows_of_one]) for name in ("tokens", "segment_ids")
        )
        state, metrics = step(state, tokens, segments)
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1] < ours[0]

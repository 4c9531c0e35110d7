"""Ids, masks and losses against TRL's SFTTrainer and DPOTrainer, where TRL is installed."""

import logging

import jax
import numpy as np
import pytest

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.preference import FIGURES, PreferenceConfig
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig
from smollm_jax.data.best_fit import BestFitPacker, ids_of
from smollm_jax.data.chat import encode_to_fit
from smollm_jax.data.conversations import conversation_of
from smollm_jax.data.documents import Document
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.reader import read_folder
from smollm_jax.model.transformer import init_params
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import encode_turns, render_turns
from smollm_jax.training.step import create, make_logprobs, make_step
from tests.support.texts import chat_tokenizer, make_pairs, make_talks

trl = pytest.importorskip("trl")
STEPS, BATCH, SEQ_LEN = 20, 4, 127
# no pad_token_id: transformers gives the embedding of such a token no gradient where it is read, and pad is eos
MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    max_seq_len=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
UNENDED = (  # TRL trains on all that the template writes after a prompt: here nothing after an end of turn
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def trained_by_trl(trainer_class, settings_class, folder, template, rows, **changes):
    """The tokenized data and the log line of each step, in the order of the data."""
    import datasets
    import torch
    import transformers

    class InOrder(trainer_class):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = settings_class(
        output_dir=str(folder.parent / "out"), max_length=SEQ_LEN + 1, max_steps=len(rows) // BATCH,
        per_device_train_batch_size=BATCH, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, bf16=False, fp16=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, **changes,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trainer = InOrder(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return list(trainer.train_dataset), [line for line in trainer.state.log_history if "loss" in line]


def config_of(kind, steps, **changes):
    return Config(
        model=MODEL, data=DataConfig(data_kind=kind, seq_len=SEQ_LEN), compute=ComputeConfig(),
        run=RunConfig(phases=f"{steps}x{BATCH}"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0, beta2=0.999, clip_norm=1.0
        ),
        **changes,
    )  # fmt: skip


def batches_of(documents):
    """Batches of rows that hold one document each."""
    for first in range(0, len(documents), BATCH):
        rows = []
        for tokens in documents[first : first + BATCH]:
            packer = BestFitPacker(SEQ_LEN)
            packer.add(0, tokens)
            rows.append(packer.batch(1))
        yield tuple(np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "segment_ids"))


@pytest.fixture
def base(tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chat_tokenizer().save(tmp_path / "tokenizer")
    folder = tmp_path / "base"
    export_folder(init_params(MODEL, 0), MODEL, folder, tokenizer_folder=tmp_path / "tokenizer", verify=False)
    return folder


@pytest.mark.slow
def test_ids_masks_and_losses_of_conversations_are_those_of_trl(base):
    talks = make_talks(STEPS * BATCH, longest=3)
    rows, theirs = trained_by_trl(
        trl.SFTTrainer, trl.SFTConfig, base, TAGGED, [{"messages": talk} for talk in talks],
        assistant_only_loss=True, packing=False, eos_token="<|im_end|>",
    )  # fmt: skip
    tokenizer = Tokenizer(base)
    encoded = encode_turns(tokenizer, [render_turns(tokenizer, talk, loss_on="assistant") for talk in talks])
    assert [one.ids.tolist() for one in encoded] == [row["input_ids"] for row in rows]
    assert [one.trained.astype(int).tolist() for one in encoded] == [
        [int(label != -100) for label in row["labels"]] for row in rows
    ]
    config, (_, params) = config_of("chat", STEPS), read_folder(base)
    state, step = create(config, params), jax.jit(make_step(config, None, dtype=np.float32, remat="none"))
    ours = []
    for batch in batches_of([np.where(one.trained, one.ids, ~one.ids) for one in encoded]):
        state, metrics = step(state, *batch)
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, [line["loss"] for line in theirs], atol=1e-4)
    assert ours[-1] < ours[0]


@pytest.mark.slow
@pytest.mark.parametrize("pair_loss", ["sigmoid", "ipo", "apo_zero"])
def test_ids_losses_and_figures_of_pairs_are_those_of_trl(base, pair_loss):
    steps, beta = 10, 0.3
    different = [x for x in make_pairs(160, longest=3) if x["chosen"] != x["rejected"] and len(x["chosen"]) < 4]
    pairs = different[: steps * BATCH]
    rows, theirs = trained_by_trl(
        trl.DPOTrainer, trl.DPOConfig, base, UNENDED, pairs, beta=beta, loss_type=pair_loss
    )
    (base / "chat_template.jinja").write_text(UNENDED)
    config = config_of("pairs", steps, preference=PreferenceConfig(beta=beta, pair_loss=pair_loss))
    documents = [Document("", "", "", 0, {}, conversation=conversation_of(pair)) for pair in pairs]
    tokens = [tokens for tokens, _ in encode_to_fit(documents, Tokenizer(base), config.data)]
    expected = [[*row["prompt_ids"], *row["chosen_ids"], *row["prompt_ids"], *row["rejected_ids"]] for row in rows]
    assert [ids_of(one).tolist() for one in tokens] == expected
    assert [int((one >= 0).sum()) for one in tokens] == [
        len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows
    ]
    _, params = read_folder(base)
    logprobs = jax.jit(make_logprobs(config, None, dtype=np.float32))
    state, step = create(config, params), jax.jit(make_step(config, None, dtype=np.float32, remat="none"))
    for batch, line in zip(batches_of(tokens), theirs, strict=True):
        state, metrics = step(state, *batch, logprobs(state["params"], *batch), logprobs(params, *batch))
        names = {"loss", "grad_norm", "logps/chosen", "logps/rejected"}
        # TRL's rewards of ipo are of sums, its loss and ours are of means
        names |= set() if pair_loss == "ipo" else set(FIGURES)
        for name in names:
            assert float(metrics[name]) == pytest.approx(line[name], rel=1e-4, abs=1e-4), (name, line)
    assert abs(theirs[-1]["rewards/margins"]) > 0.01

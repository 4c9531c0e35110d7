"""Define the recipes: complete settings of the runs this project is for."""

from dataclasses import replace

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.settings import Config, DataConfig, OptimizerConfig, RunConfig

DOCS_PROMPTS = ("Return the", "The following example", "If the argument is", "A class is")
QUESTIONS = ("What is the capital of France?", "Write a sentence about the sea.", "How do I boil an egg?")
RECIPES = {
    "replica": Config(),
    "smollm2": Config(
        recipe="smollm2",
        run=RunConfig(phases="2000000x512", seed=8, scale_residual_init=True),
        # SmolLM2's mixture is not published. These are SmolLM's shares of what the Hub holds as text:
        # python-edu lists only where its files are, and the StackOverflow part is not there
        data=DataConfig(
            data="HuggingFaceTB/smollm-corpus:fineweb-edu-dedup=0.70,"
            "HuggingFaceTB/smollm-corpus:cosmopedia-v2=0.15,open-web-math/open-web-math=0.06"
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="wsd"),
        # pre-trained at these two. The released 100,000 and 8,192 come from a later stage
        model=replace(ModelConfig(), rope_theta=10_000.0, max_seq_len=2_048),
    ),
    # What learned fastest at 130M in the fair comparison of arXiv 2509.02046 (C4, 20 tokens a parameter): Muon,
    # batches of 0.5 million tokens, no warm-up, linear decay over the whole run. Its rate of 0.016 is for updates
    # whose RMS is 1 / sqrt(width), which makes 3.3e-3 for ours of RMS 0.2. AdamW had 3.2e-3 beside it. Weight
    # decay is 0.1 times either rate there, so 0.48 times ours for the matrices. Not tried here at this size
    "fast": Config(
        recipe="fast",
        run=RunConfig(phases="5150x256"),
        data=DataConfig(
            data="HuggingFaceTB/smollm-corpus:fineweb-edu-dedup=0.70,"
            "HuggingFaceTB/smollm-corpus:cosmopedia-v2=0.15,open-web-math/open-web-math=0.06"
        ),
        optimizer=OptimizerConfig(
            optimizer="muon",
            learning_rate=3.3e-3,
            schedule="linear",
            beta1=0.8,
            beta2=0.98,
            weight_decay=0.1,
            muon_weight_decay=0.48,
        ),
    ),
    "quickstart": Config(
        recipe="quickstart",
        preset="quickstart",
        run=RunConfig(
            phases="1600x4", log_every=50, eval_every=400, checkpoint_every=400, sample_prompts=DOCS_PROMPTS
        ),
        data=DataConfig(data="builtin:python-docs", tokenizer="train:4096", seq_len=256, eval_batches=64),
        # AdamW with a cosine decay ended at 1.82 bits per byte. Weight decay, because the text is read three times
        optimizer=OptimizerConfig(optimizer="muon", learning_rate=3e-3, weight_decay=0.1),
        model=MODELS["quickstart"],
    ),
    # alignment-handbook, recipes/smollm2/sft. 128 conversations a step are about 16 full rows of 8,192 tokens, and
    # two epochs about 0.9 billion tokens; other data is counted
    "sft": Config(
        recipe="sft",
        run=RunConfig(
            phases="6900x16",
            seed=42,
            init_from="HuggingFaceTB/SmolLM2-135M",
            eval_every=200,
            eval_on_start=True,
            checkpoint_every=200,
            sample_prompts=QUESTIONS,
        ),
        data=DataConfig(
            data_kind="chat",
            data="HuggingFaceTB/smol-smoltalk",
            seq_len=8_192,
            epochs=2,
            eval_batches=64,
        ),
        optimizer=OptimizerConfig(learning_rate=None, schedule="cosine", beta2=0.999, weight_decay=0.0),
    ),
    # alignment-handbook, recipes/smollm2/dpo: answers of up to 1,024 tokens, 128 pairs a step, two epochs of the
    # 61,135 pairs. A row holds about two pairs; other data is counted
    "dpo": Config(
        recipe="dpo",
        run=RunConfig(
            phases="955x64",
            seed=42,
            init_from="runs/sft",
            eval_every=100,
            eval_on_start=True,
            checkpoint_every=100,
            sample_prompts=QUESTIONS,
        ),
        data=DataConfig(
            data_kind="pairs",
            data="HuggingFaceH4/ultrafeedback_binarized",
            split="train_prefs",
            seq_len=2_048,
            epochs=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", beta2=0.999, weight_decay=0.0),
    ),
}

"""A tiny model in a folder, and `serve.py` over it as a process of its own, for the tests of the server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf import export as convert
from smollm_jax.model.transformer import init_params
from smollm_jax.tokenizer.load import train_tokenizer
from tests.support.paths import ROOT

# small, yet slow enough a token that a text of a few thousand can be stopped on its way
CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=16,
    intermediate_size=64, max_seq_len=8_192, rope_theta=10_000.0, initializer_range=0.2, eos_token_id=301,
)  # fmt: skip
TEXTS = ["Once upon a time there was a crab. 🦀 Größe, naïve, 水の循環.", "The water cycle moves water."] * 8
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(base: Path) -> Path:
    """A tokenizer folder with two special tokens (300, 301) and a template."""
    train_tokenizer(TEXTS, 300).save(base)
    settings = json.loads((base / "tokenizer.json").read_text())
    for i, token in enumerate(("<|im_start|>", "<|im_end|>"), start=300):
        settings["added_tokens"].append({"id": i, "content": token, "single_word": False, "lstrip": False,
                                         "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(settings))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return base


def export_model(base: Path, *, ends: bool = False, config: ModelConfig = CONFIG) -> Path:
    """An exported folder of a random chat model that hardly ever ends a text by itself, or after every token."""
    params = init_params(config, 3)
    # eos and the ids without a token lie against all the others: their logits stay low
    params["embedding"] = params["embedding"].at[300:].multiply(0.01)
    if ends:  # a constant feature, of which the end of a text has the most
        params["embedding"] = params["embedding"].at[:300, 0].set(4.0).at[301, 0].set(12.0)
        for block, name in (("attention", "o"), ("mlp", "down")):
            params["blocks"][block][name] = params["blocks"][block][name].at[..., 0].set(0.0)
    convert.export_folder(
        params, config, base / "tiny", tokenizer_folder=chat_tokenizer(base / "tokenizer"), verify=False
    )
    return base / "tiny"


class Server:
    """`python serve.py` on a free port of this machine."""

    def __init__(self, path: Path, *flags: str):
        self.log = path.parent / f"server-{time.monotonic_ns()}.log"
        command = [sys.executable, str(ROOT / "serve.py"), str(path), "--port", "0", *flags]
        self.cache = self.log.with_suffix(".cache")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(self.cache),
            "ALL_PROXY": "socks5://127.0.0.1:1",  # which httpx refuses: a local server needs no proxy
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.url = (self.process.stdout.readline() if self.process.stdout else "").strip()
        assert self.url.startswith("http"), self.log.read_text()

    def close(self) -> int:
        """Ask it to end; the exit code."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

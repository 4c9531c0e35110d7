"""SmolLM2 in JAX: pre-train it, continue it, convert it both ways, and generate with it.

    run = smollm_jax.train(recipe="quickstart")
    print(smollm_jax.load(run).generate("Return the", temperature=0.7))   # a run, a folder or a Hub id
    smollm_jax.serve(run)                                                 # the page

    model = smollm_jax.load_hf("HuggingFaceTB/SmolLM2-135M")              # a SmolLM: token ids and logits
    logits_BTV = model(tokens_BT)
    smollm_jax.save_hf(model, "folder")

A name loads when it is first used, so that `--help` does not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from smollm_jax.api import Model, Run, Server, load, serve, train
    from smollm_jax.config.architecture import ModelConfig
    from smollm_jax.generation.generator import generate
    from smollm_jax.hf.export import load_hf, save_hf
    from smollm_jax.model.transformer import SmolLM
    from smollm_jax.runtime.errors import UserError

__all__ = [
    "Model", "ModelConfig", "Run", "Server", "SmolLM", "UserError", "generate", "load", "load_hf", "save_hf",
    "serve", "train",
]  # fmt: skip

_HOMES = {
    "Model": "api",
    "Run": "api",
    "Server": "api",
    "UserError": "runtime.errors",
    "load": "api",
    "serve": "api",
    "train": "api",
    "ModelConfig": "config.architecture",
    "SmolLM": "model.transformer",
    "generate": "generation.generator",
    "load_hf": "hf.export",
    "save_hf": "hf.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""SmolLM2 in JAX: pre-train it, continue it, convert it both ways, and generate with it.

    model = smollm_jax.load_hf("HuggingFaceTB/SmolLM2-135M")   # a SmolLM
    logits_BTV = model(tokens_BT)
    smollm_jax.save_hf(model, "folder")

The map, in the order of imports. Settings: config, config_file, arguments, huge_pages. Mathematics:
plain_attention, attention, fused_attention, products, residuals, lookup, model, loss, ledger, kernels, step;
gpu_attention, gpu_layer, gpu_loss and gpu_decode for GPUs. Devices: hardware, sharding; stop, watch, processes,
launchers. Documents to batches: tokenizer, python_docs, rows, remote, sources, windows, packing, ahead, heldout,
data. What is kept: run_folder, inventory, array_files, checkpoint. Generation: sampling, decoder, generation,
completion, torch_engine. Hugging Face: layout, hf_folder, convert, card, hub, loading, publish. A run: report,
resume, origin, start, introduction, evaluate, examination, train, together; looked back at by replay and verify;
ahead of it, on devices that are not here, target, collectives, roofline, plan, plan_report. The page: worker,
chat, writer, page, api.
Names load when they are first asked for, so that `--help` need not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smollm_jax.config import ModelConfig
    from smollm_jax.convert import load_hf, save_hf
    from smollm_jax.generation import generate
    from smollm_jax.model import SmolLM

__all__ = ["ModelConfig", "SmolLM", "generate", "load_hf", "save_hf"]

_HOMES = {
    "ModelConfig": "config",
    "SmolLM": "model",
    "generate": "generation",
    "load_hf": "convert",
    "save_hf": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

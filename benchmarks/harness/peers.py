"""The peers of the comparisons: Hugging Face Llama + PyTorch, which trains and generates, and llama.cpp."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.sides import Ready, repeated
from benchmarks.harness.workload import Dtype, Prompts, StepWork, ready_to_decode

Form = Literal["eager", "compile", "max-autotune"]
Cache = Literal["dynamic", "static"]
Kind = Literal["f32", "f16", "q8_0"]  # of llama.cpp's weights


def torch_device() -> str:
    """Return the device PyTorch computes on; float32 products are then done in float32."""
    import torch

    torch.set_float32_matmul_precision("highest")
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait(device: str) -> Callable[[], Any]:
    """Return a function that waits for the work started on `device`."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def torch_peak(device: str) -> Callable[[], int | None]:
    """Return a function that gives the peak bytes allocated on `device`; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated if device == "cuda" else lambda: None


def torch_training(work: StepWork, form: Form, folder: Path) -> Ready:
    """Make the PyTorch train step ready, with the weights in `folder` and the rows of `work`."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # our side compiles without a cache too
    import torch

    device = torch_device()
    (step, _, _), wait = train_step(work, form, device, folder), torch_wait(device)
    tokens = torch.tensor(work.rows()[0], device=device).long()
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    wait()
    began = time.perf_counter()
    loss = step(ids, labels).item()
    wait()
    facts = {"first step": time.perf_counter() - began, "loss": loss, "device": device}
    return Ready(repeated(lambda: step(ids, labels), work.steps, lambda _: wait()), facts, torch_peak(device))


def train_step(work: StepWork, form: Form, device: str, folder: Path) -> tuple[Callable[..., Any], Any, Any]:
    """Return the step as PyTorch users write it for speed, compiled with its loss, its AdamW, and its model."""
    import torch
    from transformers import AttentionInterface, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    # rows of one document each need only a causal mask; compiled, transformers would give SDPA a mask of all
    # pairs of tokens, which makes it slow
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    settings = work.config.optimizer
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("causal")
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=work.config.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )

    def loss_of(ids: Any, labels: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    if form != "eager":
        mode = "max-autotune-no-cudagraphs" if form == "max-autotune" else None
        loss_of = torch.compile(loss_of, dynamic=False, mode=mode)

    def step(ids: Any, labels: Any) -> Any:
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, optimizer, model


def hf_generate(work: Prompts, dtype: Dtype, cache: Cache) -> Ready:
    """Make `generate` of Hugging Face ready with one of its caches."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch_device()
    model = AutoModelForCausalLM.from_pretrained(work.folder / "hf", dtype=getattr(torch, dtype)).eval().to(device)
    ids = torch.tensor(work.prompts(), device=device)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}

    def generate(n: int) -> list[list[int]]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **settings
        )
        return out[:, work.prompt_tokens :].tolist()

    return ready_to_decode(work, generate, {"device": device}, torch_peak(device))


def llama_cpp(work: Prompts, kind: Kind) -> Ready:
    """Make llama.cpp ready for one row, on the CPU's cores unless the package was built for a GPU."""
    from llama_cpp import Llama

    prompt = work.prompts()[0]
    model = Llama(
        str(work.folder / f"{kind}.gguf"),
        n_gpu_layers=-1,
        n_threads=os.cpu_count(),
        n_ctx=work.prompt_tokens + work.new_tokens,
        verbose=False,
    )

    def generate(n: int) -> list[list[int]]:
        model.reset()
        stream = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return [[next(stream) for _ in range(n)]]

    return ready_to_decode(work, generate)

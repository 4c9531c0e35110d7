"""Write an export's model card: the model, its training data, its use."""

import re
from dataclasses import dataclass, field
from typing import Any

from smollm_jax.config.architecture import ModelConfig

BASE = "A base model: it continues text and follows no instructions."
INSTRUCT = "An instruct model: it was fine-tuned on conversations, and answers through its chat template."
ADAPTERS = " This folder holds adapters alone, which change the weights of their base."
PREFERRED = (
    "An instruct model: direct preference optimization trained it on pairs of a chosen and a rejected answer. "
    "It answers through its chat template."
)
LICENSE = "apache-2.0"  # of SmolLM2. Edit the card if other terms apply
PLACE = "PATH"  # of the folder, until it is pushed
# https://huggingface.co/docs/huggingface_hub: letters, digits, "-", "_" and "." on both sides of the slash
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class DataUse:
    """What a model was trained on from one source. A number or word that nobody knows is None."""

    source: str
    documents: int | None
    tokens: int
    revision: str | None
    license: str | None


@dataclass(frozen=True)
class About:
    """The facts that a card tells beside the architecture. All may be unknown."""

    title: str = "A SmolLM2-class model"
    rows: dict[str, Any] = field(default_factory=dict)
    """Facts by label; None leaves one out."""
    datasets: tuple[str, ...] = ()
    """Hub ids of what it was trained on."""
    uses: tuple[DataUse, ...] = ()
    uses_title: str = "Trained on"
    scores: dict[str, float] = field(default_factory=dict)
    """Scores on tasks, by names such as hellaswag/acc_norm."""
    base_model: str | None = None
    """Hub id of the weights it began with."""
    language: str | None = None
    """Code of the language of its data, such as en."""
    prompt: str = "Once upon a time"
    sample: str = ""
    """What it wrote after the prompt."""
    chat: bool = False
    """Whether it was fine-tuned on conversations."""
    pairs: bool = False
    """Whether the conversations were pairs of answers."""


def model_card(
    config: ModelConfig, about: About, *, dtype: str, checked: str, picture: str | None, gguf: str | None = None,
    adapter: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Return Markdown with the front matter that the Hub reads. `gguf` is the file's name if it is a GGUF file.

    `adapter` is adapter_config.json if the folder holds adapters alone.
    """
    rows = {"Parameters": f"{config.num_parameters:,}", "File dtype": dtype} | _adapter_rows(adapter)
    rows |= {label: _cell(value) for label, value in about.rows.items() if value is not None}
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    library = "llama.cpp" if gguf else "peft" if adapter else "transformers"
    kind = PREFERRED if about.pairs else INSTRUCT if about.chat else BASE
    parts = [
        f"---\n{_front_matter(about, library)}\n---",
        f"# {' '.join(about.title.split())}",
        f"Trained with smollm-jax. {kind}{ADAPTERS if adapter else ''}",
        f"| | |\n|---|---|\n{table}",
        *([_sources_table(about.uses, about.uses_title)] if about.uses else []),
        *([f"![loss]({picture})"] if picture else []),
        _use_gguf(gguf) if gguf else _use_peft(adapter, about) if adapter else _use_transformers(about),
        *([f"A sample from the end of the training:\n\n{_quoted(_sample(about))}"] if about.sample else []),
        f"Check at export: {checked}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(about: About, library: str) -> str:
    """Return the YAML that the Hub reads, by huggingface_hub. Scores are there for its leaderboard widgets."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for name, score in about.scores.items():
        task, _, metric = name.rpartition("/")
        results.append(EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=metric,
            metric_value=score,
        ))  # fmt: skip
    data = ModelCardData(
        license=LICENSE, library_name=library, pipeline_tag="text-generation", language=about.language,
        base_model=about.base_model, datasets=list(about.datasets) or None,
        tags=["llama", "smollm", "jax", *(["lora"] if library == "peft" else [])],
        model_name=about.title if results else None, eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml(line_break="\n")


def _sources_table(uses: tuple[DataUse, ...], title: str) -> str:
    total = max(sum(use.tokens for use in uses), 1)
    rows = [
        [_cell(use.source), f"{use.tokens / total:.1%}", _count(use.documents), f"{use.tokens:,}",
         *("" if word is None else _cell(word) for word in (use.revision, use.license))]
        for use in uses
    ]  # fmt: skip
    head = [title, "Share", "Documents", "Tokens", "Revision", "License"]
    marks = ["---", "---:", "---:", "---:", "---", "---"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _call(about: About, stop: str = "") -> str:
    if not about.chat:
        return f'write({about.prompt!r}, max_new_tokens=64{stop})[0]["generated_text"]'
    messages = [{"role": "user", "content": about.prompt}]
    return f'write({messages!r}, max_new_tokens=128{stop})[0]["generated_text"][-1]["content"]'


def _sample(about: About) -> str:
    between = "\n\n" if about.chat else ""  # a question and its answer
    return f"{about.prompt}{between}{about.sample}"


def _use_transformers(about: About) -> str:
    return f"""```python
from transformers import pipeline

write = pipeline("text-generation", "{PLACE}")
print({_call(about)})
```"""


def _adapter_rows(adapter: dict[str, Any] | None) -> dict[str, str]:
    if adapter is None:
        return {}
    kind = "DoRA" if adapter["use_dora"] else "LoRA"
    sizes = f"{kind}, rank {adapter['r']}, alpha {adapter['lora_alpha']:g}"
    matrices = ", ".join(adapter["target_modules"])
    return {"Adapters": f"{sizes}, on {matrices}", "Base": _cell(adapter["base_model_name_or_path"])}


def _use_peft(adapter: dict[str, Any], about: About) -> str:
    stop = ", eos_token_id=write.tokenizer.eos_token_id"  # PEFT keeps the base's, which ends no turn
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base = AutoModelForCausalLM.from_pretrained({adapter["base_model_name_or_path"]!r})
model = PeftModel.from_pretrained(base, "{PLACE}")
write = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained("{PLACE}"))
print({_call(about, stop)})
```"""


def _use_gguf(file: str) -> str:
    return f"""```bash
llama-server -m {file}
ollama create my-model -f Modelfile && ollama run my-model
```"""


def _cell(value: Any) -> str:
    if isinstance(value, str):
        # a bar or a line's end would end the cell, a backtick the code
        return "`" + " ".join(value.replace("|", "\\|").replace("`", "'").split()) + "`"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _quoted(text: str) -> str:
    """Return a text as an indented block, in which no sign is Markdown's."""
    return "\n".join(f"    {line}" for line in text.splitlines())

"""The model card (README.md) of an exported folder, filled from the facts of its run."""

from __future__ import annotations

from typing import Any

from smollm_jax.config.architecture import ModelConfig


def model_card(config: ModelConfig, facts: dict[str, Any], *, dtype: str, checked: str, curve: bool) -> str:
    """Return Markdown with the front matter that the Hub reads; `facts` by label, left out if None."""
    rows = {"Parameters": f"{config.num_parameters:,}", "File dtype": dtype}
    rows |= {label: _cell(value) for label, value in facts.items() if value is not None}
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    picture = "\n![loss](loss.png)\n" if curve else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- smollm
- jax
---

# A SmolLM2-class model

Trained with smollm-jax. A base model: it continues text and follows no instructions.

| | |
|---|---|
{table}
{picture}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))
```

Check at export: {checked}.
"""


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return "`" + value.replace("|", "\\|") + "`"  # a bar would end the cell
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

"""Local copies of the data sets of the suite smollm2: few rows in the form of the real ones.

`datasets` takes a folder OWNER/NAME below the current one for the data set of that name on the Hub. A README names
the parts of a data set, as it does there.
"""

from tests.support.texts import write_rows

LETTERS = ["A", "B", "C", "D", "E"]


def choices(count):
    return {"text": [f"answer {i} is long" for i in range(count)], "label": LETTERS[:count]}


ARC = [
    {"id": f"q{i}", "question": f"Which model reads text {i}?", "choices": choices(4), "answerKey": LETTERS[i % 4]}
    for i in range(4)
]
ROWS = {
    ("Rowan/hellaswag", "default", "validation"): [
        {
            "activity_label": "Reading", "ctx_a": f"A model [header] reads row {i} [title] fast.",
            "ctx_b": "the row", "label": str(i % 4),
            "endings": ["ends [step] here.", "learns what comes next.", "sees text", "is a row"],
        }
        for i in range(4)
    ],
    ("allenai/ai2_arc", "ARC-Easy", "test"): ARC,
    ("allenai/ai2_arc", "ARC-Challenge", "test"): ARC[:3],
    ("baber/piqa", "default", "validation"): [
        {"goal": f"learn row {i}", "sol1": "read the text", "sol2": "the the the", "label": i % 2}
        for i in range(4)
    ],
    ("cais/mmlu", "all", "test"): [
        {"question": f"What is {i}?", "subject": "high_school_physics", "choices": list("abcd"), "answer": i}
        for i in range(4)
    ],
    ("tau/commonsense_qa", "default", "validation"): [
        {"question": f"Where is row {i}?", "choices": choices(5), "answerKey": LETTERS[i]} for i in range(4)
    ],
    ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"): [
        {"question": f"Who reads row {i}?", "answer": {"aliases": ["a model", "the model"], "value": "a model"}}
        for i in range(2)
    ],
    ("allenai/winogrande", "winogrande_xl", "validation"): [
        {"sentence": f"The row {i} and the text: _ is long.", "option1": "row", "option2": "text", "answer": "1"}
        for i in range(4)
    ],
    ("allenai/openbookqa", "main", "test"): [
        {"question_stem": f"A model learns row {i} by", "choices": choices(4), "answerKey": " B"} for i in range(4)
    ],
    ("openai/gsm8k", "main", "train"): [
        {"question": f"What is {i} and one?", "answer": f"One more.\n#### {i + 1}"} for i in range(8)
    ],
    ("openai/gsm8k", "main", "test"): [{"question": "What is 1 and 1?", "answer": "Two.\n#### 2"}],
}  # fmt: skip


def make_copies(folder):
    """Write all data sets below a folder."""
    parts = {}
    for (name, part, split), rows in ROWS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = f"{part}-{split}.jsonl"
        write_rows(folder / name / file, rows)
        parts.setdefault(name, {}).setdefault(part, []).append((split, file))
    for name, files in parts.items():
        lines = ["---", "configs:"]
        for part, splits in files.items():
            lines += [f"- config_name: {part}", "  data_files:"]
            lines += [f"  - split: {split}\n    path: {file}" for split, file in splits]
        (folder / name / "README.md").write_text("\n".join([*lines, "---", ""]))

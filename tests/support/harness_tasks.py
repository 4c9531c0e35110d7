"""Local tasks for lm-evaluation-harness, of the four kinds of requests: JSON lines, and a YAML file for each."""

import random

from tests.support.texts import WORDS, write_rows

QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/quiz.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GAP = """
task: gap
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/gap.jsonl}}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{sentence.split('_')[0]}}}}"
doc_to_choice: "{{{{[options[0] + sentence.split('_')[1], options[1] + sentence.split('_')[1]]}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
BOOK = """
task: book
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/book.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
STORY = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/story.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: rest
generation_kwargs: {{until: ["t", "\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"quiz": QUIZ, "gap": GAP, "book": BOOK, "story": STORY}


def make_tasks(folder, *, docs=12, seed=0, words=WORDS, longest=30):
    """Write the tasks to a folder. Returns their files, separated by commas, as --tasks takes them."""
    rng = random.Random(seed)

    def some(most, least=1):
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    rows = {
        # a question may leave no room in the context, or be empty of words, or end with spaces
        "quiz": [
            {"question": some(longest), "choices": [some(5) for _ in range(4)], "answer": i % 4}
            for i in range(docs)
        ],
        "gap": [
            {"sentence": f"{some(6)} _ {some(4)}", "options": [some(2), some(2)], "answer": i % 2}
            for i in range(docs)
        ],
        "book": [{"text": f"{some(4 * longest)}.\n\n{some(longest)}"} for _ in range(max(docs // 4, 2))],
        "story": [{"text": some(longest), "rest": some(3)} for _ in range(max(docs // 2, 2))],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, yaml in TASKS.items():
        write_rows(folder / f"{name}.jsonl", rows[name])
        (folder / f"{name}.yaml").write_text(yaml.format(folder=folder))
    return ",".join(str(folder / f"{name}.yaml") for name in TASKS)

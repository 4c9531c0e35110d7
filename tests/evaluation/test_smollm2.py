"""The suite smollm2 asks what the published evaluation asked, and its table has the published figures."""

import pytest

from smollm_jax.evaluation.published import MODELS, PUBLISHED, beside_published
from smollm_jax.evaluation.tasks import load_tasks
from tests.support.benchmark_copies import make_copies

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'smollm-jax[eval]'")


@pytest.fixture(scope="module")
def first_requests(tmp_path_factory):
    """The arguments of the first document's requests, by task, from local copies of the data sets."""
    folder = tmp_path_factory.mktemp("copies")
    make_copies(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tasks = load_tasks("smollm2")["tasks"]
    found = {}
    for name, task in tasks.items():
        task.set_fewshot_seed(seed=1)
        task.build_all_requests(limit=1)
        found[name.removeprefix("smollm2_")] = [instance.args for instance in task.instances]
    return found


ANSWERS = [f" answer {i} is long" for i in range(5)]
# as in huggingface/smollm, text/evaluation/tasks.py, and in lighteval's prompts that it uses
EXPECTED = {
    "hellaswag": (
        "Reading: A model reads row 0. fast. The row ",
        [" ends here.", " learns what comes next.", " sees text", " is a row"],
    ),
    "arc_easy": ("Question: Which model reads text 0?\nAnswer:", ANSWERS[:4]),
    "arc_challenge": ("Question: Which model reads text 0?\nAnswer:", ANSWERS[:4]),
    "piqa": ("Question: learn row 0\nAnswer:", [" read the text", " the the the"]),
    "mmlu": (
        "The following are questions about high school physics.\nQuestion: What is 0?\nAnswer:",
        [" a", " b", " c", " d"],
    ),
    "commonsense_qa": ("Where is row 0?", ANSWERS),
    "winogrande": ("The row 0 and the text: ", ["row is long.", "text is long."]),
    "openbookqa": ("A model learns row 0 by", ANSWERS[:4]),
}


@pytest.mark.parametrize("task", EXPECTED)
def test_a_question_is_put_as_in_the_published_evaluation(first_requests, task):
    question, answers = EXPECTED[task]
    assert first_requests[task] == [(question, answer) for answer in answers]


def test_texts_are_asked_for_as_in_the_published_evaluation(first_requests):
    ((prompt, settings),) = first_requests["trivia_qa"]
    assert prompt == "Question: Who reads row 0?\nAnswer:"
    assert settings["max_gen_toks"] == 20
    ((prompt, settings),) = first_requests["gsm8k"]
    assert prompt.endswith("\n\nQuestion: What is 1 and 1?\nAnswer:")
    assert prompt.count("Question:") == 6, "five examples before the question"
    assert prompt.count("One more.\n#### ") == 5, "with their reasoning"
    assert settings["max_gen_toks"] == 256


def test_the_table_has_the_published_figures_beside_ours():
    scores = {"smollm2_piqa/acc_norm": 0.684, "smollm2_piqa/acc_norm_stderr": 0.0108, "piqa/acc_norm": 0.1}
    head, _, row = beside_published(scores).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "%", "this model", *(f"SmolLM2-{name}" for name in MODELS),
    ]  # fmt: skip
    assert row == "| piqa | 68.4 ± 1.1 | 68.4 | 71.7 | 77.6 | 66.3 | 70.8 | 74.4 |"
    assert beside_published({"piqa/acc_norm": 0.1}) == ""
    assert all(len(figures) == len(MODELS) for _, figures in PUBLISHED.values())

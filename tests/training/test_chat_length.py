"""The length of a run on conversations."""

from smollm_jax.cli.arguments import parse
from smollm_jax.training.chat import estimated_steps, follows_epochs


def config_of(*flags):
    return parse(["--recipe", "sft", *flags])


def test_epochs_batch_and_rows_give_the_steps_on_the_recipes_own_data():
    small = ("--seq-len", "2048", "--batch-size", "4")
    flags = ((), ("--epochs", "1"), ("--epochs", "4"), ("--batch-size", "32"), small)
    assert [estimated_steps(config_of(*one)) for one in flags] == [6_900, 3_450, 13_800, 3_450, 110_400]


def test_given_steps_and_phases_are_the_length():
    assert follows_epochs(config_of())
    assert follows_epochs(config_of("--data", "chats.jsonl"))
    for flags in (("--steps", "9"), ("--phases", "9000x16"), ("--epochs", "0")):
        assert not follows_epochs(config_of(*flags))
    assert not follows_epochs(parse(["--recipe", "quickstart"]))

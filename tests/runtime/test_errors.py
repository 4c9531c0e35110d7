"""What is said on a terminal."""

from smollm_jax.runtime.errors import UserError, run_main


def test_nobody_moves_the_cursor_of_a_terminal(capsys):
    def main():
        raise UserError("no folder named a\x1b[2J\x9b\x7fb, Größe 水")

    assert run_main(main) == 2
    assert capsys.readouterr().err == "error: no folder named a\\x1b[2J\\x9b\\x7fb, Größe 水\n"

"""One line for what the environment and the machine refuse, and a traceback for a fault of ours only."""

import errno
import io
import os
import resource
import subprocess
import sys

import pytest

from smollm_jax.runtime import errors
from smollm_jax.runtime.devices import use_compilation_cache
from smollm_jax.runtime.errors import EXIT_STOPPED, UserError, run_main
from smollm_jax.runtime.files import expand_home, written_aside
from tests.support.paths import ROOT


def lines_of(capsys, main, code):
    assert run_main(main) == code
    return capsys.readouterr().err.splitlines()


def raises(error):
    def main():
        raise error

    return main


def test_a_fault_of_ours_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert lines_of(capsys, raises(KeyError("x")), 1)[0] == "Traceback (most recent call last):"


def of_a_slider():
    import gradio

    gradio.Slider(5, 1)


def of_a_setting():
    import jax

    jax.config.update("jax_platforms", 5)


@pytest.mark.parametrize("main", [of_a_slider, of_a_setting])
def test_a_fault_of_ours_in_a_library_blames_no_variable(capsys, monkeypatch, main):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert lines_of(capsys, main, 1)[0] == "Traceback (most recent call last):"


def of_httpx():
    import httpx

    httpx.Client()


def of_jax_config():
    from jax._src.config import bool_env

    bool_env("JAX_DEBUG_NANS", default=False)


def of_tempfile():
    import tempfile

    tempfile._get_default_tempdir()


@pytest.mark.parametrize(
    ("main", "variables", "words"),
    [
        (of_httpx, {"ALL_PROXY": "socks9://user:secret@127.0.0.1:1"}, "check ALL_PROXY=socks9://***@127.0.0.1:1"),
        (of_httpx, {"https_proxy": "nonsense://x"}, "check https_proxy=nonsense://x"),
        (of_httpx, {"SSL_CERT_FILE": "/nowhere.pem"}, "check SSL_CERT_FILE=/nowhere.pem"),
        (of_jax_config, {"JAX_DEBUG_NANS": "maybe"}, "check JAX_DEBUG_NANS=maybe"),
    ],
)
def test_a_variable_that_a_library_refuses_is_named_in_one_line(capsys, monkeypatch, main, variables, words):
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("SSL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (line,) = lines_of(capsys, main, 2)
    assert line.endswith(f"; {words} in the environment")
    assert "secret" not in line


def test_a_variable_that_would_change_results_is_not_followed(capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    assert run_main(lambda: int("JAX_ENABLE_X64" in os.environ)) == 0
    assert "JAX_ENABLE_X64=1 of the environment is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.ENAMETOOLONG, errno.EMFILE])
def test_what_the_machine_refuses_is_one_line_that_names_the_file(capsys, tmp_path, number):
    def of_python():
        with written_aside(tmp_path / "a.json"):
            raise OSError(number, os.strerror(number))

    def of_rust():
        with written_aside(tmp_path / "a.json"):
            raise Exception(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    for main in (of_python, of_rust):
        assert lines_of(capsys, main, 1) == [f"error: {tmp_path}/a.json: {os.strerror(number)}"]


def test_a_full_disk_below_a_library_in_rust_names_the_folder(capsys, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    def main():
        with written_aside(tmp_path / "export") as part:
            part.mkdir()
            save_file({"x": np.zeros(10_000)}, part / "model.safetensors")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        assert lines_of(capsys, main, 1) == [f"error: {tmp_path}/export: File too large"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_memory_is_one_line(capsys):
    assert lines_of(capsys, raises(MemoryError("Unable to allocate 9 EiB")), 1) == [
        "error: out of memory: Unable to allocate 9 EiB"
    ]


def test_what_a_terminal_would_obey_is_escaped(capsys):
    error = UserError("a\x1b[31m\nb\udcff.jsonl \u4e2d\u202e cannot be read")
    assert lines_of(capsys, raises(error), 2) == [
        r"error: a\x1b[31m b\udcff.jsonl \u4e2d\u202e cannot be read".replace(r"\u4e2d", "\u4e2d")
    ]


RESULT = """
import sys
from smollm_jax.runtime.errors import run_main, say
def main():
    say("log")
    print("caf\xe9 \u4e2d")
    return 0
sys.exit(run_main(main))
"""


@pytest.fixture
def result_of(tmp_path):
    def run(**options):
        (tmp_path / "result.py").write_text(RESULT)
        command = [sys.executable, str(tmp_path / "result.py")]
        return subprocess.run(command, check=False, **{"stderr": subprocess.PIPE} | options)

    return run


def test_a_full_disk_behind_stdout_is_named(result_of):
    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            done = result_of(stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
        assert (done.returncode, done.stderr) == (1, b"log\nerror: stdout: No space left on device\n")


def test_a_log_that_nobody_takes_changes_no_result(result_of):
    with open("/dev/full", "w") as full:
        done = result_of(stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout.decode()) == (0, "caf\xe9 \u4e2d\n")
    for closed in ("2>&-", ">&-", "<&- >&- 2>&-"):
        shell = ["sh", "-c", f"exec {sys.executable} -c '{RESULT}' {closed}"]
        assert subprocess.run(shell, capture_output=True, check=False).returncode == 0, closed


def test_a_result_of_another_alphabet_than_the_locale_is_escaped(result_of):
    done = result_of(stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 \\u4e2d\n")


def test_a_closed_stream_is_no_number_for_a_file_of_ours():
    program = (
        "from smollm_jax.runtime.errors import open_streams; open_streams(); import sys; f = open(sys.argv[1])"
    )
    shell = f"{sys.executable} -c '{program}; sys.exit(f.fileno())' /dev/null <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], check=False).returncode == 3


def test_without_a_home_there_is_no_cache_and_one_line(capsys, monkeypatch, tmp_path):
    import jax

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr(jax.config, "update", None)
    use_compilation_cache("~/.cache/smollm_jax")
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not kept" in line
    with pytest.raises(UserError, match="set HOME"):
        expand_home("~/x")
    assert not list(tmp_path.iterdir())


def test_a_stream_that_raises_stops_nobody(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    errors.say("words")


def test_nobody_moves_the_cursor_of_a_terminal(capsys):
    assert lines_of(capsys, raises(UserError("no folder named a\x1b[2J\x9b\x7fb, Größe 水")), 2) == [
        "error: no folder named a\\x1b[2J\\x9b\\x7fb, Größe 水"
    ]
    errors.say("a\x1b[2J")
    assert capsys.readouterr().err == "a\\x1b[2J\n"


SWALLOWED = """
import gc, signal, sys, time
from smollm_jax.runtime.errors import run_main

number = signal.Signals[sys.argv[1]]
for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, signal.default_int_handler if one == number else signal.SIG_IGN)

def interrupts(phase, info):  # an exception inside such a callback goes nowhere
    if phase == "stop":
        gc.callbacks.pop()
        signal.raise_signal(number)

def main():
    gc.callbacks.append(interrupts)
    gc.collect()
    time.sleep(20)
    return 0

sys.exit(run_main(main))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_callback_swallows_comes_again(name):
    command = [sys.executable, "-c", SWALLOWED, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=15)
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, "")
    assert done.stderr == "interrupted\n"

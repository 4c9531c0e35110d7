"""Signals to a process whose main thread is busy, away, or done."""

import os
import signal
import subprocess
import sys
import time

import pytest

from smollm_jax.runtime.signals import AGAIN_SECONDS

BUSY = """
import signal, sys, time
from smollm_jax.runtime.signals import StopRequest, leave
{before}
saved = []
with StopRequest() as stop:
    stop.nothing_to_lose = lambda: bool(saved)
    print("ready", flush=True)
    {body}
    leave(3)
"""


HEARD = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whoever started the tests may ignore it


def started(body):
    """A process in `body`, with its handlers standing."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(before=HEARD, body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_stop_while_the_main_thread_is_away_is_saved_by_another():
    process = started('with stop.away(lambda: (print("saving"), saved.append(1))): time.sleep(60)')
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert "SIGTERM: saving and stopping" in err
    assert "stopped, saved; run the same command to go on" in err


def test_a_stop_is_left_to_a_main_thread_that_is_there():
    process = started("\n    while not stop.requested: time.sleep(0.01)\n    time.sleep(1)")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 3


@pytest.mark.parametrize(("lost", "code"), [(False, 75), (True, 1)])
def test_where_nothing_is_lost_one_signal_ends_a_busy_process_and_else_the_second(lost, code):
    process = started(f"saved[:] = [] if {lost} else [1]; time.sleep(60)")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    if lost:
        process.send_signal(signal.SIGTERM)  # as `timeout` sends two: the same request; another than the first, as
        # two alike that wait to be delivered are one
        time.sleep(AGAIN_SECONDS + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == code


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_warning_of_the_end_saves_as_sigterm_does_and_never_leaves_at_once(name):
    process = started(
        "\n    while not stop.requested: time.sleep(0.01)\n    time.sleep(2.5)\n    saved.append(1); leave(75)"
    )
    process.send_signal(signal.Signals[name])
    time.sleep(AGAIN_SECONDS + 0.2)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert f"{name}: saving and stopping" in err
    assert "leaving at once" not in err


def test_nohup_keeps_sighup_ignored():
    hup = "signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    program = BUSY.format(before="", body=f"leave(9 if {hup} else 1)")
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 9


def test_a_run_whose_terminal_is_gone_still_saves(tmp_path):
    ours, theirs = os.openpty()
    body = f'with stop.away(lambda: open("{tmp_path}/saved", "w") and saved.append(1)): time.sleep(60)'
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(before=HEARD, body=body)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.close(theirs)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=10)
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()


def test_a_signal_after_the_end_changes_nothing():
    process = started("saved[:] = [1]; import atexit; atexit.register(time.sleep, 5)")
    process.communicate(timeout=4)
    assert process.returncode == 3


FULL_PIPE = """
import signal, sys
from smollm_jax.runtime.signals import leave

signal.signal(signal.SIGTERM, signal.default_int_handler)
print("leaving", file=sys.stderr, flush=True)
sys.stdout = open(1, "w", buffering=2**20, closefd=False)
print("x" * 2**19)  # more than a pipe holds, less than the buffer
leave(3)
"""


def test_a_process_that_leaves_and_waits_for_its_reader_still_hears_a_signal():
    command = [sys.executable, "-c", FULL_PIPE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "leaving\n"
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 3
    assert process.stderr.read() == ""

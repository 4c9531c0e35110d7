"""Signals to a process whose main thread is busy, away, or done."""

import signal
import subprocess
import sys
import time

import pytest

from smollm_jax.runtime.signals import AGAIN_SECONDS

BUSY = """
import sys, time
from smollm_jax.runtime.signals import StopRequest, leave
saved = []
with StopRequest() as stop:
    stop.nothing_to_lose = lambda: bool(saved)
    print("ready", flush=True)
    {body}
    leave(3)
"""


def started(body):
    """A process in `body`, with its handlers standing."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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


def test_a_signal_after_the_end_changes_nothing():
    process = started("saved[:] = [1]; import atexit; atexit.register(time.sleep, 5)")
    process.communicate(timeout=4)
    assert process.returncode == 3

"""A public address by Gradio's own tunnel code, with a program of ours in place of frpc, and without a network."""

import time
from pathlib import Path

import pytest

from smollm_jax.serving import share
from smollm_jax.serving.guard import Hosts, Refused
from smollm_jax.serving.share import Share, for_all


@pytest.fixture
def tunneling(monkeypatch, tmp_path):
    from gradio import networking, tunneling

    monkeypatch.setattr(tunneling, "BINARY_FOLDER", tmp_path)
    monkeypatch.setattr(tunneling, "BINARY_PATH", str(tmp_path / "frpc"))
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", "127.0.0.1:1")
    return tunneling


def program(tunneling, text):
    path = Path(tunneling.BINARY_PATH)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_server_answers_under_the_name_of_its_tunnel_and_the_tunnel_ends_with_it(tunneling, capsys):
    program(tunneling, "echo 'start proxy success: https://abc.gradio.live'; exec sleep 60")
    hosts = Hosts()
    asked = {b"host": b"abc.gradio.live", b"origin": b"https://abc.gradio.live"}
    with pytest.raises(Refused):
        hosts.check(asked)
    tunnel = Share("127.0.0.1", 7860, hosts)
    assert tunnel.wait() == "https://abc.gradio.live"
    hosts.check(asked)
    assert "https://abc.gradio.live" in capsys.readouterr().out
    process = tunnel._tunnel.proc
    tunnel.close()
    assert process.returncode is not None


def test_no_network_and_a_silent_program_cost_a_line(tunneling, monkeypatch, capsys):
    from gradio import networking

    program(tunneling, "exec sleep 60")
    monkeypatch.setattr(share, "SECONDS", 0.5)
    began = time.monotonic()
    assert Share("127.0.0.1", 7860, Hosts()).wait() is None
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    monkeypatch.setattr(networking, "GRADIO_API_SERVER", "http://127.0.0.1:1/")
    monkeypatch.setattr(share, "SECONDS", 20.0)
    assert Share("127.0.0.1", 7860, Hosts()).wait() is None
    assert time.monotonic() - began < 30
    time.sleep(0.2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no public address")]
    assert [line.endswith("the page stays open to this machine") for line in lines] == [True, True]
    assert "ConnectError" in lines[1]


def test_a_public_page_has_a_password(capsys):
    assert for_all("me", "secret") == ("me", "secret")
    user, password = for_all("", "")
    assert len(password) > 12
    assert f"{user} with the password {password}" in capsys.readouterr().err

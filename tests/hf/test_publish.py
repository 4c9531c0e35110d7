"""Push an export to the Hub."""

import time
from unittest.mock import Mock

import pytest

from smollm_jax.hf.export import MARK
from smollm_jax.hf.publish import push


def test_a_dry_run_lists_files_and_sizes_without_a_token_or_the_network(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("asked for a token"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("went to the Hub"))
    (folder / "secrets.env").write_text("TOKEN")
    listed = push(folder, "me/model", dry_run=True, private=True)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in listed
    assert "README.md" in listed
    assert "secrets.env" not in listed
    assert listed.splitlines()[-1].endswith("would go to me/model (private)")


def test_a_push_sends_the_listed_files_alone(folder, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, repo, **kw):
            sent["made"] = (repo, kw)
            return f"https://hub/{repo}"

        def upload_folder(self, **kw):
            sent["files"] = kw["allow_patterns"]

        def upload_file(self, **kw):
            sent["card"] = kw["path_or_fileobj"].decode()
            sent["files"].append(kw["path_in_repo"])

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (folder / "secrets.env").write_text("TOKEN")
    assert push(folder, "me/model") == "https://hub/me/model"
    assert sent["made"] == ("me/model", {"private": False, "exist_ok": True})
    assert sorted(sent["files"]) == sorted(p.name for p in folder.iterdir() if p.name != "secrets.env")
    assert 'pipeline("text-generation", "me/model")' in sent["card"]
    assert "checksums" not in sent["card"]


def test_a_hub_that_accepts_and_never_answers_is_given_up(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    monkeypatch.setattr(
        "huggingface_hub.HfApi", Mock(return_value=Mock(create_repo=lambda *_, **__: time.sleep(30)))
    )
    monkeypatch.setattr("smollm_jax.hf.publish.ANSWER_SECONDS", 0.1)
    with pytest.raises(
        ValueError, match="me/model could not be written on the Hub: TimeoutError: no answer within"
    ):
        push(folder, "me/model")


def test_a_push_without_token_network_or_export_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token; set HF_TOKEN or run: hf auth login"):
        push(folder, "me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="me/model could not be written on the Hub: ") as caught:
        push(folder, "me/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must read OWNER/NAME"):
        push(folder, "model")
    with pytest.raises(ValueError, match=r"no config\.json"):
        push(tmp_path, "me/model")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is a run; push .*/export"):
        push(tmp_path, "me/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        push(folder, "me/model", dry_run=True)
    assert MARK


@pytest.mark.parametrize("name", ["tokenizer_notes.md", "private.jinja", "adapter.safetensors", "tokenizer.json~"])
def test_a_persons_own_files_are_not_published(folder, name):
    if name.endswith(".safetensors"):
        (folder / name).write_bytes(b"?")
    else:
        (folder / name).write_text("mine")
    assert name not in push(folder, "me/model", dry_run=True)


def test_a_link_is_not_published(folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "merges.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"merges\.txt is a link"):
        push(folder, "me/model", dry_run=True)

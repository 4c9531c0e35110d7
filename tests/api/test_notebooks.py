"""The notebooks run from top to bottom in a kernel, and the code blocks of docs/python.md in a script."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_opens_on_colab(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    badge = f"https://colab.research.google.com/github/OWNER/smollm-jax/blob/main/notebooks/{path.name}"
    assert badge in "".join(cells[0]["source"])


def ran(path, monkeypatch, tmp_path, **variables):
    """The text, the pictures and the HTML that a notebook shows."""
    import nbformat
    from nbclient import NotebookClient

    inherited = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ip"),
    }
    for name, value in (inherited | variables).items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    streams = [output for output in outputs if output.output_type == "stream"]
    # shown in red; tqdm says so of a kernel without ipywidgets
    red = [output.text for output in streams if output.name == "stderr"]
    assert not [text for text in red if "IProgress" not in text], red
    text = "".join(output.text for output in streams) + "\n".join(one.get("text/plain", "") for one in data)
    return (
        text,
        [one["image/png"] for one in data if "image/png" in one],
        "".join(one.get("text/html", "") for one in data),
    )


@pytest.mark.slow
def test_the_quickstart_notebook_runs_whole(monkeypatch, tmp_path):
    text, pictures, html = ran(NOTEBOOKS[1], monkeypatch, tmp_path, STEPS="12", RUN_DIR=tmp_path / "run")
    assert "finished at step 12 of 12" in text
    assert len(pictures) == 1
    assert re.search(r'<iframe[^>]+src="http://127\.0\.0\.1:\d+"', html)
    assert text.count("Return the") > 1
    assert f"{tmp_path}/run/export" in text


@pytest.mark.release
def test_the_tpu_notebook_runs_as_far_as_a_cpu_goes(monkeypatch, tmp_path, corpus):
    data = f"{corpus}/*.jsonl"
    text, pictures, html = ran(
        NOTEBOOKS[0], monkeypatch, tmp_path, STEPS="6", DATA=data, RUN_DIR=tmp_path / "run", JAX_PLATFORMS="cpu"
    )
    assert "no TPU here" in text
    assert "finished at step 6 of 6" in text
    assert (len(pictures), "<iframe" in html) == (1, True)


@pytest.mark.slow
def test_the_interrupt_button_of_a_notebook_saves_and_a_mistake_is_one_line(tmp_path):
    from jupyter_client.manager import start_new_kernel

    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    manager, client = start_new_kernel(kernel_name="python3", env=environment, cwd=str(tmp_path))
    try:
        small = (
            "dict(tokenizer='train:300', hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, "
            "intermediate_size=32, seq_len=32, batch_size=2, log_every=1, eval_documents=0)"
        )
        shown, pressed = [], False

        def look(message):
            nonlocal pressed
            content = message["content"]
            shown.append(content.get("text") or str(content.get("data") or content.get("traceback") or ""))
            if "/3000" in shown[-1] and not pressed:
                pressed = True
                manager.interrupt_kernel()

        asked = f"import smollm_jax as s\ns.train('quickstart', 3000, run_dir='run', **{small})"
        reply = client.execute_interactive(asked, timeout=300, output_hook=look)
        assert reply["content"]["status"] == "ok", shown
        assert "stopped at step" in "".join(shown)
        shown.clear()
        reply = client.execute_interactive("s.load('run').generate([1])", timeout=200, output_hook=look)
        assert "\n".join(reply["content"]["traceback"]).count("\n") == 0
        assert "UserError: generate takes texts" in reply["content"]["traceback"][0]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.release
def test_every_code_block_of_the_page_on_python_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    program = "\n".join(blocks).replace("steps=200,", "steps=12, batch_size=2, eval_documents=20,")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: PLW1510 - its output says more
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "runs/short/export" in done.stdout
    assert "generate takes texts, a list with int came" in done.stdout

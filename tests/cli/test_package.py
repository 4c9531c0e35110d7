"""The wheel holds everything: in an environment of its own it trains and serves without the checkout."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
import yaml

import smollm_jax
from smollm_jax.runtime.errors import install
from tests.support.paths import ROOT

TINY = "--recipe quickstart --tokenizer train:300 --vocab-size 300 --hidden-size 32 --num-layers 1 --num-heads 2 \
--num-kv-heads 1 --head-dim 16 --intermediate-size 32 --seq-len 32 --steps 4 --batch-size 2 --eval-every 0 \
--sample-tokens 0 --shuffle-window 16".split()
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_one_version_and_one_licence_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["dynamic"]) == ("Apache-2.0", ["version"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (smollm_jax.__version__, "Apache-2.0")
    assert f"## {smollm_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_a_hint_to_install_works_where_it_is_given(monkeypatch, tmp_path):
    assert install("serve") == "pip install -c constraints.txt -e '.[serve]'"
    monkeypatch.setattr("smollm_jax.runtime.errors.__file__", str(tmp_path / "smollm_jax/runtime/errors.py"))
    assert install("serve") == "pip install 'smollm-jax[serve]'"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of a new environment that holds the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "smollm_jax", folder / "source/smollm_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")  # a build in the checkout would leave files there
    source = str(folder / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"smollm_jax/serving/page.css", "smollm_jax/serving/page.js", "smollm_jax/serving/page.md"} <= set(
        names
    )
    assert [name for name in names if name.endswith(("licenses/LICENSE", "licenses/NOTICE"))]
    assert not [name for name in names if not name.startswith("smollm_jax")]
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        wheel,
    ]
    subprocess.run(pip, check=True, env=CLEAN)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text(
        "\n".join(theirs)
    )  # after the wheel, so that the wheel is what is imported
    return folder / "venv/bin"


@pytest.mark.slow
def test_the_wheel_trains_and_serves_without_the_checkout(installed, tmp_path):
    def ran(program, *arguments):
        command = [installed / program, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=CLEAN, check=True, capture_output=True, text=True)

    def smollm(*arguments):
        return ran("smollm", *arguments)

    found = ran("python", "-c", "import smollm_jax; print(smollm_jax.__file__)")
    assert Path(found.stdout).is_relative_to(installed.parent)
    assert smollm("--version").stdout.strip() == smollm_jax.__version__
    assert "export in runs/quickstart/export" in smollm("train", *TINY).stdout
    assert "Return" in smollm("generate", "runs/quickstart", "--prompt", "Return", "--max-new-tokens", "4").stdout
    serving = subprocess.Popen(
        [installed / "smollm", "serve", "runs/quickstart", "--port", "0"], cwd=tmp_path, env=CLEAN,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        address = serving.stdout.readline().strip()
        deadline = time.monotonic() + 60
        while True:
            try:
                assert "<html" in httpx.get(address, timeout=30).text
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        asked = {"prompt": "Return", "max_tokens": 3}
        assert httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()["usage"]["completion_tokens"]
    finally:
        serving.terminate()
        serving.wait(30)

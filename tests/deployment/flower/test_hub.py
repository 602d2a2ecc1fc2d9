"""The app for Flower Hub: what Flower packs of it, and Hub's limits."""

import io
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.supercore.constant import MAX_FILE_BYTES, MAX_FILE_COUNT, MAX_TOTAL_BYTES

import fedproxy
from fedproxy.config import load_experiment
from fedproxy.deployment.flower import SETTINGS
from fedproxy.deployment.flower.command import command
from fedproxy.public_text import read_documents

ROOT = Path(__file__).parents[3]
APP = ROOT / "flower-hub"


@pytest.mark.slow
def test_flower_packs_it_within_hubs_limits(tmp_path, monkeypatch):
    for key, value in {**SETTINGS, "FLWR_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(key, value)
    shutil.copytree(APP, tmp_path / APP.name, ignore=shutil.ignore_patterns("__pycache__"))
    said = subprocess.run(
        command("flwr", "build", "--app", str(tmp_path / APP.name)),
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert "missing" not in said
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(io.BytesIO(fab.read_bytes())) as packed:
        assert sorted(packed.namelist()) == [
            ".info/CONTENT", "LICENSE", "README.md", "calibration.jsonl", "experiment.toml",
            "fedproxy_app/__init__.py", "fedproxy_app/client_app.py", "fedproxy_app/server_app.py", "pyproject.toml",
        ]  # fmt: skip
        app = tomllib.loads(packed.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
        contents = [packed.read(name).decode() for name in packed.namelist()]
    assert (app["fab-format-version"], app["publisher"]) == (1, "fedproxy")
    assert (MAX_TOTAL_BYTES, MAX_FILE_BYTES, MAX_FILE_COUNT) == (10 << 20, 1 << 20, 1000)
    sizes = [len(content.encode()) for content in contents]
    assert sum(sizes) < MAX_TOTAL_BYTES
    assert max(sizes) < MAX_FILE_BYTES
    assert len(sizes) < MAX_FILE_COUNT


def test_its_metadata_and_example_are_sound():
    project = tomllib.loads((APP / "pyproject.toml").read_text())["project"]
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["description"]) < 200
    assert (project["version"], project["description"]) == (own["version"], own["description"])
    assert set(own["optional-dependencies"]["federation"]) & set(project["dependencies"]) == {"flwr>=1.41,<1.43"}
    assert (APP / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    experiment = load_experiment(APP / "experiment.toml", remote=True)
    assert [client.name for client in experiment.client] == ["finance", "news"]
    theirs = Path(fedproxy.__file__).parent / "demo" / "calibration.txt"
    assert read_documents(experiment.compress.calibration)[0] == read_documents(theirs)[0]

"""Small trained runs to attack: the demo's LLM, tuned by two clients until it knows their rows by heart, or hardly."""

import json
from pathlib import Path
from typing import Any

import pytest

import fedproxy
from fedproxy.demo import EXPERIMENT
from fedproxy.fusion.run import fuse_run
from fedproxy.pipeline import read_experiment

DEMO = EXPERIMENT.parent
TRAINED, KNOWN = 24, 72
"""Rows of each client that are trained on, and rows in its file."""


def write_rows(folder: Path, task: str) -> Path:
    """The first rows of a task of the demo, as a client's file."""
    lines = (DEMO / "tasks" / task / "train.jsonl").read_text(encoding="utf-8").splitlines()[:KNOWN]
    rows = [json.loads(line) for line in lines]
    path = folder / f"{task}.jsonl"
    pairs = ({"prompt": f"{row['text']}\nTopic:", "completion": f" {row['label_text']}"} for row in rows)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def make_run(folder: Path, *, epochs: float, rows: int | None = TRAINED, **train: Any) -> Path:
    """A run of two clients and one round, with the fused LLM."""
    folder.mkdir(parents=True, exist_ok=True)
    limit = f"rows = {rows}" if rows else ""
    clients = "".join(
        f'[[client]]\nname = "{name}"\ndata = "{write_rows(folder, task)}"\n{limit}\n'
        for name, task in (("bank", "demo_banking"), ("travel", "demo_travel"))
    )
    settings = {"epochs": epochs, "batch_size": 8, "learning_rate": 3e-3, "max_length": 48, **train}
    settings = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "precision": '"fp32"', **settings}
    lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
    path = folder / "experiment.toml"
    path.write_text(
        f'name = "attacked"\n[llm]\npath = "{DEMO / "llm"}"\n'
        f'[compress]\ncalibration = "{DEMO / "calibration.txt"}"\nsamples = 32\nmax_length = 64\n{clients}'
        f"[train]\n{lines}"
        '[federate]\nrounds = 1\nmerge = "mean"\nregulariser = "none"\n'
    )
    experiment = read_experiment(path)
    fedproxy.federate(experiment, folder / "run")
    fuse_run(experiment, folder / "run", lambda *_: None)
    return folder / "run"


@pytest.fixture(scope="session")
def learned_by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients trained twelve times on the whole text of each of their rows."""
    return make_run(tmp_path_factory.mktemp("heart") / "a", epochs=12, completion_only_loss="false")


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training moved next to nothing."""
    return make_run(tmp_path_factory.mktemp("untouched") / "a", epochs=1, max_steps=1, learning_rate=1e-9)

"""The bundled tasks: well-formed, balanced, and with nothing of the test rows in the training rows."""

import json
import re
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import yaml

TASKS = ["demo_snips", "demo_travel", "demo_banking", "demo_dbpedia"]


def read(folder: Path, task: str, split: str) -> list[dict]:
    config = yaml.safe_load((folder / f"{task}.yaml").read_text(encoding="utf-8"))
    path = folder / config["dataset_kwargs"]["data_files"][split]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder():
    with as_file(files("fedproxy") / "demo" / "tasks") as path:
        yield path


@pytest.mark.parametrize("task", TASKS)
def test_task_file_names_an_index_target_and_few_short_choices(folder, task):
    config = yaml.safe_load((folder / f"{task}.yaml").read_text(encoding="utf-8"))
    assert config["task"] == task
    assert config["output_type"] == "multiple_choice"
    assert config["doc_to_target"] == "label"
    assert 2 <= len(config["doc_to_choice"]) <= 10
    assert len(set(config["doc_to_choice"])) == len(config["doc_to_choice"])
    assert all(re.fullmatch("[a-z]{3,10}", choice) for choice in config["doc_to_choice"])
    assert "{{text}}\n" in config["doc_to_text"]


@pytest.mark.parametrize(("split", "most"), [("train", 600), ("test", 150)])
@pytest.mark.parametrize("task", TASKS)
def test_rows_are_balanced_and_labelled(folder, task, split, most):
    choices = yaml.safe_load((folder / f"{task}.yaml").read_text(encoding="utf-8"))["doc_to_choice"]
    rows = read(folder, task, split)
    assert most * 0.85 < len(rows) <= most
    assert len(set(Counter(row["label"] for row in rows).values())) == 1
    assert {row["label"] for row in rows} == set(range(len(choices)))
    for row in rows:
        assert row["label_text"] == choices[row["label"]]
        assert row["text"].strip() == row["text"] != ""


@pytest.mark.parametrize("task", TASKS)
def test_no_text_occurs_twice(folder, task):
    rows = read(folder, task, "train") + read(folder, task, "test")
    keys = [" ".join(re.findall(r"\w+", row["text"].casefold())) for row in rows]
    assert len(set(keys)) == len(keys)


def test_every_extract_has_source_and_licence(folder):
    sections = (folder / "SOURCES.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == [*TASKS, "calibration.txt"]
    for section in sections:
        for part in ("- Work: ", "- Source: ", "- Licence: ", "- Changed: "):
            assert part in section


def test_the_extract_is_small(folder):
    assert (
        sum(path.stat().st_size for path in folder.parent.rglob("*.*") if path.suffix in {".jsonl", ".txt"}) < 600_000
    )


def test_calibration_text_has_documents_between_blank_lines(folder):
    documents = (folder.parent / "calibration.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(documents) > 50
    assert all("\n" not in document and document.strip() for document in documents)

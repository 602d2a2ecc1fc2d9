"""The experiments of the laboratory and on real LLMs render their tasks, and the results beside them are theirs."""

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedproxy.attack_records import Attacks
from fedproxy.methods import METHODS
from fedproxy.privacy.attacks import ATTACKS
from fedproxy.reporting.rows import Compared
from fedproxy.typed_json import read_record

ROOT = Path(__file__).parents[2]
LABORATORY = ROOT / "src" / "fedproxy" / "demo" / "llm"
FOLDERS = ("lab", "smollm2", "gemma3")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / "experiments" / folder).glob("*.toml"))]
RESULTS = {
    file: found
    for file in FILES
    for found in (file.parent / "results" / f"{file.stem}.json", file.with_suffix(".json"))
    if "compare" in tomllib.loads(file.read_text()) and found.is_file()
}
"""Experiment file → what its comparison found."""
AUDITS = [file for folder in FOLDERS for file in sorted((ROOT / "experiments" / folder / "audits").glob("*.json"))]
GLUE = ("sst2", "rte", "cola", "mrpc", "mnli")
QUESTIONS = ("arc_easy", "openbookqa", "commonsense_qa")
STOCK = ("clinc150", "banking77", "ag_news", "trec", "snips", *GLUE, *QUESTIONS)
Cli = Callable[..., tuple[int, str, str]]


def label(file: Path) -> str:
    return str(file.relative_to(ROOT / "experiments"))


def rows(task: str) -> Iterator[dict[str, Any]]:
    """Rows in the schema of the folder that [evaluate] data names, two of each class."""
    intents = {"clinc150": ("recipe", "calories", "play_music"), "banking77": ("atm_support", "top_up_limits", "age")}
    for number in range(8):
        if task in intents:
            yield {"text": f"request {number}", "label": 0, "label_text": intents[task][number % 3]}
        elif task in QUESTIONS:
            options = {"text": [f"option {option}" for option in range(5)], "label": list("ABCDE")}
            question = dict.fromkeys(("question", "question_stem"), f"question {number}")
            yield {**question, "choices": options, "answerKey": "ABCDE"[number % 4]}
        elif task in GLUE:
            texts = dict.fromkeys(("sentence", "sentence1", "sentence2", "premise", "hypothesis"), f"text {number}")
            yield {"text": f"text {number}", "label": number % 2, **texts}
        else:
            yield {"text": f"text {number}", "label": number % 4, "coarse_label": number % 6}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy beside a few rows and the laboratory's LLM, so that no other folder is needed."""
    folder = tmp_path_factory.mktemp("project")
    for task in STOCK:
        for split in ("train", "validation", "validation_matched", "test"):
            file = folder / "data" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(json.dumps(row) for row in rows(task)))
    (folder / "data" / "alpaca").mkdir()
    (folder / "data" / "alpaca" / "train.jsonl").write_text('{"text": "A public text."}\n')
    moved = {"../../src": str(ROOT / "src"), "../../../shared/data": "../data", "../../runs/validation": "../data"}
    moved |= {f"../../runs/{llm}": str(LABORATORY) for llm in FOLDERS}
    for name in FOLDERS:
        shutil.copytree(ROOT / "experiments" / name, folder / name, ignore=shutil.ignore_patterns("results"))
        for file in (folder / name).glob("*.toml"):
            text = file.read_text()
            for old, new in moved.items():
                text = text.replace(old, new)
            file.write_text(text)
    for file in (folder / "lab" / "tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace("../../../src", str(ROOT / "src")))
    return folder


@pytest.mark.parametrize("file", FILES, ids=label)
def test_its_tasks_render(file: Path, project: Path, cli: Cli) -> None:
    code, out, err = cli("run", project / file.parent.name / file.name, "--dry-run", "--tflops", 1, "--json")
    assert code == 0, err
    clients = json.loads(out)["clients"]
    for name, client in clients.items():
        end = "question 7" if name == "library" else ":"  # OpenBookQA's prompt is the question alone
        assert client["example"]["prompt"].endswith(end)
        assert client["example"]["answer"].startswith(" ")
    if "kitchen" in clients:
        assert clients["kitchen"]["rows"] == clients["wallet"]["rows"] == 6  # other intents are left out


def within(asked: Any, found: Any) -> bool:
    """Whether all that a file asks for stands in what was found; what the file leaves out may have any value."""
    if isinstance(asked, dict):
        return all(key in found and within(value, found[key]) for key, value in asked.items())
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        return len(asked) == len(found) and all(map(within, asked, found))
    return bool(asked == found)


@pytest.mark.parametrize("file", RESULTS, ids=label)
def test_results_are_of_the_experiment_that_they_lie_beside(file: Path) -> None:
    asked = tomllib.loads(file.read_text())
    compared = asked.pop("compare")
    asked["evaluate"].pop("trust_tasks", None)  # it came after the results, and changes none
    found = json.loads(RESULTS[file].read_text())
    for table, values in asked.items():
        assert within(values, found["experiment"][table]), table
    methods, ratios = compared.get("methods", list(METHODS)), compared.get("ratios", [asked["compress"]["remove"]])
    variants = compared.get("variant", [])
    methods = methods + [variant["name"] for variant in variants]
    assert within(variants, found["compare"].get("variant", []))
    assert {(cell["method"], cell["seed"], cell["remove"]) for cell in found["cells"]} == {
        (method, seed, ratio) for method in methods for seed in compared["seeds"] for ratio in ratios
    }
    assert read_record(RESULTS[file], Compared).name == asked["name"]


@pytest.mark.parametrize("file", AUDITS, ids=label)
def test_an_audit_is_of_attacks_that_there_are_and_of_the_clients_beside_it(file: Path) -> None:
    clients = {
        client["name"] for client in tomllib.loads((file.parents[1] / f"{file.stem}.toml").read_text())["client"]
    }
    audit = read_record(file, Attacks)
    assert set(audit.attacks) <= set(ATTACKS)
    wheres = [figure.where for attack in audit.attacks.values() for figure in attack.figures]
    assert {name for name in clients if any(where.endswith(name) for where in wheres)} == clients

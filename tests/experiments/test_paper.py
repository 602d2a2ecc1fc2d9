"""The paper's experiments parse and are foretold; their LLMs' real shapes stand in for them, without a weight."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from fedproxy.demo import EXPERIMENT
from fedproxy.pipeline import read_experiment

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "experiments" / "paper"
FILES = sorted(PAPER.glob("*.toml"))
LLMS = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig(dtype="float16"), 6_738_415_616),
    "mistralai/Mistral-7B-v0.1": (MistralConfig(dtype="bfloat16"), 7_241_732_096),
}
"""Hub id → transformers' defaults, which are that model's, and how many parameters it has."""
TASKS = ("openbookqa", "arc_easy", "arc_challenge", "commonsense_qa", "sst2", "mrpc", "rte", "mnli")
Cli = Callable[..., tuple[int, str, str]]


def row(task: str, number: int) -> dict[str, Any]:
    """A row in the Hub's schema."""
    letters = random.Random(number)
    text = " ".join(letters.choices(["warm", "stone", "river", "falls"], k=5))
    if task in ("openbookqa", "arc_easy", "arc_challenge", "commonsense_qa"):
        labels = "ABCDE"[: 5 if task == "commonsense_qa" else 4]
        choices = {"text": [f"{text} {label}" for label in labels], "label": list(labels)}
        question = "question_stem" if task == "openbookqa" else "question"
        return {"id": str(number), question: text, "choices": choices, "answerKey": labels[number % 4]}
    fields = {"sst2": ("sentence",), "mnli": ("premise", "hypothesis")}.get(task, ("sentence1", "sentence2"))
    return {**dict.fromkeys(fields, text), "label": number % (3 if task == "mnli" else 2), "idx": number}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / task).mkdir()
        for split in ("train", "validation", "validation_matched", "test"):
            lines = [json.dumps(row(task, number)) for number in range(9 if split == "train" else 3)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[Path], Path]:
    """A function that gives a copy of an experiment with the shape of its LLM and rows on this disk."""

    def copy(file: Path) -> Path:
        folder = tmp_path_factory.mktemp("experiment")
        text = file.read_text().replace("../..", str(ROOT)).replace('# data = "DIR"', f'data = "{data}"')
        for name, (config, _) in LLMS.items():
            if name in text:
                config.save_pretrained(folder / "llm")
                text = text.replace(name, str(folder / "llm"))
        for tokenizer in (EXPERIMENT.parent / "llm").glob("tokenizer*"):
            shutil.copy(tokenizer, folder / "llm")
        (folder / file.name).write_text(text)
        return folder / file.name

    return copy


def test_there_are_two_llms_in_two_settings() -> None:
    found = [read_experiment(file) for file in FILES]
    settings = {(one.llm.path, len(one.client), one.partition and one.partition.clients) for one in found}
    assert settings == {(llm, *clients) for llm in LLMS for clients in ((8, None), (0, 4))}
    for file, one in zip(FILES, found, strict=True):
        assert one.name == file.stem
        train = one.train
        assert (train.lora_r, train.lora_alpha, train.lora_dropout, train.lora_targets) == (32, 64, 0.1, "all-linear")
        assert (train.learning_rate, train.epochs, train.max_length) == (5e-5, 10, 64 + 128)
        assert train.batch_size * train.gradient_accumulation_steps == 16
        assert (one.compress.remove, one.compress.score) == (0.5, "block-influence")
        assert (one.federate.merge, one.federate.regulariser, one.federate.space) == ("h-ties", "pcr", "factors")
        rows = {client.rows for client in one.client} or {one.partition and one.partition.rows}
        assert rows == {5000}
        assert {client.task for client in one.client} in (set(TASKS), set())


def test_the_readme_names_every_file() -> None:
    text = (PAPER / "README.md").read_text()
    assert all(file.name in text for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dry_run_needs_no_weights(file: Path, local: Callable[[Path], Path], cli: Cli) -> None:
    experiment = local(file)
    before = sorted(experiment.parent.rglob("*"))
    code, out, err = cli("run", experiment, "--dry-run", "--tflops", 100, "--json")
    assert code == 0, err
    found = json.loads(out)
    parameters = next(count for name, (_, count) in LLMS.items() if name in file.read_text())
    assert (found["llm"]["parameters"], found["llm"]["bytes"], found["llm"]["blocks"]) == (
        parameters,
        2 * parameters,
        32,
    )
    assert found["proxy"]["blocks"] == 16
    clients = found["clients"]
    assert {client["rows"] for client in clients.values()} <= {9, 2, 3}
    assert sum(client["rows"] for client in clients.values()) == (72 if len(clients) == 8 else 9)
    for client in clients.values():
        assert client["example"]["prompt"]
        assert client["example"]["answer"].startswith(" ")
        assert client["lost"] == 0
        assert client["memory"]["cpu"] > 4 * found["proxy"]["parameters"] > client["memory"]["gpu"] > 7e9
    assert sorted(experiment.parent.rglob("*")) == before


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dry_run_of_its_comparison(file: Path, local: Callable[[Path], Path], cli: Cli) -> None:
    code, out, err = cli("compare", local(file), "--dry-run", "--tflops", 100)
    assert (code, out) == (0, "")
    asked = read_experiment(file).compare
    assert asked is not None
    for method in asked.methods:
        assert sum(line.split()[:1] == [method] for line in err.splitlines()) == len(asked.ratios)
    assert f"All {len(asked.methods) * len(asked.ratios) * len(asked.seeds)} cells" in err


def test_without_a_network_one_sentence_says_so(cli: Cli) -> None:
    for file in FILES:
        code, out, err = cli("run", file, "--dry-run", "--tflops", 1)
        assert (code, out) == (3, "")
        assert "is no checkpoint" in err
        assert "network" in err
        assert err.count("\n") == 1

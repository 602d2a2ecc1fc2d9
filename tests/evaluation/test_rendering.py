import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation import training_rows
from fedproxy.evaluation.library import contained
from fedproxy.evaluation.loading import load_for_training
from fedproxy.evaluation.rendering import answered

STOCK = ["sst2", "mnli", "arc_easy", "openbookqa"]


def gold_pairs(task: Any) -> list[tuple[str, str]]:
    """What the harness itself scores for each document's right answer."""
    with contained():
        task.build_all_requests()
    pairs = []
    for request in task.instances:
        gold = task.doc_to_target(request.doc)
        if isinstance(gold, str):
            gold = task.doc_to_choice(request.doc).index(gold)
        if request.idx == gold:
            pairs.append(request.arguments)
    return pairs


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", [*STOCK, "colours"])
def test_training_tokens_are_the_scored_tokens(
    name: str,
    adds_bos: bool,
    data: Path,
    include: Path,
    model: LlamaForCausalLM,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
) -> None:
    from fedproxy.evaluation.scorer import Scorer

    own = include if name == "colours" else None
    tokenizer = make_tokenizer(adds_bos)
    scorer = Scorer(model, tokenizer, 8)
    pairs = gold_pairs(load_for_training(name, split=None, data=data, include=own))
    rows = training_rows(name, data=data, include=own)
    assert len(rows) == len(pairs) > 0
    for row, pair in zip(rows, pairs, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert scorer._encode_pair(*pair) == (prompt, whole[len(prompt) :])
        assert row["prompt"] + row["completion"] == "".join(pair)


def test_prompts_are_the_templates_to_the_letter(data: Path, include: Path) -> None:
    row = json.loads((data / "sst2" / "train.jsonl").read_text().splitlines()[1])
    assert training_rows("sst2", data=data)[1] == {
        "prompt": f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        "completion": " positive",
    }
    row = json.loads((data / "mnli" / "train.jsonl").read_text().splitlines()[2])
    assert training_rows("mnli", data=data)[2] == {
        "prompt": f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False or Neither?\nAnswer:",
        "completion": " False",
    }
    assert training_rows("colours", include=include)[0] == {
        "prompt": "Name the colour.\nthe red river is",
        "completion": " red",
    }
    assert training_rows("spelling", include=include)[2] == {"prompt": "Spell blue:", "completion": " b-l-u-e"}


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_completion(data: Path) -> None:
    rows = training_rows("openbookqa", data=data)
    assert all(row["prompt"] == row["prompt"].rstrip() for row in rows)
    assert any(row["completion"].startswith("  ") for row in rows)


def test_own_tasks_win_over_stock_names(data: Path, include: Path, tmp_path: Path) -> None:
    shutil.copytree(include / "colours", tmp_path / "own")
    (tmp_path / "own" / "sst2.yaml").write_text("include: colours.yaml\ntask: sst2\n")
    assert training_rows("sst2", data=data, include=tmp_path)[0]["completion"] == " red"


def test_limit_chooses_by_seed(data: Path) -> None:
    whole = training_rows("sst2", data=data)
    some = training_rows("sst2", data=data, limit=5, seed=1)
    assert len(some) == 5
    assert all(row in whole for row in some)
    assert some == training_rows("sst2", data=data, limit=5, seed=1)
    assert some != training_rows("sst2", data=data, limit=5, seed=2)
    with pytest.raises(UsageError, match="limit of 0"):
        training_rows("sst2", data=data, limit=0)


def test_another_split_can_be_rendered(data: Path) -> None:
    assert len(training_rows("sst2", data=data, split="validation")) == 7


def with_answers(data: Path, folder: Path, name: str, field: str, *values: object) -> Path:
    lines = (data / name / "train.jsonl").read_text().splitlines()[: len(values)]
    rows = [{**json.loads(line), field: value} for line, value in zip(lines, values, strict=True)]
    (folder / name).mkdir()
    (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("sst2", "label", (-1, 1, None)),
        ("arc_easy", "answerKey", ("", "C", "Z")),
        ("openbookqa", "answerKey", ("", "C")),
    ],
)
def test_rows_without_an_answer_are_passed_over(
    data: Path, tmp_path: Path, name: str, field: str, values: tuple[object, ...]
) -> None:
    labels = [["A", "B", "C", "D"]] * 3
    folder = with_answers(data, tmp_path, name, field, *values)
    if field == "answerKey":
        path = folder / name / "train.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, label in zip(rows, labels, strict=False):
            row["choices"]["label"] = label
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(training_rows(name, data=folder)) == 1


def test_no_answer_at_all_is_an_artifact_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="none of the 2 rows"):
        training_rows("sst2", data=with_answers(data, tmp_path, "sst2", "label", -1, -1))


def test_no_training_split_says_which_there_are(include: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(include / "colours", folder)
    (folder / "base.yaml").write_text((folder / "base.yaml").read_text().replace("training_split: train\n", ""))
    with pytest.raises(ArtifactError, match="test, train"):
        training_rows("colours", include=folder)
    assert len(training_rows("colours", include=folder, split="train")) == 3


class Several:
    """As much of a Task as a choice with several right answers needs."""

    OUTPUT_TYPE = "generate_until"
    multiple_input = 0

    class config:  # noqa: N801
        doc_to_choice = None
        target_delimiter = " "

    def doc_to_target(self, document: dict[str, Any]) -> list[str]:
        return document["answers"]

    def doc_to_prefix(self, document: dict[str, Any]) -> None:
        return None

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, gen_prefix: str | None) -> str:
        return "Q:"


def test_the_first_of_several_right_answers_is_taken() -> None:
    assert answered(Several(), {"answers": ["yes", "true"]}) == ("Q:", " yes")
    assert answered(Several(), {"answers": []}) is None

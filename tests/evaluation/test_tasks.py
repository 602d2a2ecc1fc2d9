from pathlib import Path

import pytest

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation.tasks import find_task

PAPER = ["openbookqa", "arc_easy", "arc_challenge", "commonsense_qa", "sst2", "mrpc", "rte", "mnli"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_tasks_are_found(name: str) -> None:
    task = find_task(name)
    assert (task.name, task.config["task"], task.own) == (name, name, False)
    assert task.config["training_split"] == "train"


def test_included_keys_are_merged(include: Path) -> None:
    task = find_task("colours", include)
    assert task.own
    assert task.path == (include / "colours" / "colours.yaml").resolve()
    assert (task.config["training_split"], task.config["doc_to_target"]) == ("train", "colour")
    assert not find_task("arc_easy", include).own


def test_an_unknown_task_is_a_usage_error_with_a_suggestion(include: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_task("colors", include)
    said = str(caught.value)
    assert "unknown task 'colors'" in said
    assert "'colours'" in said
    assert f"{include} (colours, spelling)" in said
    with pytest.raises(UsageError, match="'openbookqa'"):
        find_task("openbokqa")


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_task("sst2", tmp_path / "none")


def test_a_task_that_is_a_python_class_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"squadv2.*Python class"):
        find_task("squadv2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [", "no task of the harness"),
        ("- task", "no mapping"),
        ("include: own.yaml\ntask: own", "includes itself"),
        ("include: none.yaml\ntask: own", "none.yaml"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        find_task("own", tmp_path)


def test_a_task_defined_twice_is_named(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("task: own\n")
    with pytest.raises(ArtifactError, match="defined twice"):
        find_task("own", tmp_path)

import re
import shutil
from pathlib import Path

import lm_eval.tasks
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


def test_an_unknown_task_is_a_usage_error_with_a_suggestion(include: Path, tmp_path: Path) -> None:
    """Among the own tasks and the harness's."""
    own = shutil.copytree(include, tmp_path / "own")
    (own / "books.yaml").write_text("task: openbooksqa\n")
    with pytest.raises(UsageError) as caught:
        find_task("openbokqa", own)
    said = str(caught.value)
    assert "unknown task 'openbokqa'" in said
    assert "'openbooksqa'" in said
    assert "'openbookqa'" in said
    assert f"{own} (colours, openbooksqa, spelling)" in said


def test_a_quoted_name_is_found() -> None:
    assert find_task("mmlu_astronomy").config["dataset_name"] == "astronomy"


def test_a_group_or_a_tag_is_said_to_be_one_with_its_tasks(
    include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index is that of these tasks alone: of all of the harness's it takes many seconds."""
    stock, index = Path(lm_eval.tasks.__file__).parent, lm_eval.tasks.TaskManager
    folders = [stock / "mmlu" / "default", stock / "arc"]
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path: index(include_path=[*folders, include_path], include_defaults=False),
    )
    own = shutil.copytree(include, tmp_path / "own")
    (own / "mine.yaml").write_text("group: mine\ntask: [ai2_arc, colours]\n")
    with pytest.raises(UsageError) as caught:
        find_task("mmlu", own)
    assert "57 tasks" in str(caught.value)
    assert {"mmlu_astronomy", "mmlu_world_religions"} <= set(re.findall(r"\w+", str(caught.value)))
    with pytest.raises(UsageError, match=r"3 tasks.*arc_challenge, arc_easy, colours"):
        find_task("mine", own)


def test_what_is_no_file_among_own_tasks_is_passed_over(include: Path, tmp_path: Path) -> None:
    shutil.copytree(include, tmp_path / "own")
    (tmp_path / "own" / "old.yaml").mkdir()
    (tmp_path / "own" / "gone.yaml").symlink_to("nowhere")
    assert find_task("colours", tmp_path / "own").own


def test_a_byte_order_mark_before_a_task_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"\xef\xbb\xbf" + b"task: spelling\n")
    assert find_task("spelling", tmp_path).own


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

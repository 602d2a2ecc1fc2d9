import json
import shutil
from pathlib import Path

import pytest

from fedproxy.errors import ArtifactError
from fedproxy.evaluation.loading import load_for_evaluation, load_for_training, read_splits


def test_only_the_scored_split_is_needed(data: Path, tmp_path: Path) -> None:
    for name, split in (("sst2", "validation"), ("arc_easy", "test")):
        (tmp_path / name).mkdir()
        shutil.copy(data / name / f"{split}.jsonl", tmp_path / name)
    loaded = load_for_evaluation(["sst2", "arc_easy"], data=tmp_path, include=None)
    assert [len(task.task_docs) for task in loaded.values()] == [7, 6]


def test_only_the_training_split_is_needed_for_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    shutil.copy(data / "sst2" / "train.jsonl", tmp_path / "sst2")
    assert len(load_for_training("sst2", split=None, data=tmp_path, include=None).task_docs) == 12


def test_missing_data_name_the_expected_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{tmp_path}/mnli/validation_matched.jsonl"):
        load_for_evaluation(["mnli"], data=tmp_path, include=None)
    with pytest.raises(ArtifactError, match=f"{tmp_path}/mnli/train.jsonl"):
        load_for_training("mnli", split=None, data=tmp_path, include=None)


def test_an_own_task_names_its_missing_file(include: Path, tmp_path: Path) -> None:
    shutil.copytree(include / "colours", tmp_path / "own")
    (tmp_path / "own" / "test.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"own/test\.jsonl"):
        load_for_evaluation(["colours"], data=None, include=tmp_path)
    with pytest.raises(ArtifactError, match=r"'validation'.*train, test"):
        load_for_training("colours", split="validation", data=None, include=tmp_path)


def test_a_task_without_anything_to_score_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n")
    with pytest.raises(ArtifactError, match=r"test_split.*validation_split"):
        load_for_evaluation(["own"], data=None, include=tmp_path)


def test_few_shot_examples_come_from_the_training_split(include: Path, tmp_path: Path) -> None:
    shutil.copytree(include / "colours", tmp_path / "own")
    (tmp_path / "own" / "shots.yaml").write_text("include: colours.yaml\ntask: shots\nnum_fewshot: 2\n")
    task = load_for_evaluation(["shots"], data=None, include=tmp_path)["shots"]
    task.set_fewshot_seed(seed=0)
    assert task.fewshot_context(doc=task.task_docs[0], num_fewshot=2).count(" river is") == 3
    (tmp_path / "own" / "train.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"train\.jsonl is missing"):
        load_for_evaluation(["shots"], data=None, include=tmp_path)


def test_other_file_formats_are_left_to_the_harness(include: Path, tmp_path: Path) -> None:
    shutil.copytree(include / "colours", tmp_path / "own")
    (tmp_path / "own" / "test.json").write_text('[{"text": "the red river", "colour": "red"}]')
    (tmp_path / "own" / "table.yaml").write_text(
        "include: colours.yaml\ntask: table\ndataset_kwargs:\n"
        f"  data_files: {{test: test.json}}\n  cache_dir: {tmp_path}/cache\n"
    )
    assert len(load_for_evaluation(["table"], data=None, include=tmp_path)["table"].task_docs) == 1


def test_a_template_that_does_not_fit_the_rows_is_named(include: Path, tmp_path: Path) -> None:
    shutil.copytree(include / "colours", tmp_path / "own")
    (tmp_path / "own" / "wrong.yaml").write_text("include: colours.yaml\ntask: wrong\ndoc_to_text: '{{nothing}}'\n")
    with pytest.raises(ArtifactError, match=r"'wrong'.*'nothing'"):
        load_for_evaluation(["wrong"], data=None, include=tmp_path)


def test_strings_stay_strings_and_missing_fields_are_none(tmp_path: Path) -> None:
    rows = [{"day": "2020-01-01", "label": 1}, {"day": "2021-01-01", "more": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_splits({"test": [str(path)]}, version=1.0)["test"])
    assert found == [{"day": "2020-01-01", "label": 1, "more": None}, {"day": "2021-01-01", "label": None, "more": "x"}]


def test_a_field_of_several_types_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": {"b": 1}}\n{"a": "text"}\n')
    with pytest.raises(ArtifactError, match="several types"):
        read_splits({"test": [str(path)]})

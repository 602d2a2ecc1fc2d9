import json
from pathlib import Path

from fedproxy.config import LLM, Compress, Evaluate, Experiment, Partition
from fedproxy.evaluation import training_rows
from fedproxy.pipeline import scored_tasks
from fedproxy.tuning import client_rows


def task_data(folder: Path) -> Path:
    (folder / "sst2").mkdir()
    rows = [{"sentence": f"film {i}", "label": i % 2, "idx": i} for i in range(20)]
    (folder / "sst2" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_task_is_cut_into_clients(tmp_path: Path) -> None:
    data = task_data(tmp_path)
    cut = Partition(task="sst2", rows=10, clients=3, scheme="iid")
    experiment = Experiment(LLM("x"), Compress(), partition=cut, seed=4, evaluate=Evaluate(data=str(data)))
    found = client_rows(experiment)
    assert list(found) == ["client-1", "client-2", "client-3"]
    assert sorted(map(len, found.values())) == [3, 3, 4]
    whole = training_rows("sst2", data=data, limit=10, seed=4)
    assert sorted(row["prompt"] for part in found.values() for row in part) == sorted(row["prompt"] for row in whole)
    assert scored_tasks(experiment) == ["sst2"]


def test_a_file_is_cut_after_so_many_rows_are_drawn(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": f" {i}"} for i in range(12)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def cut(**settings: int) -> list[str]:
        table = Partition(data=str(tmp_path / "all.jsonl"), clients=2, scheme="iid", **settings)
        found = client_rows(Experiment(LLM("x"), Compress(), partition=table))
        return [row["prompt"] for part in found.values() for row in part]

    assert sorted(cut(), key=int) == [str(i) for i in range(12)]
    assert len(set(cut(rows=5))) == len(cut(rows=5)) == 5
    assert scored_tasks(Experiment(LLM("x"), Compress(), partition=Partition(data="all.jsonl"))) == []

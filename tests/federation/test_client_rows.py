import json
from pathlib import Path

from fedproxy.config import LLM, Client, Compress, Evaluate, Experiment, Partition
from fedproxy.evaluation import training_rows
from fedproxy.evaluation.experiment import scored_tasks
from fedproxy.federation.client_rows import client_rows


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


def test_clients_that_share_a_task_draw_different_rows_while_they_last(tmp_path: Path) -> None:
    data = task_data(tmp_path)

    def drawn(*limits: int | None) -> list[list[str]]:
        clients = tuple(Client(f"c{i}", task="sst2", rows=rows) for i, rows in enumerate(limits))
        found = client_rows(Experiment(LLM("x"), Compress(), client=clients, seed=4, evaluate=Evaluate(data=str(data))))
        return [[row["prompt"] for row in found[client.name]] for client in clients]

    alone = [row["prompt"] for row in training_rows("sst2", data=data, limit=8, seed=4)]
    assert drawn(8) == [alone]
    first, second, whole = drawn(8, 7, None)
    assert first == alone
    assert (len(second), len(set(first + second)), len(whole)) == (7, 15, 20)
    first, second, third = drawn(8, 7, 25)
    assert first == alone
    assert sorted(third) == sorted(whole)
    first, second, third = drawn(8, 8, 8)
    assert len(set(first + second + third)) == 20
    assert third == [row for row in third if row not in second][:4] + first[:4]


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

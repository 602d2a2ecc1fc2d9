import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedproxy.config import LLM, Client, Compress, Evaluate, Experiment, Federate, Partition
from fedproxy.evaluation import training_rows
from fedproxy.evaluation.experiment import scored_tasks
from fedproxy.federation.client_rows import client_rows, hold_back, parted_rows


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


@given(st.integers(1, 60), st.floats(0, 0.5), st.integers(0, 9))
def test_a_part_is_kept_back_and_some_rows_are_always_left(count: int, share: float, seed: int) -> None:
    rows = [{"text": str(i)} for i in range(count)]
    own, held = hold_back(rows, share, seed, "bank")
    assert sorted(own + held, key=lambda row: int(row["text"])) == rows
    assert own == [row for row in rows if row not in held]
    assert held == [row for row in rows if row in held]
    expected = min(max(1, math.floor(share * count + 1e-9)), count - 1) if share else 0
    assert len(held) == expected
    assert hold_back(rows, share, seed, "bank") == (own, held)


def test_other_seeds_and_clients_keep_other_rows_back() -> None:
    rows = [{"text": str(i)} for i in range(40)]
    drawn = [hold_back(rows, 0.25, seed, name)[1] for seed, name in ((0, "bank"), (1, "bank"), (0, "shop"))]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_a_client_scores_on_what_it_wants(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(8)]
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"text": f"more {i}"}) for i in range(20)))

    def parted(share: float, **settings: object) -> tuple[int, int]:
        own, held = parted_rows(rows, share, 0, "bank", **settings)
        return len(own), len(held)

    assert parted(0.25) == (6, 2)
    assert parted(0.25, file=str(more)) == (8, 8)
    assert parted(0.25, scores=False) == parted(0.0, file=str(more)) == (8, 0)
    _, held = parted_rows(rows, 0.25, 0, "bank", file=str(more))
    assert all(row["text"].startswith("more") for row in held)
    assert len({row["text"] for row in held}) == 8


def test_a_task_brings_its_options_and_every_cut_keeps_a_part_back(tmp_path: Path) -> None:
    cut = Partition(task="sst2", clients=3, scheme="iid")
    evaluate, federate = Evaluate(data=str(task_data(tmp_path))), Federate(validation=0.2)
    found = client_rows(Experiment(LLM("x"), Compress(), partition=cut, evaluate=evaluate, federate=federate))
    assert [len(found.held[name]) for name in found] == [1, 1, 1]
    assert sum(len(found[name]) for name in found) == 17
    for row in found.held["client-1"]:
        options = row["options"]
        assert [completion for _, completion in options.pairs] == [" negative", " positive"]
        assert [options.pairs[i][1] for i in options.right] == [row["completion"]]

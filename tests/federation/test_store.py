from dataclasses import replace

import pytest
import torch

from fedproxy.errors import ArtifactError, ResourceError
from fedproxy.federation import store as store_module
from fedproxy.federation.messages import Closed
from fedproxy.federation.store import RoundStore


def closed(number):
    return Closed(number, {"w": torch.full((3,), float(number))}, {"w": torch.zeros(3)}, {}, {}, {"round": number})


def test_rounds_come_back_as_stored(tmp_path):
    store = RoundStore(tmp_path / "rounds")
    assert store.latest() is None
    for number in (1, 2):
        store.save(closed(number), seconds=1.5)
    last = store.latest()
    assert (last.round, last.adapter["w"].tolist()) == (2, [2.0, 2.0, 2.0])
    assert store.records() == [{"round": 1, "seconds": 1.5}, {"round": 2, "seconds": 1.5}]


def test_the_state_of_the_server_optimizer_comes_back_and_is_kept_as_long_as_the_adapter(tmp_path):
    store = RoundStore(tmp_path, keep=1)
    for number in (1, 2):
        store.save(replace(closed(number), server_state={"momentum.w": torch.full((3,), number / 2)}), seconds=1)
    assert store.latest().server_state["momentum.w"].tolist() == [1.0, 1.0, 1.0]
    assert [path.name for path in sorted((tmp_path / "0001").iterdir())] == ["round.json"]


def test_the_best_rounds_adapter_stays_for_as_long_as_it_is_the_best(tmp_path):
    store, held = RoundStore(tmp_path, keep=1), []
    for number, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        store.save(closed(number), seconds=1, best=best)
        held.append([int(path.parent.name) for path in sorted(tmp_path.glob("*/adapter.safetensors"))])
        assert store.adapter(best)["w"].tolist() == [best] * 3
    assert held == [[1], [1, 2], [1, 3], [4], [4, 5]]
    assert [int(path.parent.name) for path in tmp_path.glob("*/conflict.safetensors")] == [5]


def test_a_regularisers_state_comes_back_and_a_round_may_have_no_conflict(tmp_path):
    store = RoundStore(tmp_path)
    store.save(replace(closed(1), conflict={}, state={"w": torch.full((3,), 0.5)}), seconds=1)
    last = store.latest()
    assert (last.conflict, last.server_state, last.state["w"].tolist()) == ({}, {}, [0.5, 0.5, 0.5])
    assert not (tmp_path / "0001" / "conflict.safetensors").exists()


def test_a_half_written_round_does_not_count_and_is_cleared(tmp_path):
    store = RoundStore(tmp_path)
    store.save(closed(1), seconds=1)
    half = tmp_path / ".0002.tmp-abc"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    assert store.latest().round == 1
    assert not half.exists()


def test_a_gap_ends_the_count(tmp_path):
    store = RoundStore(tmp_path)
    for number in (1, 3):
        store.save(closed(number), seconds=1)
    assert store.count() == 1


def test_a_damaged_round_is_named(tmp_path):
    store = RoundStore(tmp_path)
    store.save(closed(1), seconds=1)
    path = tmp_path / "0001" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"0001/adapter\.safetensors"):
        store.latest()


def test_a_renamed_round_is_noticed(tmp_path):
    store = RoundStore(tmp_path)
    store.save(closed(2), seconds=1)
    (tmp_path / "0002").rename(tmp_path / "0001")
    with pytest.raises(ArtifactError, match="is of round 2, not 1"):
        store.latest()


def test_old_rounds_lose_their_tensors_and_keep_their_records(tmp_path):
    store = RoundStore(tmp_path, keep=2)
    for number in range(1, 5):
        store.save(closed(number), seconds=1)
    assert [sorted(p.name for p in (tmp_path / f"{n:04d}").iterdir()) for n in (1, 2)] == [["round.json"]] * 2
    assert all((tmp_path / f"{n:04d}" / "adapter.safetensors").exists() for n in (3, 4))
    assert (store.count(), store.latest().round, len(store.records())) == (4, 4, 4)


def test_what_a_kill_left_of_old_rounds_goes_with_the_next(tmp_path):
    for number in range(1, 4):
        RoundStore(tmp_path).save(closed(number), seconds=1)
    (tmp_path / "0002" / "adapter.safetensors").unlink()  # killed between the two
    RoundStore(tmp_path, keep=1).save(closed(4), seconds=1)
    assert [p.name for p in sorted(tmp_path.rglob("*.safetensors"))] == ["adapter.safetensors", "conflict.safetensors"]
    assert RoundStore(tmp_path).latest().adapter["w"].tolist() == [4.0, 4.0, 4.0]


def test_old_rounds_are_removed_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    store = RoundStore(tmp_path, keep=1)
    store.save(closed(1), seconds=1)

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_tensors", full)
    with pytest.raises(ResourceError):
        store.save(closed(2), seconds=1)
    assert store.latest().round == 1


def test_the_spool_is_empty_at_first_and_never_a_round(tmp_path):
    store = RoundStore(tmp_path)
    (store.spool() / "1").write_bytes(b"reply")
    assert list(store.spool().iterdir()) == []
    assert (store.count(), store.latest()) == (0, None)
    spool = store.spool()
    store.save(closed(1), seconds=1)
    assert not spool.exists()
    store.spool()
    assert store.latest().round == 1
    assert [p.name for p in tmp_path.iterdir()] == ["0001"]

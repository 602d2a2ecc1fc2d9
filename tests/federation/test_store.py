import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.coordinator import Closed
from fedproxy.federation.store import RoundStore


def closed(number):
    return Closed(number, {"w": torch.full((3,), float(number))}, {"w": torch.zeros(3)}, {"round": number})


def test_rounds_come_back_as_stored(tmp_path):
    store = RoundStore(tmp_path / "rounds")
    assert store.latest() is None
    for number in (1, 2):
        store.save(closed(number), seconds=1.5)
    last = store.latest()
    assert (last.round, last.adapter["w"].tolist()) == (2, [2.0, 2.0, 2.0])
    assert store.records() == [{"round": 1, "seconds": 1.5}, {"round": 2, "seconds": 1.5}]


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

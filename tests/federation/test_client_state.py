import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.client_state import ClientState, Memory


def memory(value: float) -> Memory:
    return Memory({"w": torch.tensor([value])}, {"w": torch.tensor([-value])})


def value(found: Memory) -> float | None:
    return None if found.residual is None else float(found.residual["w"])


def test_a_client_that_never_answered_remembers_nothing(tmp_path):
    assert ClientState(tmp_path / "x").before(0) == Memory()
    assert ClientState(tmp_path / "x").before(3) == Memory()
    assert not (tmp_path / "x").exists()


def test_what_a_round_ends_with_the_next_begins_with(tmp_path):
    state = ClientState(tmp_path / "x")
    state.after(1, 0, memory(1.0))
    found = ClientState(tmp_path / "x").before(1)
    assert (found.residual["w"].item(), found.state["w"].item()) == (1.0, -1.0)


def test_where_no_update_counted_there_is_nothing_whatever_lies_there(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, 0, memory(1.0))
    state.after(4, 1, memory(4.0))
    assert (state.before(0), state.before(3)) == (Memory(), Memory())


def test_a_round_that_is_repeated_begins_as_it_did_before(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, 0, memory(1.0))
    for _ in range(3):
        assert value(state.before(1)) == 1.0
        state.after(2, 1, memory(2.0))
    assert value(state.before(2)) == 2.0


def test_rounds_that_did_not_count_change_nothing(tmp_path):
    state = ClientState(tmp_path)
    state.after(2, 0, memory(2.0))
    for number in (3, 4, 7):
        assert value(state.before(2)) == 2.0
        state.after(number, 2, memory(number))
    assert (value(state.before(2)), value(state.before(7))) == (2.0, 7.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_old_order_that_is_answered_late_takes_nothing_away(tmp_path):
    state = ClientState(tmp_path)
    state.after(2, 0, memory(2.0))
    state.after(4, 2, memory(4.0))
    state.after(3, 2, memory(3.0))
    assert value(state.before(4)) == 4.0


def test_only_the_two_states_that_may_be_asked_for_are_kept(tmp_path):
    state = ClientState(tmp_path)
    for number in range(1, 12):
        state.after(number, number - 1, memory(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0011.safetensors", "0012.safetensors"]


def test_without_anything_to_remember_nothing_is_written(tmp_path):
    ClientState(tmp_path / "x").after(1, 0, Memory())
    assert not (tmp_path / "x").exists()


def test_a_residual_and_a_regularisers_state_come_alone_too(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, 0, Memory(state={"w": torch.ones(2)}))
    found = state.before(1)
    assert found.residual is None
    assert torch.equal(found.state["w"], torch.ones(2))


def test_a_damaged_state_is_told(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, 0, memory(1.0))
    (tmp_path / "0002.safetensors").write_bytes(b"\x01")
    with pytest.raises(ArtifactError, match=r"0002\.safetensors"):
        state.before(1)

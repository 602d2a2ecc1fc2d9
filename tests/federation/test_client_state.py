import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.client_state import ClientState, Memory


def memory(value: float) -> Memory:
    return Memory({"w": torch.tensor([value])}, {"w": torch.tensor([-value])})


def value(found: Memory) -> float | None:
    return None if found.residual is None else float(found.residual["w"])


def test_a_client_that_never_answered_remembers_nothing(tmp_path):
    assert ClientState(tmp_path / "x").before(1) == Memory()
    assert not (tmp_path / "x").exists()


def test_what_a_round_ends_with_the_next_begins_with(tmp_path):
    state = ClientState(tmp_path / "x")
    state.after(1, memory(1.0))
    found = ClientState(tmp_path / "x").before(2)
    assert (found.residual["w"].item(), found.control["w"].item()) == (1.0, -1.0)


def test_a_round_that_is_repeated_begins_as_it_did_before(tmp_path):
    state = ClientState(tmp_path)
    assert value(state.before(1)) is None
    state.after(1, memory(1.0))
    assert value(state.before(1)) is None
    for _ in range(3):
        assert value(state.before(2)) == 1.0
        state.after(2, memory(2.0))
    assert value(state.before(3)) == 2.0


def test_rounds_in_which_the_client_was_not_asked_change_nothing(tmp_path):
    state = ClientState(tmp_path)
    state.after(2, memory(2.0))
    assert value(state.before(7)) == 2.0
    state.after(7, memory(7.0))
    assert (value(state.before(7)), value(state.before(8))) == (2.0, 7.0)


def test_only_the_two_states_that_may_be_asked_for_are_kept(tmp_path):
    state = ClientState(tmp_path)
    for number in range(1, 12):
        state.after(number, memory(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0011.safetensors", "0012.safetensors"]


def test_without_anything_to_remember_nothing_is_written(tmp_path):
    ClientState(tmp_path / "x").after(1, Memory())
    assert not (tmp_path / "x").exists()


def test_a_residual_and_a_control_variate_come_alone_too(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, Memory(control={"w": torch.ones(2)}))
    found = state.before(2)
    assert found.residual is None
    assert torch.equal(found.control["w"], torch.ones(2))


def test_a_damaged_state_is_told(tmp_path):
    state = ClientState(tmp_path)
    state.after(1, memory(1.0))
    (tmp_path / "0002.safetensors").write_bytes(b"\x01")
    with pytest.raises(ArtifactError, match=r"0002\.safetensors"):
        state.before(2)

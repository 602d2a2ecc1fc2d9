"""What every regulariser must hold; a new row of `REGULARISERS` is tested without a line here."""

import dataclasses

import pytest
import torch

from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Federate
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.messages import Order
from fedproxy.federation.protocol import decode_order, encode_order, order_limit
from fedproxy.federation.settings import check_settings
from fedproxy.models.training import Training
from tests.federation.replies import reply

CPU = torch.device("cpu")
SHAPES = {"a": (2, 3), "b": (4,)}
every = pytest.mark.parametrize("row", REGULARISERS.values(), ids=REGULARISERS)
adding = pytest.mark.parametrize("row", [row for row in REGULARISERS.values() if row.penalty], ids=lambda row: row.name)
carrying = pytest.mark.parametrize(
    "row", [row for row in REGULARISERS.values() if row.carried], ids=lambda row: row.name
)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


CONFLICT = {name: value.abs().clamp(max=1) for name, value in drawn(9).items()}


def done(row, seed: int):
    """A client's round, with half of every number that the regulariser asks for."""
    numbers = dict.fromkeys(row.carried.numbers, 0.5)
    return dataclasses.replace(reply(f"client-{seed}"), update=drawn(seed), numbers=numbers)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def layout(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@every
def test_strength_and_penalty_come_together(row):
    assert (row.strength is None) == (row.penalty is None)
    assert row.penalty or not row.conflict


@every
@pytest.mark.parametrize("conflict", [None, CONFLICT])
def test_at_strength_zero_there_is_no_term(row, conflict):
    assert row.term(drawn(0), conflict, 0.0, CPU) is None


@adding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_term_is_a_float32_scalar_zero_at_the_anchor_and_grows_with_its_strength(row, dtype):
    anchor = drawn(0, dtype)
    once, twice = (row.term(anchor, CONFLICT, strength, CPU) for strength in (0.5, 1.0))
    assert once(anchor).item() == 0.0
    moved = {name: value.requires_grad_() for name, value in drawn(1, dtype).items()}
    value = once(moved)
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert 0 < value.item() == pytest.approx(twice(moved).item() / 2, rel=1e-5)
    value.backward()
    assert all(tensor.grad.isfinite().all() for tensor in moved.values())


@adding
def test_a_term_that_needs_the_conflict_is_none_without(row):
    assert (row.term(drawn(0), None, None, CPU) is None) == row.conflict


@carrying
def test_before_the_first_round_no_step_is_corrected(row):
    assert not any(tensor.any() for tensor in row.carried.drift(None, None).values())


@carrying
def test_states_have_the_layout_of_what_is_trained_and_what_is_given_stays(row):
    carried, given = row.carried, done(row, 1)
    server, own = drawn(2), drawn(3)
    for found in (
        carried.drift(server, own),
        carried.client(own, server, given),
        carried.client(None, None, given),
        carried.server(server, [given, done(row, 4)], 3),
        carried.server(None, [given], 1),
    ):
        assert layout(found) == layout(drawn(0))
    assert same(server, drawn(2))
    assert same(own, drawn(3))
    assert same(given.update, drawn(1))


@carrying
def test_the_servers_state_comes_back_from_an_order_to_the_bit_and_within_its_limit(row):
    state = row.carried.server(None, [done(row, 1), done(row, 2)], 2)
    data = encode_order(Order(2, drawn(0), state=state, since=1))
    assert same(decode_order(data).state, state)
    assert len(data) <= order_limit(drawn(0))


@carrying
def test_a_number_that_it_asks_for_is_one_of_a_training(row):
    trained = Training([1.0, 2.0], tokens=5, seconds=1.0, peak_memory=1, rate_sum=0.5)
    assert all(isinstance(getattr(trained, name), int | float) for name in row.carried.numbers)


@carrying
def test_alike_clients_are_none_of_them_odd(row):
    given = done(row, 1)
    row.carried.check(given)
    assert row.carried.odd(dict.fromkeys("abcd", given), 10.0) == {}


@carrying
def test_a_state_of_another_layout_is_refused(row):
    other = {"a": torch.zeros(1), "b": torch.zeros(4)}
    with pytest.raises(ArtifactError, match="a has shape"):
        row.carried.client(drawn(3), other, done(row, 1))
    with pytest.raises(ArtifactError, match="a has shape"):
        row.carried.server(other, [done(row, 1)], 1)


@every
@pytest.mark.parametrize("space", SPACES)
def test_what_builds_on_rounds_before_needs_a_space_that_lasts(row, space):
    settings = Federate(regulariser=row.name, space=space)
    if row.lasting and not SPACES[space].lasting:
        with pytest.raises(UsageError, match=f'"{row.name}".*"{space}"'):
            check_settings(settings)
    else:
        check_settings(settings)

"""Rounds of secure sums against the plain ones, against an oracle, and with clients that vanish or lie."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fedproxy.errors import FederationError
from fedproxy.federation.coordinator import Coordinator, QuorumError
from fedproxy.federation.messages import WORDS, Told
from fedproxy.federation.secure import client as client_module
from fedproxy.federation.secure.form import BOUND
from fedproxy.privacy.randomness import Randomness
from fedproxy.privacy.sums.fixed_point import restored, value_bits
from tests.federation.secure.party import NAMES, PHI, ROWS, SEVEN, STEPS, P, Party, flat, reply, table, update

STEP = BOUND / ((1 << value_bits(len(NAMES)) - 1) - 1)
"""The largest error of a value in a sum."""
H_TIES = {"merge": "h-ties"}


@pytest.fixture
def quantised(monkeypatch):
    """The values that clients masked, as they were rounded, in the order in which they were; the rounding is fixed."""
    made = []
    real = client_module.quantised

    def recorded(values, bound, bits, random):
        words = real(values, bound, bits, Randomness(len(made)))
        made.append(torch.from_numpy(restored(words, bound, bits)))
        return words

    monkeypatch.setattr(client_module, "quantised", recorded)
    return made


def shaped(values):
    a, b = values.split([24, 16])
    return {"a": a.view(4, 6), "b": b}


def plain_round(server, make, names=NAMES):
    server.begin(names)
    for name in names:
        order = server.order(name)
        assert server.receive(name, reply(name, order, make(name, order.round))) is None
    return server.close()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge_options": {"weights": "uniform"}},
        {"regulariser": "fedprox"},
        {"regulariser": "pcr"},
        {"server_optimizer": "fedavgm", "server_options": {"momentum": 0.5}},
        {"server_optimizer": "fedadam"},
        {"server_optimizer": "fedyogi"},
    ],
    ids=str,
)
def test_the_mean_is_that_of_the_plain_rounds(tmp_path, quantised, settings):
    """To the rounding of each value; and fed with the rounded values the plain rounds give the same float32 sums."""
    party, weighs = Party(tmp_path, **settings), not settings.get("merge_options")
    near, same = (Coordinator(NAMES, PHI, table(**{**settings, "secure": False})) for _ in range(2))
    for number in (1, 2):
        quantised.clear()
        closed = party.round()
        assert len(quantised) == len(NAMES)
        rounded = {
            name: shaped((values * (max(ROWS.values()) / ROWS[name] if weighs else 1)).float())
            for name, values in zip(NAMES, quantised, strict=True)
        }
        as_rounded = plain_round(same, lambda name, number, rounded=rounded: rounded[name])
        plain = plain_round(near, update)
        for name in PHI:
            assert torch.allclose(closed.adapter[name], as_rounded.adapter[name], rtol=1e-6, atol=2e-7)
            if "server_optimizer" not in settings:
                assert torch.allclose(closed.adapter[name], plain.adapter[name], rtol=0, atol=5 * STEP * number + 1e-6)
        assert list(closed.record["clients"]) == list(NAMES)
        assert closed.record["analysis"]["weights"] == pytest.approx(plain.record["analysis"]["weights"])


@pytest.mark.parametrize("names", [NAMES[:4]])
def test_of_uniform_powers_of_two_the_sum_is_exact(tmp_path, quantised, names):
    """Four clients: a quarter of a sum of whole steps is no rounding but the one of the result."""
    party = Party(tmp_path, names, merge_options={"weights": "uniform"})
    closed = party.round()
    whole = sum(np.rint(values.numpy() / BOUND * ((1 << value_bits(4) - 1) - 1)) for values in quantised)
    expected = torch.from_numpy(whole / ((1 << value_bits(4) - 1) - 1) * BOUND / 4).float()
    assert torch.equal(flat(closed.adapter), flat(PHI) + expected)


def test_on_a_frozen_a_only_b_is_summed(tmp_path):
    phi = {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.zeros(3, 2)}
    settings = table(space="frozen-a")
    changes = {name: {"l.lora_B.weight": torch.full((3, 2), 0.1 * k)} for k, name in enumerate(NAMES)}
    party = Party(tmp_path, make=lambda name, number: changes[name], space="frozen-a")
    party.server = Coordinator(NAMES, phi, settings, start=phi)
    party.clients = {
        name: client_module.SecureClient(
            party.identities[name], client_module.Form.of(settings), party.server._digest, ROWS[name], tmp_path / name
        )
        for name in NAMES
    }
    closed = party.round()
    assert torch.equal(closed.adapter["l.lora_A.weight"], phi["l.lora_A.weight"])
    mean = sum(0.1 * k * ROWS[name] for k, name in enumerate(NAMES)) / sum(ROWS[name] for name in NAMES)
    assert closed.adapter["l.lora_B.weight"].view(-1).tolist() == pytest.approx([mean] * 6, abs=1e-6)


@pytest.mark.parametrize("merge", ["mean", "h-ties"])
def test_the_conflict_that_pcr_goes_by_is_the_plain_one(tmp_path, merge):
    party = Party(tmp_path, merge=merge, regulariser="pcr")
    plain = Coordinator(NAMES, PHI, table(merge=merge, regulariser="pcr", secure=False))
    closed, expected = party.round(), plain_round(plain, update)
    assert all(torch.equal(closed.conflict[name], expected.conflict[name]) for name in PHI)
    for key in ("conflict_mean", "conflict_histogram"):
        assert closed.record["analysis"][key] == pytest.approx(expected.record["analysis"][key])
    party.server.begin(NAMES)
    plain.begin(NAMES)
    party.server._open.sums._steps = [("mask", "values")]  # what it will send with the training
    order = party.server._open.orders["v"]
    assert order.voters == plain.order("v").voters == 5
    assert all(torch.equal(order.conflict[name], plain.order("v").conflict[name]) for name in PHI)


def oracle(updates, weights, second=True, rho=1.1):
    """The docstring of `aggregation.sums` on stacked updates [K, P]: the merged update [P], and the agreements [K].

    Args:
        updates: Those that are summed.
        weights: Of each.
        second: Whether the second sum was opened.
        rho: ρ.
    """
    count, size = updates.shape
    merged = np.zeros(size)
    for coordinate, column in enumerate(updates.T):
        up, down = column > 0, column < 0
        p, n = weights[up] @ column[up], -weights[down] @ column[down]
        side, mass = (up, p - n) if p > n else (down, p - n)
        if second and up.sum() >= 3 and down.sum() >= 3:
            side, mass = (up, p) if p >= rho * n else (down, -n) if n >= rho * p else (up, 0.0)
        merged[coordinate] = mass / (side.sum() * weights.mean())
    signs = np.sign(updates)
    cosines = updates @ signs.T / (np.linalg.norm(updates, axis=1)[:, None] * np.sqrt(size))
    agreements = [(cosines[k].sum() - cosines[k, k]) / (count - 1) for k in range(count)]
    return merged, agreements


def stacked(number, names=NAMES):
    return np.stack([flat(update(name, number)).double().numpy() for name in names])


def test_h_ties_is_what_is_written_of_it(tmp_path):
    """Three rounds: weights follow from the agreement of the round before."""
    party, before, weights = Party(tmp_path, SEVEN, **H_TIES), flat(PHI), np.ones(7)
    for number in (1, 2, 3):
        closed = party.round()
        merged, told = oracle(stacked(number, SEVEN), weights)
        moved = (flat(closed.adapter) - before).double().numpy()
        assert moved == pytest.approx(merged, abs=1e-5)
        analysis, before = closed.record["analysis"], flat(closed.adapter)
        assert analysis["agreement"] == pytest.approx(told, abs=1e-6)
        assert analysis["heterogeneity"] == pytest.approx([1 - max(0, s) for s in told], abs=1e-6)
        assert analysis["weights"] == pytest.approx(weights / weights.sum())
        signs = np.sign(stacked(number, SEVEN))
        assert 0 < analysis["contested"] == np.mean(((signs > 0).sum(0) >= 3) & ((signs < 0).sum(0) >= 3)) < 1
        assert analysis["zero_fraction"] == np.mean(merged == 0)
        weights = np.exp(6 * np.abs(told)) / np.exp(6 * np.abs(told)).max()
    assert party.faults == []


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_a_client_that_vanishes_costs_itself_and_the_second_sum_at_most(tmp_path, step):
    """Whose masked words came is in the first sum; the second is over the same clients, or it is not opened."""
    party = Party(tmp_path, SEVEN, **H_TIES)
    closed = party.round(gone={"c": step})
    place = STEPS.index(step)
    counts = place > STEPS.index(("mask", "values"))
    names = [name for name in SEVEN if name != "c" or counts]
    second = not counts or place > STEPS.index(("mask", "positive"))
    merged, _ = oracle(stacked(1, names), np.ones(len(names)), second)
    assert (flat(closed.adapter) - flat(PHI)).double().numpy() == pytest.approx(merged, abs=1e-5)
    assert ("agreement" in closed.record["analysis"]) is second
    assert list(closed.record["clients"]) == names
    assert closed.record["dropouts"] == ([] if counts else ["c"])
    assert party.server.failures == ({} if counts else {"c": 1})
    assert party.faults == []
    again = party.round()
    assert list(again.record["clients"]) == list(SEVEN)
    assert (again.record["dropouts"], party.server.failures) == ([], {})


@pytest.mark.parametrize("step", [step for step in STEPS if step[1] != "positive"], ids=" ".join)
def test_without_a_second_sum_it_is_the_mean_of_the_others(tmp_path, step):
    party = Party(tmp_path)
    closed = party.round(gone={"x": step})
    counts = STEPS.index(step) > STEPS.index(("mask", "values"))
    names = [name for name in NAMES if name != "x" or counts]
    mean = np.average(stacked(1, names), axis=0, weights=[ROWS[name] for name in names])
    assert (flat(closed.adapter) - flat(PHI)).double().numpy() == pytest.approx(mean, abs=1e-6)
    assert list(closed.record["clients"]) == names
    assert closed.conflict == {}


@pytest.mark.parametrize("step", [("agree", "positive"), ("reveal", "positive")], ids=" ".join)
def test_whom_the_second_sum_lacks_the_first_has(tmp_path, step):
    """Fewer than two thirds are left of the second sum: the round is that of the first."""
    party = Party(tmp_path, SEVEN, **H_TIES)
    closed = party.round(gone=dict.fromkeys("abc", step))
    merged, _ = oracle(stacked(1, SEVEN), np.ones(7), second=False)
    assert (flat(closed.adapter) - flat(PHI)).double().numpy() == pytest.approx(merged, abs=1e-5)
    assert list(closed.record["clients"]) == list(SEVEN)
    assert list(party.round().record["clients"]) == list(SEVEN)
    assert party.faults == []


def test_fewer_than_two_thirds_open_nothing(tmp_path):
    party = Party(tmp_path, quorum=1)
    with pytest.raises(QuorumError, match="3 clients are left in the step reveal, a sum needs 4"):
        party.round(gone={"v": ("reveal", "values"), "w": ("reveal", "values")})


@pytest.mark.parametrize(
    ("step", "lie", "says"),
    [
        (("advertise", ""), {"numbers": {"rows": 0.0}}, "it has 0 rows"),
        (("advertise", ""), {"numbers": {"rows": 1.5}}, "it has 1.5 rows"),
        (("advertise", ""), {"numbers": {"rows": float("nan")}}, "it has nan rows"),
        (("advertise", ""), {"numbers": {}}, "does not say its rows"),
        (("advertise", ""), {"numbers": {"rows": 10.0, "agreement": 1.1}}, "agreement with the others is 1.1"),
        (("advertise", ""), {"letters": {"y": b"{}"}}, "not one letter of its own"),
        (("advertise", ""), {"letters": {"x": b"{}"}}, "x: its advert is not taken"),
        (("advertise", ""), {"step": "share"}, "it is of the step share"),
        (("share", ""), {"letters": {}}, "not for all other members"),
        (("share", ""), {"letters": dict.fromkeys("vwyz", b"")}, "x: its message of shares is not taken"),
        (("agree", "values"), {"letters": {}}, "not one letter of its own"),
        (("agree", "values"), {"letters": {"x": b""}}, "it is no signature"),
        (("agree", "values"), {"label": "positive"}, "it is of the step agree positive"),
        (("reveal", "values"), {"letters": {"x": b"{}"}}, "x: its answer on 'values'"),
        (("mask", "positive"), {"words": {}}, "no 40 masked words"),
        (("mask", "positive"), {"words": {WORDS: torch.zeros(P - 1, dtype=torch.uint32)}}, "no 40 masked words"),
        (("mask", "positive"), {"words": {WORDS: torch.zeros(P)}}, "no 40 masked words"),
        (("mask", "positive"), {"numbers": {"agreement": float("nan")}}, "agreement with the others is nan"),
        (("mask", "positive"), {"numbers": {"agreement": -1.5}}, "agreement with the others is -1.5"),
        (("mask", "positive"), {"client": "y"}, "it came under the name 'y'"),
        (("mask", "positive"), {"round": 7}, "it answers round 7"),
        (("mask", "values"), {"update": {WORDS: torch.zeros(P - 1, dtype=torch.uint32)}}, "no 80 masked words"),
        (("mask", "values"), {"update": update("x")}, "no 80 masked words"),
        (("mask", "values"), {"rows": 31}, "it trained on 31 rows, and said 30"),
        (("mask", "values"), {"steps": 0}, "nothing was trained"),
        (("mask", "values"), {"loss": float("nan")}, "nothing was trained"),
    ],
)
def test_a_lie_is_its_senders_fault_and_the_round_goes_on(tmp_path, step, lie, says):
    party = Party(tmp_path, **H_TIES)

    def told(name, now, said):
        return dataclasses.replace(said, **lie) if (name, now) == ("x", step) else said

    closed = party.round(change=told)
    [(name, when, fault)] = party.faults
    assert (name, when) == ("x", step)
    assert says in fault
    [entry] = closed.record["quarantined"]
    assert (entry["client"], entry["kind"], party.server.strikes) == ("x", "invalid", {"x": 1})
    counts = STEPS.index(step) > STEPS.index(("mask", "values"))
    assert list(closed.record["clients"]) == [name for name in NAMES if name != "x" or counts]


def test_an_answer_of_the_other_kind_is_its_senders_fault(tmp_path):
    party = Party(tmp_path, **H_TIES)
    party.server.begin(NAMES)
    order = dataclasses.replace(party.server.order("x"), adapter=PHI)
    assert "a step of secure sums was asked for" in party.server.receive("x", reply("x", order, update("x")))
    for name in set(NAMES) - {"x"}:
        party.server.receive(name, party.answer(name, party.server.order(name)))
    party.server.advance()
    plain = Coordinator(NAMES, PHI, table(secure=False))
    plain.begin(NAMES)
    assert "an update was asked for" in plain.receive("x", Told("x", 1, "advertise"))


def test_a_resumed_server_goes_on_alike(tmp_path):
    """Two parties of the same updates; one has its server made anew after each round."""
    whole, parts = (Party(tmp_path / name, regulariser="pcr", **H_TIES) for name in "12")
    records = []
    for _ in range(3):
        expected = whole.round(gone={"x": ("mask", "values")})
        closed = parts.round(gone={"x": ("mask", "values")})
        records.append(json.loads(json.dumps(closed.record)))
        parts.resume(closed, list(records))
        for key in ("weights", "agreement", "contested"):
            assert closed.record["analysis"][key] == pytest.approx(expected.record["analysis"][key], abs=1e-6)
        assert flat(closed.adapter).numpy() == pytest.approx(flat(expected.adapter).numpy(), abs=1e-5)
    assert parts.server.completed == 3
    follower, server = parts.server, whole.server
    for each in (follower, server):
        each.begin(NAMES)
    for name in NAMES:
        one, other = follower._open.orders[name], server._open.orders[name]
        assert one.voters == other.voters
        assert all(torch.equal(one.conflict[key], other.conflict[key]) for key in PHI)


def test_too_few_or_too_many_for_a_sum_are_told_before_anybody_is_asked(tmp_path):
    with pytest.raises(FederationError, match=r"needs 3 clients \(quorum 1\), there are 2.*fewer than 3"):
        Party(tmp_path, ("v", "w"), quorum=1).round()
    names = [f"client-{number:03d}" for number in range(256)]
    with pytest.raises(FederationError, match=r"256 clients.*255"):
        Coordinator(names, PHI, table()).begin(names)

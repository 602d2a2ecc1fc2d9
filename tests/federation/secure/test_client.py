"""What a client refuses: all that would give its update away."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fedproxy.errors import ArtifactError, FederationError, SumsError
from fedproxy.federation.coordinator import QuorumError
from fedproxy.federation.secure import client as client_module
from fedproxy.privacy.sums.fixed_point import packed_counts, restored, value_bits
from tests.federation.secure.party import NAMES, PHI, SEVEN, STEPS, Party, flat, reply, update

H_TIES = {"merge": "h-ties"}


def contested(names):
    """Where three of the clients move a coordinate up, and three down."""
    signs = np.sign(np.stack([flat(update(name)).numpy() for name in names]))
    return ((signs > 0).sum(0) >= 3) & ((signs < 0).sum(0) >= 3)


class Asking:
    """A party of which one client is asked by hand: a step's order to "x", as the server changed it."""

    def __init__(self, folder, **settings):
        self.party = Party(folder, **settings)
        self.party.server.begin(NAMES)

    def until(self, step):
        """Go on to a step, and give what it asks of "x"."""
        server = self.party.server
        while (order := server.order("x")) and (order.ask.step, order.ask.label) != step:
            for name in server.asked:
                given = server.order(name)
                assert server.receive(name, self.party.carried(name, given, self.party.answer(name, given))) is None
            assert server.advance()
        return order

    def says(self, order, **changes):
        changed = dataclasses.replace(order, ask=dataclasses.replace(order.ask, **changes))
        client = self.party.clients["x"]
        if changed.kind == "sum":
            return client.told(changed, changed.ask)
        return client.masked(changed, changed.ask, reply("x", changed, update("x")))


def test_a_threshold_of_less_than_two_thirds_is_refused(tmp_path):
    asking = Asking(tmp_path)
    order = asking.until(("share", ""))
    with pytest.raises(SumsError, match="a sum of 3 of 5 clients is asked for; it needs 4"):
        asking.says(order, threshold=3)
    assert asking.says(order).letters.keys() == set(NAMES) - {"x"}


@pytest.mark.parametrize("size", [0, 39, 41])
def test_counts_of_another_length_are_refused(tmp_path, size):
    asking = Asking(tmp_path, **H_TIES)
    order = asking.until(("mask", "positive"))
    with pytest.raises(FederationError, match="40 counts"):
        asking.says(order, counts=torch.zeros(size, dtype=torch.uint32))
    with pytest.raises(FederationError, match="40 counts"):
        asking.says(order, counts=None)
    assert asking.says(order).words


def test_a_second_mask_of_one_sum_is_refused(tmp_path):
    asking = Asking(tmp_path, **H_TIES)
    order = asking.until(("mask", "positive"))
    asking.says(order)
    with pytest.raises(SumsError, match="asked twice"):
        asking.says(order)


def test_nobody_has_more_rows_than_the_most(tmp_path):
    asking = Asking(tmp_path)
    order = asking.until(("mask", "values"))
    with pytest.raises(SumsError, match="30 rows, and the server says that nobody has more than 29"):
        asking.says(order, top=29.0)


@pytest.mark.parametrize("step", STEPS[1:], ids=" ".join)
def test_a_client_that_was_started_anew_is_out_of_the_round(tmp_path, step):
    asking = Asking(tmp_path, **H_TIES)
    order = asking.until(step)
    asking.party.clients["x"] = asking.party.started("x")
    with pytest.raises(FederationError, match="round 1, attempt 0: this client has no keys for it"):
        asking.says(order)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("merge", ["mean", "h-ties"])
def test_a_second_sum_of_a_round_over_other_clients_is_refused(tmp_path, anew, merge):
    """The server opened a sum of all and says that it knows nothing of it; then it leaves "z" out."""
    party = Party(tmp_path, merge=merge)
    party.round()
    party.server = Party(tmp_path, merge=merge).server
    if anew:
        party.clients = {name: party.started(name) for name in NAMES}
    with pytest.raises(QuorumError):
        party.round(there=NAMES[:4])
    assert {name for name, _, fault in party.faults if "was opened before, over other clients" in fault} == set("vwxy")
    party.faults.clear()
    assert list(party.round().record["clients"]) == list(NAMES)  # of all again it is the same sum
    assert party.faults == []


def test_a_second_sum_of_a_round_of_other_weights_is_refused(tmp_path):
    party = Party(tmp_path)
    party.round()
    party.server = Party(tmp_path).server
    real = party.answer

    def answer(name, order):
        heavier = dataclasses.replace(order.ask, top=60.0) if order.ask.step == "mask" else order.ask
        return real(name, dataclasses.replace(order, ask=heavier))

    party.answer = answer
    with pytest.raises(QuorumError):
        party.round()
    assert {name for name, _, fault in party.faults if "or of other values" in fault} == set(NAMES)


def test_the_second_sum_has_the_words_of_the_first(tmp_path, monkeypatch):
    """A server that names other weights with the second sum gets the same values, not the same ones weighted anew."""
    masked = {}
    real = client_module.Member.mask

    def recorded(self, label, words, *rest):
        masked.setdefault(label, []).append(words.copy())
        return real(self, label, words, *rest)

    monkeypatch.setattr(client_module.Member, "mask", recorded)
    party = Party(tmp_path, SEVEN, **H_TIES)
    answer = party.answer

    def other(name, order):
        changed = {"top": 0.0, "usual": 0.9} if order.ask.label == "positive" else {}
        return answer(name, dataclasses.replace(order, ask=dataclasses.replace(order.ask, **changed)))

    party.answer = other
    party.round()
    both = contested(SEVEN)
    assert 0 < both.mean() < 1
    for name, first, second in zip(SEVEN, masked["values"], masked["positive"], strict=True):
        assert second.tolist() == np.where(both & (flat(update(name)).numpy() > 0), first[40:], 0).tolist()


def test_a_round_before_the_last_one_is_not_opened_again(tmp_path):
    party = Party(tmp_path)
    party.round()
    party.round()
    party.server = Party(tmp_path).server
    with pytest.raises(QuorumError):
        party.round()
    assert {name for name, _, fault in party.faults if "the sum values of round 1 was opened before" in fault}


def spoilt(party, label, **differs):
    """Tell the client "a" something else than the others when it is to mask a sum."""
    real = party.answer

    def answer(name, order):
        if (name, order.ask.step, order.ask.label) == ("a", "mask", label):
            order = dataclasses.replace(order, ask=dataclasses.replace(order.ask, **differs))
        return real(name, order)

    party.answer = answer
    return party


@pytest.mark.parametrize("differs", [{"top": 0.9}, {"usual": 0.5}], ids=str)
def test_who_is_told_something_else_than_the_others_spoils_the_sum(tmp_path, differs):
    """The values of one client alone, or beside next to nothing of the others', do not come out: nothing does."""
    party, other = (Party(tmp_path / name, SEVEN, **H_TIES) for name in ("good", "spoilt"))
    good, bad = (each.round().adapter for each in (party, spoilt(other, "values", **differs)))
    moved = {kind: max(float(a[name].abs().max()) for name in a) for kind, a in (("good", good), ("bad", bad))}
    assert moved["good"] < 2 < 5 < moved["bad"]  # uniform words stand for values of up to the bound, 64


def test_who_is_told_other_counts_than_the_others_spoils_the_second_sum(tmp_path):
    party = Party(tmp_path, SEVEN, **H_TIES)
    everywhere = torch.from_numpy(3 * packed_counts([np.ones(40), np.ones(40)], 7))
    opened = []
    real = party.server._form
    closed = spoilt(party, "positive", counts=everywhere).round(
        seen=lambda: opened.append(party.server._open and party.server._open.sums._opened.get("positive"))
    )
    [words] = [words for words in opened if words is not None][:1]
    values = restored(words, real.reach(5), value_bits(7))
    assert np.abs(values).mean() > 5  # uniform words, not a sum of updates
    moved = flat(closed.adapter) - flat(PHI)
    assert float(moved[contested(SEVEN)].abs().max()) == 0.0  # of two such masses none is 1.1 times the other


def test_the_weight_is_the_clients_own_whatever_the_server_says(tmp_path):
    """A top below all agreements makes all weights one, and none larger."""
    form = Party(tmp_path, **H_TIES).clients["x"]._form
    assert [form.weight(10, own, 5, -1.0) for own in (0.1, -0.9)] == [1.0, 1.0]
    assert form.weight(10, 0.5, 5, 1.0) < form.weight(10, 0.9, 5, 1.0) < 1.0
    by_rows = Party(tmp_path).clients["x"]._form
    assert by_rows.weight(10, 0.9, 5, 40.0) == 0.25


@pytest.mark.parametrize("length", [0.0, 10.0, 1e6])
def test_an_update_is_shortened_to_the_bound(tmp_path, length):
    def make(name, number):
        made = {"a": torch.zeros(4, 6), "b": torch.zeros(16)}
        made["a"][0, 0] = length
        return made

    closed = Party(tmp_path, make=make, max_norm=8.0).round()
    assert float(closed.adapter["a"][0, 0]) == pytest.approx(min(length, 8.0) - 1, abs=1e-5)  # it began at -1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_diverged_is_the_clients_own_failure(tmp_path, value):
    def make(name, number):
        return {**update(name), "b": torch.full((16,), value)} if name == "x" else update(name)

    for settings in ({}, H_TIES):
        party = Party(tmp_path / str(len(settings)), make=make, **settings)
        closed = party.round()
        assert [(name, step[0]) for name, step, _ in party.faults] == [("x", "mask")]
        assert closed.record["refused"][0]["kind"] == "failed"
        assert len(closed.record["clients"]) == 4


@pytest.mark.parametrize("content", ["[]", "{}x", '{"round": "1"}', '{"round": 1, "opened": [], "agreement": {}}'])
def test_a_damaged_note_is_told(tmp_path, content):
    asking = Asking(tmp_path)
    order = asking.until(("advertise", ""))
    note = tmp_path / "clients" / "x" / "sums.json"
    note.parent.mkdir(parents=True)
    note.write_text(content)
    with pytest.raises(ArtifactError, match=r"sums\.json"):
        asking.says(order)


def test_the_note_says_what_was_opened_and_no_more(tmp_path):
    party = Party(tmp_path, **H_TIES)
    for _ in range(3):
        party.round()
    note = json.loads((tmp_path / "clients" / "x" / "sums.json").read_text())
    assert note["round"] == 3
    assert {label: opened[0] for label, opened in note["opened"].items()} == {"values": [*NAMES], "positive": [*NAMES]}
    assert set(note["agreement"]) == {"2", "3"}


def test_a_lost_note_is_no_agreement_and_the_others_go_on(tmp_path):
    """A client without an agreement of the round before counts as the others do on average."""
    party = Party(tmp_path, **H_TIES)
    party.round()
    (tmp_path / "clients" / "x" / "sums.json").unlink()
    told = {}

    def change(name, step, said):
        if step == ("advertise", ""):
            told[name] = said.numbers.get("agreement")
        return said

    closed = party.round(change=change)
    assert told.pop("x") is None
    assert party.faults == []
    usual = sum(told.values()) / 4
    masses = torch.tensor([4 * abs(told.get(name, usual)) for name in NAMES]).softmax(0)
    assert closed.record["analysis"]["weights"] == pytest.approx(masses.tolist(), rel=1e-5)

"""A server that lies to members, and members that lie to each other."""

from itertools import product

import numpy as np
import pytest

from fedproxy.errors import SumsError
from fedproxy.privacy.sums import protocol
from fedproxy.privacy.sums.protocol import Advert, Answer, encoded
from fedproxy.privacy.sums.ring import add_mask
from fedproxy.privacy.sums.shares import combined
from tests.privacy.sums import parties
from tests.privacy.sums.parties import CONTEXT, IDENTITIES, LABELS

LABEL = LABELS[0]
WORDS = {name: np.full(8, 1000 + place, np.uint32) for place, name in enumerate("abcde")}


def test_a_swapped_public_key_is_not_its_members():
    group = parties.members(3)
    adverts = parties.advertised(group, 2).adverts()
    said = Advert.decode(adverts["b"], LABELS)
    for own in (Advert(b"\x09" * 32, said.labels, said.signature), Advert(said.sealing, said.labels, b"x" * 70)):
        with pytest.raises(SumsError, match="b: its registered key did not sign"):
            group["a"].share({**adverts, "b": encoded(own)}, 2)
    with pytest.raises(SumsError, match="b: its registered key did not sign"):
        group["a"].share({**adverts, "b": adverts["c"]}, 2)


def test_a_replayed_advert_of_another_context_is_refused():
    group = parties.members(3)
    before = parties.members(3, context=b"run 1, round 2, attempt 2")
    adverts = parties.advertised(group, 2).adverts()
    with pytest.raises(SumsError, match="c: its registered key did not sign"):
        group["a"].share({**adverts, "c": before["c"].advertise()}, 2)


def test_an_advert_of_somebody_unregistered_and_rubbish_are_refused_by_name():
    group = parties.members(3)
    adverts = parties.advertised(group, 2).adverts()
    with pytest.raises(SumsError, match="eve: no key is registered"):
        group["a"].share({**adverts, "eve": adverts["b"]}, 3)
    with pytest.raises(SumsError, match="b: its advert cannot be used"):
        group["a"].share({**adverts, "b": b"rubbish"}, 2)


def test_a_member_sees_when_its_own_advert_was_changed():
    group = parties.members(3)
    adverts = parties.advertised(group, 2).adverts()
    for own in ({**adverts, "a": parties.members(1)["a"].advertise()}, dict.fromkeys("bcd", adverts["b"])):
        with pytest.raises(SumsError, match="another advert of this member"):
            group["a"].share(own, 2)


def test_a_key_of_small_order_names_its_member():
    """Its owner signed it, so only the key itself tells."""
    group = parties.members(3)
    adverts = parties.advertised(group, 2).adverts()
    said = Advert.decode(adverts["b"], LABELS)
    statement = protocol.advert_statement(CONTEXT, "b", bytes(32), said.labels)
    adverts["b"] = encoded(Advert(bytes(32), said.labels, IDENTITIES["b"].sign(statement)))
    with pytest.raises(SumsError, match="b: its advert cannot be used"):
        group["a"].share(adverts, 2)


def packets(group, threshold, adverts=None):
    adverts = adverts or parties.advertised(group, threshold).adverts()
    return {name: member.share(adverts, threshold) for name, member in group.items()}


def test_a_packet_for_or_of_another_member_or_setup_cannot_be_opened():
    group, again = parties.members(4), parties.members(4)
    sealed, others = packets(group, 3), packets(again, 3)
    right = {name: sealed[name]["a"] for name in "bcd"}
    for wrong in (sealed["b"]["c"], sealed["c"]["a"], sealed["a"]["b"], others["b"]["a"]):
        with pytest.raises(SumsError, match="b: its packet is not for this member"):
            group["a"].mask(LABEL, WORDS["a"], {**right, "b": wrong})
    with pytest.raises(SumsError, match="a: the server passes on a packet of someone who takes no part"):
        group["a"].mask(LABEL, WORDS["a"], {**right, "a": sealed["a"]["b"]})
    with pytest.raises(SumsError, match="e: the server passes on"):
        group["a"].mask(LABEL, WORDS["a"], {**right, "e": right["b"]})
    with pytest.raises(SumsError, match="Only 2 members"):
        group["a"].mask(LABEL, WORDS["a"], {"b": right["b"]})
    group["a"].mask(LABEL, WORDS["a"], right)
    with pytest.raises(SumsError, match="changed who takes part"):
        group["a"].mask(LABELS[1], WORDS["a"], {name: right[name] for name in "bc"})
    group["a"].mask(LABELS[1], WORDS["a"], right)


@pytest.mark.parametrize("lie", ["threshold", "group"])
def test_members_that_were_told_of_another_threshold_or_group_cannot_work_together(lie):
    group = parties.members(5)
    adverts = parties.advertised(group, 3).adverts()
    sealed = {name: group[name].share(adverts, 3) for name in "bcde"}
    if lie == "threshold":
        group["a"].share(adverts, 4)
    else:
        group["a"].share({name: adverts[name] for name in "abcd"}, 3)
    with pytest.raises(SumsError, match="b: its packet is not for this member, run, round, attempt and group"):
        group["a"].mask(LABEL, WORDS["a"], {name: sealed[name]["a"] for name in "bcd"})


def masked(group, threshold, dealers=None):
    """All members' masked words; dealers says of whom each gets packets, of all if it is not named."""
    sealed = packets(group, threshold)
    return {
        name: member.mask(
            LABEL, WORDS[name], {o: sealed[o][name] for o in (dealers or {}).get(name, group) if o != name}
        )
        for name, member in group.items()
    }


@pytest.mark.parametrize("lost_to", list(product([True, False], repeat=4)))
def test_both_kinds_of_shares_of_one_member_are_never_enough(lost_to):
    """The server tells each of four others what it likes of member a, and then the contrary."""
    group = parties.members(5)
    masked(group, 3)
    seeds, keys = set(), set()
    for name, lost in zip("abcde", (False, *lost_to), strict=True):
        for first in (lost, not lost):
            survivors = [o for o in group if not (first and o == "a")]
            try:
                answer = Answer.decode(group[name].reveal(LABEL, survivors), survivors, group.keys() - set(survivors))
            except SumsError:
                continue
            (keys if "a" in answer.keys else seeds).add(name)
    assert not seeds & keys, "nobody gives both"
    assert len(seeds) + len(keys) == 5
    assert not (len(seeds) >= 3 and len(keys) >= 3)


SPLIT = {"a": "abc", "b": "abd", "c": "acd", "d": "ade", "e": "ade"}
"""Whom the server calls survivors, to each member; a got packets of b and c only."""


def test_different_survivors_for_each_can_isolate_a_member_without_agreements():
    """Nobody lies but the server, the threshold is above half, and everybody answers once: why message 4 exists."""
    group = parties.members(5)
    sent = masked(group, 3, {"a": "bc"})
    keys = {"a": "abc"}
    answers = {
        name: Answer.decode(
            group[name].reveal(LABEL, SPLIT[name]), SPLIT[name], set(keys.get(name, "abcde")) - set(SPLIT[name])
        )
        for name in group
    }
    points = {name: point for point, name in enumerate("abcde", 1)}
    bound_to = group["a"]._transcript

    def secret(kind, dealer):
        shares = {points[name]: getattr(each, kind).get(dealer) for name, each in answers.items()}
        return combined(dict([(point, share) for point, share in shares.items() if share][:3]))

    words = sent["a"].copy()
    add_mask(words, protocol.self_mask_key(secret("seeds", "a"), bound_to, LABEL, "a"), subtract=True)
    public = group["a"]._adverts["a"].labels[LABEL].key
    for lost in "bc":
        key = protocol.pair_mask_key(secret("keys", lost), public, bound_to, LABEL, "a", lost)
        add_mask(words, key, subtract=True)
    assert np.array_equal(words, WORDS["a"])


def test_with_agreements_different_survivors_for_each_open_nothing():
    group = parties.members(5, agreement=True)
    masked(group, 3, {"a": "bc"})
    signed = {name: group[name].agree(LABEL, SPLIT[name]) for name in group}
    for name in group:
        with pytest.raises(SumsError, match="members signed who survived"):
            group[name].reveal(LABEL, SPLIT[name], signed)


def test_with_a_threshold_of_two_thirds_no_member_can_be_isolated():
    """A member that masked with s - 1 others is alone when t shares of each one's key come out.

    Nobody gives a share of its own key, for it would have to call itself lost, and each answer gives at most
    min(n - t, those others whose key it may give) of them, the member's own at most s - t.
    """
    for members in range(3, 200):
        threshold = -(-2 * members // 3)
        for others in range(threshold - 1, members):
            given = (
                min(others + 1 - threshold, members - threshold)
                + others * min(others - 1, members - threshold)
                + (members - 1 - others) * min(others, members - threshold)
            )
            assert given < others * threshold

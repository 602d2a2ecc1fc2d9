import numpy as np
import pytest

from fedproxy.errors import ArtifactError, SumsError, UsageError
from fedproxy.privacy.sums import protocol
from fedproxy.privacy.sums.protocol import Packet, Secrets, encoded
from tests.privacy.sums import parties
from tests.privacy.sums.parties import LABELS

RNG = np.random.default_rng(0)
WORDS = {name: RNG.integers(0, 2**32, 50, np.uint32) for name in parties.NAMES}


def after_masks(count=5, threshold=3, lost=""):
    group = parties.members(count)
    tally = parties.shared(group, threshold)
    maskers = [name for name in group if name not in lost]
    return group, tally, parties.masked(group, tally, "signs", WORDS, maskers)


@pytest.mark.parametrize("lost", ["", "b"])
def test_the_server_keeps_nothing_of_a_single_member(lost):
    group = parties.members(5)
    tally = parties.shared(group, 3)
    secrets = {name: member._secrets["signs"] for name, member in group.items()}
    maskers = [name for name in group if name not in lost]
    hidden = {name: group[name].mask("signs", WORDS[name], tally.packets_for(name)) for name in maskers}
    for name in maskers:
        tally.masked("signs", name, hidden[name])
    parties.revealed(group, tally, "signs", tally.survivors("signs"))
    held = parties.everything(tally)
    assert sum(hidden.values()).tobytes() in held, "the search finds what is there"
    for name in maskers:
        for own in (WORDS[name], hidden[name], hidden[name] - WORDS[name]):
            assert not any(own[:4].tobytes() in each for each in held)
    for secret in secrets.values():
        assert not any(secret.seed in each or secret.key in each for each in held)


def test_a_sum_is_opened_by_as_many_as_the_threshold():
    group, tally, survivors = after_masks(lost="e")
    for name in "ab":
        tally.revealed("signs", name, group[name].reveal("signs", survivors))
    with pytest.raises(SumsError, match="2 members opened 'signs'; the threshold is 3"):
        tally.opened("signs")
    expected = sum(WORDS[name] for name in "abcd")
    assert np.array_equal(parties.revealed(group, tally, "signs", survivors, "d"), expected)
    assert np.array_equal(tally.opened("signs"), expected), "a second time, too"


def test_a_wrong_share_names_who_answered_with_it():
    group, tally, survivors = after_masks(lost="e")
    said = protocol.Answer.decode(group["b"].reveal("signs", survivors), survivors, "e")
    for wrong in (
        protocol.Answer({**said.seeds, "c": bytes(16)}, said.keys),
        protocol.Answer(said.seeds, {"e": bytes(32)}),
    ):
        with pytest.raises(ArtifactError, match=r"^b: .*that [ce] gave it"):
            tally.revealed("signs", "b", encoded(wrong))
    assert np.array_equal(
        parties.revealed(group, tally, "signs", survivors, "acd"), sum(WORDS[name] for name in "abcd")
    ), "the others open it without"


def test_a_wrong_share_of_its_own_seed_names_the_member():
    group, tally, survivors = after_masks()
    said = protocol.Answer.decode(group["a"].reveal("signs", survivors), survivors, "")
    tally.revealed("signs", "a", encoded(protocol.Answer({**said.seeds, "a": bytes(16)}, {})))
    with pytest.raises(SumsError, match=r"^a: "):
        parties.revealed(group, tally, "signs", survivors, "bc")


@pytest.mark.parametrize("kind", ["seed", "key"])
def test_a_member_that_shares_something_else_than_it_advertised_is_named(kind):
    group = parties.members(5)
    liar = group["b"]
    own = liar._secrets["signs"]
    liar._secrets["signs"] = Secrets(bytes(16), own.key) if kind == "seed" else Secrets(own.seed, bytes(32))
    tally = parties.shared(group, 3)
    maskers = "abcde" if kind == "seed" else "acde"
    survivors = parties.masked(group, tally, "signs", WORDS, maskers)
    with pytest.raises(SumsError, match=r"^b: the shares it dealt"):
        parties.revealed(group, tally, "signs", survivors)


def test_messages_come_once_and_in_their_order():
    group = parties.members(4)
    tally = parties.advertised(group, 3)
    with pytest.raises(ArtifactError, match=r"a: .*twice"):
        tally.advertised("a", group["a"].advertise())
    with pytest.raises(ArtifactError, match=r"a: .*wrong time"):
        tally.shared("a", {})
    adverts = tally.adverts()
    with pytest.raises(ArtifactError, match=r"e: .*too late"):
        tally.advertised("e", group["a"].advertise())
    packets = {name: member.share(adverts, 3) for name, member in group.items()}
    for name in "abc":
        tally.shared(name, packets[name])
    with pytest.raises(ArtifactError, match=r"a: .*twice"):
        tally.shared("a", packets["a"])
    with pytest.raises(ArtifactError, match=r"e: .*no advert"):
        tally.shared("e", packets["a"])
    with pytest.raises(ArtifactError, match=r"a: .*no keys"):
        tally.masked("signs", "a", WORDS["a"])
    tally.packets_for("a")
    with pytest.raises(ArtifactError, match=r"d: .*wrong time"):
        tally.shared("d", packets["d"])
    with pytest.raises(ArtifactError, match=r"d: .*no keys"):
        tally.masked("signs", "d", WORDS["d"])
    tally.masked("signs", "a", WORDS["a"])
    for label, name, words, says in [
        ("signs", "a", WORDS["a"], "twice"),
        ("signs", "b", WORDS["b"][:-1], "49 words, others 50"),
        ("signs", "b", WORDS["b"].astype(np.int64), "uint32"),
        ("signs", "b", None, "uint32"),
        ("values", "b", WORDS["b"], "no part in an earlier sum"),
    ]:
        with pytest.raises(ArtifactError, match=f"{name}: .*{says}"):
            tally.masked(label, name, words)
    with pytest.raises(ArtifactError, match=r"a: .*no survivor"):
        tally.revealed("signs", "a", b"")
    assert tally.survivors("signs") == ("a",)
    with pytest.raises(ArtifactError, match=r"c: .*too late"):
        tally.masked("signs", "c", WORDS["c"])
    with pytest.raises(ArtifactError, match=r"b: .*no survivor"):
        tally.revealed("signs", "b", b"")
    with pytest.raises(ArtifactError, match=r"b: .*no survivor"):
        tally.agreed("signs", "b", b"x" * 70)
    with pytest.raises(ArtifactError, match=r"a: .*no signature"):
        tally.agreed("signs", "a", b"x" * 1000)


def test_packets_are_for_all_others_and_for_nobody_else():
    group = parties.members(4)
    tally = parties.advertised(group, 3)
    packets = group["a"].share(tally.adverts(), 3)
    for wrong in ({}, {**packets, "z": packets["b"]}, {**packets, "a": packets["b"]}, dict(list(packets.items())[1:])):
        with pytest.raises(ArtifactError, match=r"a: .*all other members"):
            tally.shared("a", wrong)
    tally.shared("a", packets)


def test_an_unknown_label_is_the_callers_fault():
    _, tally, _ = after_masks()
    with pytest.raises(UsageError, match="none of the sums"):
        tally.opened("others")


def test_the_wrong_commitments_of_a_dealer_are_found_by_the_holder():
    """So no dealer can make an honest holder's share look false to the server."""
    group = parties.members(3)
    tally = parties.advertised(group, 2)
    adverts = tally.adverts()
    packets = {name: member.share(adverts, 2) for name, member in group.items()}
    read = Packet.decode(packets["b"]["a"], LABELS)
    false = {**read.commitments, "signs": Secrets(bytes(32), read.commitments["signs"].key)}
    packets["b"]["a"] = encoded(Packet(false, read.sealed))
    for name, each in packets.items():
        tally.shared(name, each)
    with pytest.raises(SumsError, match="b: its packet cannot be used: its commitments"):
        group["a"].mask("signs", WORDS["a"], tally.packets_for("a"))


def test_a_survivors_key_of_small_order_names_it():
    """Honest members would not have masked with it, so only a group that agreed on it brings it to the opening."""
    group, tally, survivors = after_masks(lost="e")
    for name in survivors:
        tally.revealed("signs", name, group[name].reveal("signs", survivors))
    said = tally._read["b"].labels["signs"]
    tally._read["b"].labels["signs"] = Secrets(said.seed, bytes(32))
    with pytest.raises(SumsError, match=r"^b: the key"):
        tally.opened("signs")

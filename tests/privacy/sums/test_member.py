import numpy as np
import pytest

from fedproxy.errors import SumsError, UsageError
from fedproxy.privacy.sums import Member
from tests.privacy.sums import parties
from tests.privacy.sums.parties import CONTEXT, IDENTITIES, LABELS

WORDS = {name: np.arange(4, dtype=np.uint32) + place for place, name in enumerate("abcdefgh")}


def test_three_members_by_hand():
    """[0, 1, 2, 3] + [1, 2, 3, 4] + [2, 3, 4, 5] = [3, 6, 9, 12]."""
    group = parties.members(3)
    tally = parties.shared(group, 2)
    survivors = parties.masked(group, tally, "signs", WORDS)
    assert parties.revealed(group, tally, "signs", survivors).tolist() == [3, 6, 9, 12]


def test_masked_words_tell_nothing_by_themselves():
    """Of 100,000 zeros, masked, each bit is set as often as not, within five standard deviations."""
    group = parties.members(3)
    tally = parties.shared(group, 2)
    hidden = group["a"].mask("signs", np.zeros(100_000, np.uint32), tally.packets_for("a"))
    shares = [(hidden >> np.uint32(bit) & np.uint32(1)).mean() for bit in range(32)]
    assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.5 / 100_000**0.5
    other = group["a"].mask("values", np.zeros(100_000, np.uint32))
    assert (hidden == other).mean() < 1e-3


def test_the_words_given_stay_as_they_are_and_nothing_keeps_them():
    group = parties.members(3)
    tally = parties.shared(group, 2)
    words = np.full(1000, 0xABADCAFE, np.uint32)
    group["a"].mask("signs", words, tally.packets_for("a"))
    assert (words == 0xABADCAFE).all()
    held = parties.everything(group["a"])
    assert any(own.seed in held for own in group["a"]._secrets.values()), "the search finds what is there"
    assert not any(words[:2].tobytes() in each for each in held)


@pytest.mark.parametrize("labels", [[], ["a", "a"]])
def test_labels_are_different_and_there_is_one(labels):
    with pytest.raises(UsageError):
        Member(IDENTITIES["a"], CONTEXT, labels)


@pytest.mark.parametrize(("count", "threshold"), [(2, 2), (3, 1), (4, 2), (5, 6), (5, 2), (5, 0), (5, -3)])
def test_too_small_a_group_and_an_impossible_threshold_are_refused(count, threshold):
    group = parties.members(count)
    with pytest.raises(SumsError, match="members"):
        group["a"].share(parties.advertised(group, threshold).adverts(), threshold)


def test_the_least_number_of_members_is_the_members_own():
    group = parties.members(4, least=5)
    with pytest.raises(SumsError, match="asks for 5"):
        group["a"].share(parties.advertised(group, 3).adverts(), 3)


def test_shares_and_masked_words_are_given_once():
    group = parties.members(3)
    tally = parties.shared(group, 2)
    with pytest.raises(SumsError, match="twice"):
        group["a"].share(tally.adverts(), 2)
    group["a"].mask("signs", WORDS["a"], tally.packets_for("a"))
    with pytest.raises(SumsError, match="twice"):
        group["a"].mask("signs", WORDS["a"])


def test_nothing_is_masked_before_keys_are_shared_nor_opened_before_it_is_masked():
    group = parties.members(3)
    with pytest.raises(SumsError, match="before shares"):
        group["a"].mask("signs", WORDS["a"], {})
    tally = parties.shared(group, 2)
    group["a"].mask("signs", WORDS["a"], tally.packets_for("a"))
    with pytest.raises(SumsError, match="sent nothing"):
        group["a"].reveal("values", "abc")


def test_what_is_no_vector_of_words_is_the_callers_fault():
    group = parties.members(3)
    tally = parties.shared(group, 2)
    with pytest.raises(UsageError, match="uint32"):
        group["a"].mask("signs", np.zeros(3), tally.packets_for("a"))


@pytest.mark.parametrize("ask", ["mask", "reveal", "agree"])
def test_an_unknown_label_is_refused(ask):
    group = parties.members(3)
    parties.shared(group, 2)
    arguments = {"mask": (WORDS["a"], {}), "reveal": ("abc",), "agree": ("abc",)}[ask]
    with pytest.raises(SumsError, match="none of signs, values"):
        getattr(group["a"], ask)("others", *arguments)


def after_masks(count=5, threshold=3, **options):
    group = parties.members(count, **options)
    tally = parties.shared(group, threshold)
    for label in LABELS:
        parties.masked(group, tally, label, WORDS)
    return group


@pytest.mark.parametrize(
    ("survivors", "says"), [("bcd", "this member was lost"), ("ab", "threshold is 3"), ("abcz", "z: "), ("", "lost")]
)
@pytest.mark.parametrize("ask", ["agree", "reveal"])
def test_impossible_survivors_are_refused(survivors, says, ask):
    with pytest.raises(SumsError, match=says):
        getattr(after_masks()["a"], ask)("signs", survivors)


def test_one_label_is_answered_for_one_set_of_survivors_only():
    member = after_masks()["a"]
    answer = member.reveal("signs", "abcd")
    assert member.reveal("signs", "dcba") == answer
    for other in ("abc", "abcde", "abce"):
        with pytest.raises(SumsError, match="other survivors"):
            member.reveal("signs", other)


@pytest.mark.parametrize(("first", "then"), [("signs", "values"), ("values", "signs")])
def test_the_survivors_of_a_later_sum_are_among_those_of_an_earlier_one(first, then):
    member = after_masks()["a"]
    member.reveal(first, "abcd")
    wrong, right = ("abce", "abc") if then == "values" else ("abc", "abcde")
    with pytest.raises(SumsError, match="lost in one sum"):
        member.reveal(then, wrong)
    member.reveal(then, right)


def test_no_more_members_are_lost_between_sums_than_a_member_allows():
    for most, survivors in ((0, "abcde"), (1, "abcd"), (None, "abc")):
        member = after_masks(max_lost=most)["a"]
        member.reveal("signs", "abcde")
        if most is not None:
            with pytest.raises(SumsError, match="may be"):
                member.reveal("values", survivors[:-1])
        member.reveal("values", survivors)


def test_a_member_that_asks_for_agreements_reveals_with_as_many_as_the_threshold():
    group = after_masks(agreement=True)
    signed = {name: group[name].agree("signs", "abcd") for name in "abcd"}
    with pytest.raises(SumsError, match="0 members signed"):
        group["a"].reveal("signs", "abcd")
    with pytest.raises(SumsError, match="2 members signed"):
        group["a"].reveal("signs", "abcd", {name: signed[name] for name in "ab"})
    with pytest.raises(SumsError, match=r"2 members signed.*else: c"):
        group["a"].reveal("signs", "abcd", {**{name: signed[name] for name in "ab"}, "c": signed["d"]})
    assert group["a"].reveal("signs", "abcd", {name: signed[name] for name in "abc"})
    assert group["b"].reveal("signs", "abcd", {**signed, "a": b"rubbish"}), "three of four suffice"


def test_what_was_agreed_on_is_what_is_revealed():
    group = after_masks(agreement=True)
    signed = {name: group[name].agree("signs", "abcd") for name in "abcd"}
    with pytest.raises(SumsError, match="other survivors"):
        group["a"].reveal("signs", "abce", signed)

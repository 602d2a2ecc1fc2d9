"""Whatever bytes come instead of a message, the error names their sender."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError, SumsError
from fedproxy.privacy.sums import Tally
from tests.privacy.sums import parties
from tests.privacy.sums.parties import CONTEXT, LABELS

WORDS = {name: np.arange(3, dtype=np.uint32) for name in "abc"}


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["change", "drop", "insert", "cut"]), st.integers(0, 2**16), st.binary(min_size=1, max_size=5)
    ),
    min_size=1,
    max_size=3,
)
HOSTILE = st.one_of(st.binary(max_size=300), EDITS)


def mutated(good, how):
    """Other bytes than these: those given, or these with a few places changed, left out, inserted, or cut off."""
    if isinstance(how, bytes):
        return how if how != good else good + b" "
    found = bytearray(good)
    for kind, place, new in how:
        place %= len(found) + 1
        if kind == "cut":
            del found[place:]
        else:
            end = place if kind == "insert" else place + len(new)
            found[place:end] = b"" if kind == "drop" else new
    return bytes(found) if found != good else good + b" "


def refusal(take, *message):
    """What the server says to a message; nothing if it takes it, for only members can check signatures and seals."""
    try:
        take(*message)
    except ArtifactError as error:
        return str(error)
    return ""


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_of_a_mutated_advert(how):
    group = parties.members(3)
    adverts = parties.advertised(group, 2).adverts()
    adverts["b"] = mutated(adverts["b"], how)
    with pytest.raises(SumsError, match=r"^b: "):
        group["a"].share(adverts, 2)
    assert refusal(Tally(CONTEXT, LABELS, 2).advertised, "b", adverts["b"])[:3] in ("", "b: ")


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_of_a_mutated_packet(how):
    group = parties.members(3)
    tally = parties.advertised(group, 2)
    adverts = tally.adverts()
    packets = {name: member.share(adverts, 2) for name, member in group.items()}
    packets["b"]["a"] = mutated(packets["b"]["a"], how)
    with pytest.raises(SumsError, match=r"^b: "):
        group["a"].mask("signs", WORDS["a"], {name: packets[name]["a"] for name in "bc"})
    assert refusal(tally.shared, "b", packets["b"])[:3] in ("", "b: ")


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_of_a_mutated_answer(how):
    group = parties.members(3)
    tally = parties.shared(group, 2)
    survivors = parties.masked(group, tally, "signs", WORDS, "ab")
    with pytest.raises((ArtifactError, SumsError), match=r"^a: "):
        tally.revealed("signs", "a", mutated(group["a"].reveal("signs", survivors), how))
        parties.revealed(group, tally, "signs", survivors, "b")


@given(HOSTILE)
@settings(max_examples=100, deadline=None)
def test_of_a_mutated_agreement(how):
    group = parties.members(3, agreement=True)
    tally = parties.shared(group, 2)
    survivors = parties.masked(group, tally, "signs", WORDS, "ab")
    agreements = {name: group[name].agree("signs", survivors) for name in survivors}
    agreements["b"] = mutated(agreements["b"], how)
    with pytest.raises(SumsError, match="else: b"):
        group["a"].reveal("signs", survivors, agreements)

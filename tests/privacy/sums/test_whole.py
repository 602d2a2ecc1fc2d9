"""The whole protocol with random members, words, losses and thresholds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import SumsError
from tests.privacy.sums import parties
from tests.privacy.sums.parties import NAMES


@st.composite
def runs(draw):
    """A run, where each member may be gone before it shares its keys, and before it masks or opens each label."""
    count = draw(st.sampled_from([3, 3, 3, 4, 4, 5, 6, 7, 8]))
    threshold = draw(st.integers(count // 2 + 1, count))
    labels = "xyz"[: draw(st.sampled_from([1, 1, 2, 2, 3]))]
    end = 1 + 2 * len(labels)
    last = st.sampled_from([*range(end), *[end] * draw(st.sampled_from([0, 5, 30]))])
    steps = {name: draw(last) for name in NAMES[:count]}
    return (
        count,
        labels,
        threshold,
        steps,
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 40)),
    )


def check(run):
    count, labels, threshold, steps, agreement, seed, size = run
    group = parties.members(count, labels=labels, agreement=agreement)
    random = np.random.default_rng(seed)
    words = {label: {name: random.integers(0, 2**32, size, np.uint32) for name in group} for label in labels}

    def there(step):
        return [name for name in group if steps[name] > step]

    needed = [len(there(step)) for step in range(1 + 2 * len(labels))]
    opened, says = 0, ""
    try:
        tally = parties.shared(group, threshold, there(0), labels=labels)
        for place, label in enumerate(labels):
            survivors = parties.masked(group, tally, label, words[label], there(1 + 2 * place))
            left = there(2 + 2 * place)
            agreements = parties.agreed(group, tally, label, survivors, left) if agreement else None
            found = parties.revealed(group, tally, label, survivors, left, agreements)
            assert np.array_equal(found, sum(words[label][name] for name in survivors))
            opened += 1
    except SumsError as error:
        says = str(error)
    enough = min(needed) >= threshold
    assert ("threshold" in says, opened == len(labels)) == (not enough, enough)
    assert opened == len(labels) or min(needed[: 3 + 2 * opened]) < threshold


@given(runs())
@settings(max_examples=100, deadline=None)
def test_every_sum_is_that_of_the_survivors_or_too_few_remain(run):
    check(run)


@pytest.mark.slow
@given(runs())
@settings(max_examples=1000, deadline=None)
def test_so_it_is_in_a_thousand_runs(run):
    check(run)

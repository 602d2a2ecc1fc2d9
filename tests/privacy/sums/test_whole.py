"""The whole protocol with random members, words, losses and thresholds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import SumsError
from tests.privacy.sums import parties
from tests.privacy.sums.parties import LABELS, NAMES

STEPS = 1 + 2 * len(LABELS)
"""A member may be gone before it shares its keys, and before it masks or opens each label."""


@st.composite
def runs(draw):
    count = draw(st.integers(3, 8))
    threshold = draw(st.integers(count // 2 + 1, count))
    last = st.sampled_from([*range(STEPS), *[STEPS] * draw(st.sampled_from([0, 5, 30]))])
    steps = {name: draw(last) for name in NAMES[:count]}
    return count, threshold, steps, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 40))


@given(runs())
@settings(max_examples=1000, deadline=None)
def test_every_sum_is_that_of_the_survivors_or_too_few_remain(run):
    count, threshold, steps, agreement, seed, size = run
    group = parties.members(count, agreement=agreement)
    random = np.random.default_rng(seed)
    words = {label: {name: random.integers(0, 2**32, size, np.uint32) for name in group} for label in LABELS}

    def there(step):
        return [name for name in group if steps[name] > step]

    needed = [len(there(step)) for step in range(STEPS)]
    opened = 0
    try:
        tally = parties.shared(group, threshold, there(0))
        for place, label in enumerate(LABELS):
            survivors = parties.masked(group, tally, label, words[label], there(1 + 2 * place))
            left = there(2 + 2 * place)
            agreements = parties.agreed(group, tally, label, survivors, left) if agreement else None
            found = parties.revealed(group, tally, label, survivors, left, agreements)
            assert np.array_equal(found, sum(words[label][name] for name in survivors))
            opened += 1
    except SumsError as error:
        assert min(needed[: 3 + 2 * opened]) < threshold
        assert "threshold" in str(error)
    else:
        assert min(needed) >= threshold

"""What came of a run is gathered from whatever proxy lies there, of this version or an earlier one."""

import pytest

from fedproxy.run_results import _perplexity
from fedproxy.typed_json import LARGEST


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, None),
        ({"exposure": {}}, None),
        ({"exposure": {"perplexity": None}}, None),
        ({"exposure": {"perplexity": {"llm": 3.0, "proxy": 9.0, "tokens": 5}}}, {"llm": 3.0, "proxy": 9.0}),
        ({"exposure": {"perplexity": {"llm": 3.0, "proxy": 1e304}}}, {"llm": 3.0, "proxy": LARGEST}),
        (
            {
                "exposure": {"perplexity": {"llm": 3.0, "proxy": 9.0}},
                "heal": {"perplexity": {"llm": 2.0, "before": 8.0, "after": 4.0}},
            },
            {"llm": 2.0, "proxy": 4.0},
        ),
        ({"refit": {"perplexity": {"llm": 2.0, "before": 8.0, "after": 5.0}}}, {"llm": 2.0, "proxy": 5.0}),
        (
            {
                "refit": {"perplexity": {"llm": 2.0, "before": 8.0, "after": 5.0}},
                "heal": {"perplexity": {"llm": 2.0, "before": 5.0, "after": 4.0}},
            },
            {"llm": 2.0, "proxy": 4.0},
        ),
    ],
)
def test_the_perplexity_is_that_of_the_proxy_that_was_handed_out(settings, found):
    assert _perplexity(settings) == found

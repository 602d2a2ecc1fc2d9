"""What a data owner reads of an offer: its settings, and in words what they mean for its rows and for the result."""

import pytest

from fedproxy.cli.join import _asked
from fedproxy.config import LLM, Compress, Experiment, Federate
from fedproxy.federation.offer import make_offer


@pytest.mark.parametrize(
    ("federate", "says", "never"),
    [
        ({}, ["you can have the adapter at the end: --out DIR"], ["kept back", "twice the training", "no adapter"]),
        ({"share_result": False}, ["you get no adapter at the end"], ["--out"]),
        ({"validation": 0.125}, ["12.5% of your rows are kept back", "--no-scores"], ["twice the training"]),
        ({"validation": 0.5, "alone": True}, ["50% of your rows", "twice the training"], []),
    ],
)
def test_an_offer_is_told_in_words_too(federate, says, never):
    experiment = Experiment(LLM("llm"), Compress(calibration="text"), federate=Federate(**federate))
    offer = make_offer(experiment, "bank", run_id="r", proxy="0" * 64, start="0" * 64)
    *lines, last = _asked(offer)
    text = " ".join(lines)
    assert last == f"  SHA-256 of this offer: {offer.sha256}"
    assert all(words in text for words in says)
    assert not any(words in text for words in never)

"""What a data owner reads of an offer: its settings, and in words what they mean for its rows and for the result."""

from dataclasses import replace

import pytest

from fedproxy.cli.join import _asked, _sent
from fedproxy.config import LLM, Compress, Experiment, Federate
from fedproxy.federation.messages import Reply, Score, Scored
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


REPLY = Reply("bank", 2, {}, rows=1, tokens=1, steps=1, loss=1.0, seconds=1.0)
SCORES = {"own": Score(0.5, 9, 0.75), "untuned": Score(4.0, 9), "alone": Score(0.25, 9, 1.0)}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (REPLY, "Sent an update of 1.2 MB."),
        (
            replace(REPLY, validation=SCORES),
            "Sent an update of 1.2 MB, and scores: your update loss 0.500, accuracy 75.0 %; "
            "the untuned proxy loss 4.000; what you trained alone loss 0.250, accuracy 100.0 %.",
        ),
        (Scored("bank", 2, Score(0.5, 9)), "Sent a score: the merged adapter of round 2 has loss 0.500."),
    ],
)
def test_a_client_reads_the_scores_that_it_sends(answer, says):
    assert _sent(answer, 1_200_000) == says

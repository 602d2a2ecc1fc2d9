from fedproxy.reporting.summary import sentences

from .sample import parse, sample


def text(raw):
    return " ".join(sentences(parse(raw)))


def test_full_run():
    found = text(sample())
    assert "12 blocks and 4,193,920 parameters; its proxy keeps 6" in found
    assert "4 clients" in found
    assert "5 rounds, merged by h-ties, with pcr" in found
    assert "from 26.2 % to 86.2 %" in found
    assert "reaches 93.0 %: 89.9 % of that gap is closed." in found
    assert "better than the untuned one on every task" in found
    assert "stands at −1.5 points" in found
    assert "took 3 min 56 s" in found
    assert "sent 26.2 MB and received 52.4 MB" in found


def test_a_task_that_got_worse_is_named():
    raw = sample()
    raw["evaluation"]["fused"]["tasks"]["demo_travel"]["acc"] = 0.30
    assert "on 3 of 4 tasks; not on demo_travel (−4.0 points)." in text(raw)


def test_no_gap_is_said():
    raw = sample()
    raw["evaluation"]["centralized"]["average"] = 0.1
    assert "there is no gap to close" in text(raw)


def test_rejected_updates_are_counted():
    raw = sample()
    raw["rounds"][0]["quarantined"] = [{"client": "bank", "reason": "NaN"}]
    assert "1 update was rejected." in text(raw)


def test_nothing_recorded_says_nothing():
    assert sentences(parse({})) == []

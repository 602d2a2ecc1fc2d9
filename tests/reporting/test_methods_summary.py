import pytest

from fedproxy.reporting.methods_summary import sentences

from .methods_sample import methods_sample, parse


def said(names=("zero-shot", "centralized", "fedavg", "fedproxy"), change=lambda raw: None, **sizes):
    raw = methods_sample(names, **sizes)
    change(raw)
    return " ".join(sentences(parse(raw)))


def against_fedproxy(method, low, high, by_seed):
    """Set the difference of `method` from FedProxy."""

    def change(raw):
        [found] = [each for each in raw["differences"] if (each["method"], each["against"]) == (method, "fedproxy")]
        verdict = "better" if low > 0 else "worse" if high < 0 else "undecided"
        found |= {"mean": (low + high) / 2, "low": low, "high": high, "by_seed": by_seed, "verdict": verdict}

    return change


def test_what_was_run():
    assert "4 methods on the same work: 3 seeds, 8 tasks and 8 clients; a proxy is the LLM without 50 %" in said()
    assert "the LLM without 25 and 50 % of its blocks" in said(ratios=(0.25, 0.5))


def test_the_highest_means_are_named():
    def change(raw):
        for cell in raw["cells"]:
            cell["accuracy"]["average"] = {"fedavg": 0.6, "fedproxy": 0.5}.get(cell["method"], 0.2)
            cell["accuracy"]["average"] += 0.01 * cell["seed"]

    assert (
        "The highest mean accuracy is that of fedavg, 61.0 % (60.0 to 62.0 %), which is one of the 2 methods that "
        "federate a proxy." in said(change=change)
    )
    assert "of the 2 methods that federate a proxy, that of fed" in said()


def test_local_models_are_said_to_be_many():
    def change(raw):
        for cell in raw["cells"]:
            cell["accuracy"]["average"] = 0.5 if cell["method"] == "local" else 0.2

    assert "that of local, 50.0 %, which is one model for each client" in said(("local", "fedavg"), change)


def test_equals_are_named_together():
    def change(raw):
        for cell in raw["cells"]:
            cell["accuracy"]["average"] = 0.2 if cell["method"] == "zero-shot" else 0.5

    assert "The highest mean accuracy is that of centralized, fedavg and fedproxy, 50.0 %." in said(change=change)


@pytest.mark.parametrize(
    ("ends", "by_seed", "says"),
    [
        ((-0.03, -0.01), [-0.02] * 3, "better than fedavg: +2.0 points (+1.0 to +3.0)"),
        (
            (0.01, 0.03),
            [0.04, -0.01, 0.03],
            "not told apart from fedavg: −2.0 points (−3.0 to −1.0), that way with 2 of 3",
        ),
        ((-0.03, 0.01), [-0.01] * 3, "not told apart from fedavg: +1.0 points (−1.0 to +3.0)"),
        ((0.0, 0.0), [0.0] * 3, "not told apart from fedavg: +0.0 points (+0.0 to +0.0)"),
    ],
)
def test_better_and_worse_are_said_only_where_interval_and_seeds_agree(ends, by_seed, says):
    text = said(("fedavg", "fedproxy"), against_fedproxy("fedavg", *ends, by_seed))
    assert f"fedproxy is {says}" in text
    assert ("better" in text) + ("worse" in text) == ("not told apart" not in text)


def test_each_ratio_has_its_own_sentences():
    text = said(ratios=(0.25, 0.5))
    for remove in (25, 50):
        assert f"With {remove} % removed, the highest mean accuracy" in text
        assert f"With {remove} % removed, fedproxy is worse than centralized" in text


def test_what_stands_against_the_numbers_is_said():
    assert "There is one seed" in said(seeds=[0])
    assert "There is one seed" not in said()
    assert "Not every seed was run with zero-shot" in said(change=lambda raw: raw["cells"].pop(0))
    assert "not how far another seed would" in said()
    assert "bootstrap" not in said(["fedavg"])

import copy

import pytest

from fedproxy.errors import ArtifactError
from fedproxy.records import Comparison
from fedproxy.reporting.rows import Spread
from fedproxy.typed_json import read_record

from .methods_sample import methods_sample, parse
from .sample import HOSTILE, changed, paths

FEW = ("zero-shot", "centralized", "offsite-tuning", "fedavg", "fedproxy")
SMALL = methods_sample(FEW, seeds=(0, 1), tasks=["sst2", "rte"], rounds=2)
SIMILARITY = "cells[4].rounds[0].analysis.similarity"


def test_rows_are_means_over_the_seeds():
    raw = methods_sample(["fedavg"], seeds=(0, 1, 2), tasks=["a"], ratios=(0.25, 0.5), rounds=1)
    for cell, accuracy in zip(raw["cells"], (0.5, 0.1, 0.6, 0.2, 1.0, 0.3), strict=True):
        cell["accuracy"] = {"tasks": {"a": accuracy}, "average": accuracy}
        cell["bytes_up"], cell["bytes_down"], cell["proxy_bytes"] = 10 + cell["seed"], 0, 100
    found = parse(raw)
    assert (found.seeds, found.ratios, found.tasks, found.clients) == ([0, 1, 2], [0.25, 0.5], ["a"], 1)
    assert [row.label for row in found.rows] == ["fedavg 25 %", "fedavg 50 %"]
    assert found.rows[0].accuracy == found.rows[0].tasks["a"] == Spread(pytest.approx(0.7), 0.5, 1.0)
    assert found.rows[1].accuracy == Spread(pytest.approx(0.2), 0.1, 0.3)
    assert found.rows[0].travelled == {"up": 11.0, "down": 0.0, "proxy": 100.0}


def test_the_proxy_travels_once_to_each_party_that_trains_it():
    found = {row.method: row for row in parse(SMALL).rows}
    assert found["fedavg"].travelled["proxy"] == 2 * found["fedavg"].mean("proxy_bytes")
    assert found["offsite-tuning"].travelled["proxy"] == found["offsite-tuning"].mean("proxy_bytes")


def test_a_difference_is_found_whichever_way_round_it_was_recorded():
    found = parse(SMALL)
    one, other = (found.difference(*pair, 0.5) for pair in (("fedavg", "fedproxy"), ("fedproxy", "fedavg")))
    assert (one.method, other.method) == ("fedavg", "fedproxy")
    assert (other.mean, other.low, other.high) == (-one.mean, -one.high, -one.low)
    assert other.by_seed == [-value for value in one.by_seed]
    assert other.turned == one
    worse = found.difference("zero-shot", "centralized", 0.5)
    assert (worse.verdict, worse.turned.verdict) == ("worse", "better")
    assert found.difference("fedavg", "fedprox", 0.5) is None


def test_where_a_seed_says_the_opposite_nothing_is_told_apart_whatever_an_earlier_file_says():
    raw = copy.deepcopy(SMALL)
    raw["differences"][0] |= {"low": 0.01, "mean": 0.02, "high": 0.03, "by_seed": [0.05, -0.01], "verdict": "better"}
    found = parse(raw).differences[0]
    assert (found.verdict, found.turned.verdict) == ("undecided", "undecided")


def test_rounds_are_those_of_a_run():
    [cell, _] = next(row for row in parse(SMALL).rows if row.method == "fedproxy").cells
    assert [round_.number for round_ in cell.rounds] == [1, 2]
    assert cell.rounds[0].analysis.of("owner of sst2")[2] == 1.0
    assert cell.proxy.layer_map == [0, 1, 2, 3, 4, 11]
    assert cell.rounds[1].conflict[11] == pytest.approx(0.63)


@pytest.mark.parametrize(
    ("path", "value", "place", "shown"),
    [
        (("cells",), [], "cells", "[]"),
        (("cells",), {}, "cells", "{}"),
        (("cells", 1), SMALL["cells"][0], "cells", "zero-shot"),
        (("cells", 0, "seed"), None, "cells[0].seed", "missing"),
        (("cells", 0, "method"), 3, "cells[0].method", "3"),
        (("cells", 0, "accuracy"), {}, "cells[0].accuracy.average", "missing"),
        (("cells", 0, "flops"), {"clients": "many"}, "cells[0].flops.clients", "'many'"),
        (("cells", 4, "rounds", 0, "conflict"), {"-1": 0.5}, "cells[4].rounds[0].conflict.-1", "-1"),
        (("cells", 4, "rounds", 0, "conflict"), {"3": 1.5}, "cells[4].rounds[0].conflict.3", "1.5"),
        (("cells", 4, "rounds", 0, "analysis", "similarity"), [[1.0, 0.0]], SIMILARITY, "2 rows"),
        (("cells", 4, "rounds", 0, "analysis", "similarity"), [[9.0, 0.0]] * 2, f"{SIMILARITY}[0][0]", "9.0"),
        (("differences", 0, "verdict"), "better", "differences[0].verdict", "'better'"),
        (("experiment", "client"), ["bank"], "experiment.client", "['bank']"),
        (("methods", "fedavg"), [], "methods.fedavg", "[]"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(path, value, place, shown):
    with pytest.raises(ArtifactError) as caught:
        parse(changed(SMALL, path, value))
    assert str(caught.value).startswith(f"FILE.{place} is ")
    assert shown in str(caught.value)


def test_whatever_stands_at_any_place_is_read_or_refused_with_its_place():
    raw = methods_sample(["centralized", "fedproxy"], seeds=[0], tasks=["a"], clients=["x", "y"], rounds=1)
    assert [row.method for row in parse(raw).rows] == ["centralized", "fedproxy"]
    refused = []
    for path in paths(raw):
        for value in HOSTILE:
            try:
                parse(changed(raw, path, value), "FILE")
            except ArtifactError as error:
                refused.append(str(error))
    assert len(refused) > 500
    assert [text for text in refused if not text.startswith("FILE")] == []


@pytest.mark.parametrize(
    "path",
    [
        ("cells", 1, "seed"),
        ("cells", 1, "remove"),
        ("cells", 1, "accuracy", "average"),
        ("cells", 1, "flops", "server"),
        ("cells", 1, "rounds", 0, "clients", "x", "loss"),
        ("cells", 1, "proxy", "scores"),
        ("differences", 0, "mean"),
    ],
)
def test_what_is_no_number_is_refused_by_its_place(path):
    raw = methods_sample(["centralized", "fedproxy"], seeds=[0], tasks=["a"], clients=["x", "y"], rounds=1)
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    for value in ("x", True, float("nan"), 1e31, [None]):
        with pytest.raises(ArtifactError) as caught:
            parse(changed(raw, path, value), "FILE")
        assert str(caught.value).startswith(f"FILE{place}")


def test_a_task_that_is_left_out_is_kept_with_its_reason():
    raw = changed(SMALL, ("cells", 0, "accuracy", "left_out"), {"wiki": "less is better of word_perplexity"})
    found = parse(raw)
    assert found.rows[0].cells[0].accuracy.left_out == {"wiki": "less is better of word_perplexity"}
    assert found.tasks == parse(SMALL).tasks


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00", "{}", "9" * 5000])
def test_a_missing_or_broken_file_is_an_artifact_error(tmp_path, content):
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"compare\.json"):
        read_record(tmp_path / "compare.json", Comparison)

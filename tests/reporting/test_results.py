import json

import pytest

from fedproxy.errors import ArtifactError
from fedproxy.metrics import gap_closed
from fedproxy.records import Round, read_run
from fedproxy.reporting.page import load_events
from fedproxy.typed_json import read_record

from .sample import HOSTILE, changed, parse, paths, place_of, sample


def scored(**averages):
    return {model: {"tasks": {}, "average": average} for model, average in averages.items()}


def test_gap_closed_by_hand():
    assert gap_closed(scored(llm=0.2, fused=0.5, centralized=0.6)) == 0.75
    assert gap_closed(scored(llm=0.5, fused=0.4, centralized=0.7)) == -0.5
    assert gap_closed(scored(llm=0.5, fused=0.8, centralized=0.7)) == 1.5


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        scored(llm=0.2, fused=0.5),
        scored(llm=0.2, centralized=0.5),
        scored(llm=0.5, fused=0.6, centralized=0.5),
        scored(llm=0.5, fused=0.6, centralized=0.4),
        scored(llm=None, fused=0.6, centralized=0.4),
    ],
)
def test_gap_closed_is_none_without_a_gap(evaluation):
    assert gap_closed(evaluation) is None


def test_parsed_results_keep_every_number():
    results = parse(sample())
    assert results.tasks == ["demo_snips", "demo_travel", "demo_banking", "demo_dbpedia"]
    assert results.evaluation["fused"].tasks["demo_snips"] == 0.89
    assert results.rows("demo_snips") == 150
    assert results.rounds[-1].number == 5
    assert results.rounds[0].clients["travel desk"].bytes_up == 1_310_720
    columns = [sample()["rounds"][0]["analysis"][key][1] for key in ("heterogeneity", "weights", "retention")]
    assert results.rounds[0].analysis.of("travel desk") == columns
    assert results.setting("federate", "merge") == "h-ties"
    assert results.gap_closed == gap_closed(sample()["evaluation"])


def test_a_task_without_accuracy_counts_by_its_first_metric():
    results = parse(
        {
            "evaluation": {
                "llm": {
                    "tasks": {
                        "a": {"f1": 0.5, "n": 4},
                        "b": {"acc_norm": 0.1, "acc": 0.3},
                        "c": {"f1": 0.7, "acc_norm": 0.2},
                    }
                }
            }
        }
    )
    assert results.evaluation["llm"].tasks == {"a": 0.5, "b": 0.3, "c": 0.7}
    assert results.average("llm") == pytest.approx(0.5)


def test_a_quarantined_client_has_no_weight():
    raw = sample(["a", "b", "c"], rounds=1, tasks=[])
    raw["rounds"][0]["analysis"] |= {"names": ["a", "b"], "similarity": [[1, 0], [0, 1]], "weights": [0.5, 0.5]}
    raw["rounds"][0]["quarantined"] = [{"client": "c", "reason": "NaN in lora_A"}]
    round_ = parse(raw).rounds[0]
    assert [round_.analysis.of(name)[1] for name in round_.clients] == [0.5, 0.5, None]
    assert [(each.client, each.reason) for each in round_.quarantined] == [("c", "NaN in lora_A")]


def test_a_rule_that_weighs_nobody_leaves_weights_open():
    raw = sample(["a", "b"], rounds=1, tasks=[])
    raw["rounds"][0]["analysis"]["weights"] = None
    assert [parse(raw).rounds[0].analysis.of(name)[1] for name in "ab"] == [None, None]


@pytest.mark.parametrize("raw", [{}, {"evaluation": None, "rounds": None, "cost": None, "proxy": None}])
def test_missing_parts_are_empty(raw):
    results = parse(raw)
    assert (results.tasks, results.rounds, results.proxy.scores, results.gap_closed) == ([], [], [], None)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"evaluation": {"llm": {"tasks": {"a": {"acc": "high"}}}}}, "evaluation.llm.tasks.a"),
        ({"evaluation": {"llm": {"average": float("nan")}}}, "evaluation.llm.average"),
        ({"evaluation": []}, "evaluation"),
        ({"rounds": {"1": {}}}, "rounds"),
        ({"rounds": [{"clients": {"bank": {"loss": "low"}}}]}, "rounds[0].clients.bank.loss"),
        ({"rounds": [{"analysis": {"names": ["a", "b"], "similarity": [[1.0]]}}]}, "rounds[0].analysis.similarity"),
        ({"proxy": {"scores": [0.1, None]}}, "proxy.scores[1]"),
        ({"cost": {"bytes_up": True}}, "cost.bytes_up"),
        ({"name": 3}, "name"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(change, place):
    with pytest.raises(ArtifactError) as caught:
        parse(sample() | change, "RUN/results.json")
    assert f"RUN/results.json.{place} " in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '"text"', "\x00"])
def test_missing_or_broken_results_are_an_artifact_error(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_run(tmp_path)


def test_rounds_left_out_are_read_from_their_folders(tmp_path):
    raw = sample(rounds=2)
    for record in raw.pop("rounds"):
        folder = tmp_path / "rounds" / f"{record['round']:04d}"
        folder.mkdir(parents=True)
        (folder / "round.json").write_text(json.dumps(record))
    (tmp_path / "results.json").write_text(json.dumps(raw))
    assert read_run(tmp_path).rounds == parse(sample(rounds=2)).rounds


def test_events_of_a_crashed_run_are_read_up_to_the_crash(tmp_path):
    assert load_events(tmp_path) == []
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n[1]\n{"event": "rou')
    assert load_events(tmp_path) == [{"event": "start"}]


def test_what_is_better_lower_is_in_no_mean_and_no_gap():
    def model(score, perplexity, **more):
        tasks = {"qa": {"acc": score, "n": 4}, "wiki": {"word_perplexity": perplexity, "n": 4}}
        return {"tasks": tasks, "left_out": {"wiki": "less is better of word_perplexity"}, **more}

    averages = {"llm": (0.2, 30.0), "fused": (0.5, 20.0), "centralized": (0.6, 10.0)}
    raw = {"evaluation": {name: model(*pair, average=pair[0]) for name, pair in averages.items()}}
    found = parse(raw)
    assert found.tasks == ["qa"]
    assert (found.average("fused"), found.gap_closed) == (0.5, 0.75)
    assert found.evaluation["fused"].scores["wiki"].value == 20.0
    assert parse({"evaluation": {"fused": model(0.5, 20.0)}}).average("fused") == 0.5
    del raw["evaluation"]["llm"]["left_out"]
    assert parse(raw).gap_closed is None


def test_whatever_stands_at_any_place_is_read_or_refused_beside_where_it_stands():
    raw, refused = sample(["x", "y"], rounds=1, tasks=["a"]), []
    for path in paths(raw):
        for value in HOSTILE:
            try:
                parse(changed(raw, path, value), "FILE")
            except ArtifactError as error:
                refused.append(("FILE" + place_of(path[:-1]), str(error).partition(" is ")[0]))
    assert len(refused) > 500
    assert [found for found in refused if not found[1].startswith(found[0]) and not found[0].startswith(found[1])] == []


def test_keys_that_nobody_knows_are_passed_over():
    raw = sample(rounds=1)
    more = changed(changed(raw, ("cost", "later"), {"x": 1}), ("rounds", 0, "analysis", "later"), [None])
    assert parse(more) == parse(raw)


def test_a_file_cut_short_is_one_error_with_its_name(tmp_path):
    file = tmp_path / "round.json"
    whole = json.dumps(sample(rounds=1)["rounds"][0])
    for length in range(0, len(whole), 37):
        file.write_text(whole[:length])
        with pytest.raises(ArtifactError, match=r"round\.json"):
            read_record(file, Round)
    file.write_text(whole)
    assert read_record(file, Round).number == 1

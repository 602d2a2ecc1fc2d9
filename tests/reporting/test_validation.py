"""What clients state of a run's adapters: who gave no score, which round was the best, and an axis to see it on."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedproxy.records import Results
from fedproxy.reporting import report, validation, validation_table
from fedproxy.reporting.summary import sentences
from fedproxy.typed_json import as_record

from .sample import sample


def page(folder: Path, raw: dict[str, Any]) -> str:
    (folder / "results.json").write_text(json.dumps(raw))
    return " ".join(report(folder).read_text().split())


def parsed(raw: dict[str, Any]) -> Results:
    return as_record(raw, Results, "results")


def shown(raw: dict[str, Any]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(validation_table(raw))
    return capture.get()


def test_whose_score_is_missing_is_named_with_the_reason(tmp_path: Path) -> None:
    raw = sample(["bank", "<b>law", "shop", "travel"], rounds=2)
    clients, told = raw["rounds"][0]["clients"], raw["rounds"][0]["validation"]
    for name in ("bank", "<b>law"):
        del clients[name]["validation"]["global"]
    clients["shop"]["validation"] = {}
    told["faults"] = [{"client": "<b>law", "kind": "invalid", "reason": "its loss is <i>nan"}]
    told["dropouts"] = ["bank"]
    assert parsed(raw).rounds[0].unscored == {
        "shop": "it gives no scores",
        "bank": "it did not answer in time",
        "<b>law": "its loss is <i>nan",
    }
    assert parsed(raw).rounds[1].unscored == {}
    html = page(tmp_path, raw)
    assert "No score of &lt;b&gt;law: its loss is &lt;i&gt;nan" in html
    assert "No score of bank: it did not answer in time" in html


def test_without_validation_nobody_is_missing() -> None:
    raw = sample(rounds=1)
    for client in raw["rounds"][0]["clients"].values():
        client["validation"] = {}
    raw["rounds"][0]["validation"] = {}
    assert parsed(raw).rounds[0].unscored == {}


@pytest.mark.parametrize(("stop", "kept"), [(False, 4), (True, 2), (True, 4)])
def test_the_best_round_and_an_early_end_are_told_whichever_is_kept(stop: bool, kept: int) -> None:
    raw = sample(rounds=4) | {"kept_round": kept}
    raw["rounds"][-1]["validation"] |= {"best_round": 2, "stop": stop}
    said, table = " ".join(sentences(parsed(raw))), " ".join(shown(raw).split())
    assert f"the adapter of round {kept} moves" in said
    assert ("No round after round 2 was better, so the federation ended." in said) is stop
    assert "Of 4 rounds the best is round 2" in table
    assert ("ended early" in table) is stop


def test_what_clients_reach_alone_is_told_with_its_accuracy() -> None:
    raw = sample(rounds=1)
    raw["rounds"][0]["validation"]["alone"] |= {
        "loss": {"by_rows": 0.15, "by_clients": 0.2},
        "accuracy": {"by_rows": 0.927, "by_clients": 0.9},
    }
    assert "clients that train alone reach 0.150 and 92.7 %." in " ".join(sentences(parsed(raw)))
    del raw["rounds"][0]["validation"]["alone"]["accuracy"]
    assert "clients that train alone reach 0.150." in " ".join(sentences(parsed(raw)))


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    raw = sample(["bank", "a client of a long name, long name"], rounds=1)
    assert max(map(len, shown(raw).splitlines())) <= 80
    assert "Tuned proxy" in shown(raw)


def test_a_run_without_scores_of_the_owners_says_where_the_clients_are(tmp_path: Path) -> None:
    raw = sample(rounds=1) | {"evaluation": {}}
    html = page(tmp_path, raw)
    assert (
        'The tuned LLM was not scored. What the clients state of the proxy stands under <a href="#validation">' in html
    )
    assert f"fedproxy evaluate llm --adapter {tmp_path.name}/fused --tasks NAME" in html
    assert 'id="validation"' in html


def test_what_the_llm_reaches_stands_beside_the_proxy(tmp_path: Path) -> None:
    raw = sample(rounds=1) | {"evaluation": {}}
    of_proxy = raw["rounds"][0]["validation"]["untuned"]
    raw["validation"] = {
        model: of_proxy | {"loss": {"by_rows": loss}, "accuracy": {"by_rows": accuracy}}
        for model, loss, accuracy in (("llm", 4.321, 0.123), ("fused", 2.345, 0.456))
    }
    html, said = page(tmp_path, raw), shown(raw)
    assert "not scored" not in html
    assert "<li><b>45.6 %</b>tuned LLM, on the clients’ rows</li>" in html
    told = "the tuned LLM has a loss of 2.345 nats a token, the untuned one of 4.321; of their answers 45.6 % are right"
    assert told in " ".join(sentences(parsed(raw)))
    assert told in html.split('id="results"')[1].replace("\u00a0", " ")
    for text in (html.split("Every model on the rows kept back")[1], said):
        rows = text[text.index("LLM, untuned") :]
        assert [rows.index(one) for one in ("4.321", "12.3", "Tuned LLM", "2.345", "45.6")] == sorted(
            rows.index(one) for one in ("4.321", "12.3", "Tuned LLM", "2.345", "45.6")
        )


@pytest.mark.parametrize(("untuned", "ticks"), [(6.0, True), (1.1, False)])
def test_losses_far_apart_get_a_logarithmic_axis(untuned: float, ticks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = sample(["bank"], rounds=3)
    for one in raw["rounds"]:
        one["validation"]["untuned"]["loss"]["by_rows"] = untuned
        one["validation"]["global"]["loss"]["by_rows"] = 0.4
        for model, score in one["clients"]["bank"]["validation"].items():
            score["loss"] = untuned if model == "untuned" else 0.4
        one["validation"]["alone"]["loss"]["by_rows"] = 0.4
    asked = []
    monkeypatch.setattr(validation.plots, "lines", lambda found, *, log, **words: asked.append(log) or "")
    validation.figures(validation.rounds_of(parsed(raw)))
    assert asked == [ticks, False]


@pytest.mark.parametrize("alone", [True, False])
def test_what_nobody_trained_alone_has_no_column(tmp_path: Path, alone: bool) -> None:
    raw = sample(rounds=2)
    for one in [] if alone else raw["rounds"]:
        del one["validation"]["alone"], one["validation"]["gain"]["alone"]
        for client in one["clients"].values():
            del client["validation"]["alone"]
    html = page(tmp_path, raw)
    columns = [
        "Gain in loss over alone",
        "Gain in accuracy over alone",
        "Trained alone: loss",
        "Trained alone: accuracy",
    ]
    assert [f">{column}" in html for column in columns] == [alone] * 4
    body = html.split("Validation of the clients in round 1")[1].split("<tbody>")[1]
    assert body.split("</tr>")[0].count("<td") == 1 + 2 * (4 if alone else 3)
    assert ("Proxy, trained alone" in shown(raw)) == alone

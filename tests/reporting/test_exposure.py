import json

import pytest

from fedproxy.attack_records import ACCURACY_GAP, WAY, Attacks
from fedproxy.reporting import report
from fedproxy.reporting.exposure import held, quoted
from fedproxy.typed_json import as_record

from .html_page import Page
from .sample import parse, sample

COMMAND = "--attack llm-from-proxy"


def figure(where, value, measure=WAY, **more):
    return {"where": where, "measure": measure, "value": value, **more}


OWN = [
    figure("the run's proxy, as it is", 0.5),
    figure("the run's proxy, gaps filled by copies", 0.25),
    figure("the run's proxy, healed, 20 steps", 0.625),
    figure("only the API, no proxy, 20 steps", -0.25),
    figure("only the API, no proxy, 60 steps", 0.125),
]
RIGHT = [figure("the run's proxy, as it is", 0.75, ACCURACY_GAP, low=0.625, high=0.875)]
OTHERS = [figure("50% removed, first hidden, as it is", 0.9)]


def attacks(figures):
    return {"attacks": {"llm-from-proxy": {"figures": figures}}}


def found(figures):
    return quoted(as_record(attacks(figures), Attacks, "attacks.json"))


def page(folder, **raw):
    (folder / "results.json").write_text(json.dumps(sample(rounds=1) | raw))
    return Page(report(folder).read_text(encoding="utf-8"))


def test_the_proxy_as_it_is_the_best_attacker_and_the_api_alone_are_quoted_by_measure():
    loss, right = found([*OWN, *RIGHT])
    for part in ("50.0 % for the proxy as it is", "62.5 % for the best attacker (healed, 20 steps)", "alone, 12.5 %"):
        assert part in loss
    assert "25.0" not in loss
    assert "75.0 % (95 % interval 62.5 to 87.5) for the proxy as it is, and no attacker came further" in right


@pytest.mark.parametrize("figures", [[], OTHERS, OWN[1:], [figure("the run's proxy, as it is", 0.5, "another")]])
def test_without_figures_of_the_runs_own_proxy_nothing_is_quoted(figures):
    assert found(figures) == []


def test_a_page_of_a_run_that_was_not_attacked_names_the_command(tmp_path):
    before = page(tmp_path).text
    assert held(parse(sample(rounds=1))) in before
    assert f"fedproxy audit {tmp_path.name} {COMMAND}" in before
    (tmp_path / "attacks.json").write_text(json.dumps(attacks([*OWN, *RIGHT])))
    after = page(tmp_path).text
    assert COMMAND not in after
    assert all(sentence in after for sentence in found([*OWN, *RIGHT]))


def test_a_page_of_a_run_that_did_not_record_its_proxy_says_nothing(tmp_path):
    assert COMMAND not in page(tmp_path, proxy={}).text


def test_what_a_file_names_an_attacker_is_text(tmp_path):
    hostile = "the run's proxy, <img src=x>\x1b[2J" + "x" * 500
    (tmp_path / "attacks.json").write_text(json.dumps(attacks([*OWN, figure(hostile, 0.99)])))
    assert "img" not in page(tmp_path).tags
    (sentence,) = found([*OWN, figure(hostile, 0.99)])
    assert "\x1b" not in sentence
    assert "x" * 200 not in sentence

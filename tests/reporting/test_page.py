import base64
import hashlib
import json
import re
import sys

import pytest

from fedproxy.errors import ArtifactError, MissingExtraError
from fedproxy.reporting import report
from fedproxy.reporting.conflict import load_conflict

from .html_page import Page, check
from .sample import sample, write_conflict


def write(folder, results):
    (folder / "results.json").write_text(json.dumps(results))
    html = report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_full_page_is_self_contained_and_accessible(tmp_path):
    html, _ = write(tmp_path, sample())
    page = check(html)
    assert "prefers-color-scheme: dark" in html
    assert len(page.labels) == 12 + 4


def test_conflict_by_block_and_layer_is_read_from_the_rounds(tmp_path):
    write_conflict(tmp_path, rounds=3)
    html, _ = write(tmp_path, sample(rounds=3))
    labels = check(html).labels
    assert any(label.startswith("Mean conflict by block and round: ") for label in labels)
    assert any(label.startswith("Mean conflict by kind of layer, round 3: ") for label in labels)
    assert "mlp.up_proj" in html
    conflict = load_conflict(tmp_path, sample()["proxy"]["layer_map"])
    assert f"11 {' '.join(f'{each.blocks[11]:.3f}' for each in conflict)}" in check(html).text


def test_the_policy_lets_the_one_script_run_and_nothing_else(tmp_path):
    html, _ = write(tmp_path, sample(rounds=1))
    script = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', html)[1]
    assert dict(rule.split(" ", 1) for rule in policy.split("; ")) == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
    }


def test_full_page_shows_every_number_of_the_table(tmp_path):
    _, page = write(tmp_path, sample())
    text = page.text
    for row in ("demo_snips 11.0 14.0 93.0 89.0 95.0 150", "Mean 26.2 16.0 87.8 86.2 93.0"):
        assert row in text
    for title in (
        "Score by task and model",
        "Training loss by client and round",
        "Similarity of the updates, round 5",
        "Conflict between the clients, round 5",
        "Score of each block",
        "Time by stage",
        "Training speed by client and round",
        "Peak memory by client and round",
        "Bytes by client, all rounds",
    ):
        assert title in text
    for axis in ("loss (nats a token)", "coordinates (%)", "wall-clock time (s)", "score (%)", "cosine"):
        assert axis in text


def test_same_results_give_the_same_bytes(tmp_path):
    first, _ = write(tmp_path, sample())
    second, _ = write(tmp_path, sample())
    assert first == second


HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{1}$",
    "_private",
    "\"quoted\" & 'so'",
    "a\x00\x1b\nb",
    "客户 é",
    "x" * 200,
]


def test_hostile_names_are_text(tmp_path):
    tasks = HOSTILE[:4]
    raw = sample(HOSTILE, rounds=2, tasks=tasks) | {"name": "</title><script>1</script>"}
    raw["rounds"][0]["quarantined"] = [{"client": "<em>x</em>", "reason": "<img src=x onerror=1>"}]
    raw["environment"] = {"<i>": {"<u>": "<style>"}}
    raw["cost"]["seconds"] = {"<stage>": 1.0}
    raw["experiment"]["compress"]["score"] = "</svg><script>"
    (tmp_path / "events.jsonl").write_text('{"</pre><script>": "<script>"}\n')
    html, page = write(tmp_path, raw)
    assert not page.tags & {"em", "i", "u", "img", "stage"}
    assert page.tags >= {"svg", "table", "details"}
    assert html.count("<style") == html.count("<script") == 1
    text = "".join(page.texts)
    assert all(name in text for name in HOSTILE if name.isprintable())
    losses = next(svg for svg in html.split("<svg")[1:] if 'id="loss-' in svg).split("</svg>")[0]
    for name in ("&lt;script&gt;", "$\\frac{1}$", "_private", "客户 é", "x…"):
        assert name in losses


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"evaluation": {}},
        {"rounds": []},
        {"rounds": [], "evaluation": {}, "proxy": {}, "cost": {}, "experiment": {}, "environment": {}},
    ],
)
def test_missing_parts_leave_a_page(tmp_path, parts):
    raw = (sample(rounds=1) | parts) if parts else {}
    _, page = write(tmp_path, raw)
    assert "Reproduce" in "".join(page.texts)


@pytest.mark.parametrize("table", ["train", "federate"])
def test_a_private_run_is_not_said_to_give_the_same_adapter_again(tmp_path, table):
    raw = sample(rounds=1)
    assert "give the same adapter" in write(tmp_path, raw)[1].text
    raw["experiment"][table]["privacy"] = {"epsilon": 8.0}
    assert "give the same adapter" not in write(tmp_path, raw)[1].text


@pytest.mark.parametrize("missing", [["centralized"], ["fused", "centralized"], ["llm", "proxy", "proxy_tuned"]])
def test_models_that_were_not_asked_for_have_no_column(tmp_path, missing):
    raw = sample(rounds=1)
    for model in missing:
        del raw["evaluation"][model]
    _, page = write(tmp_path, raw)
    table = " ".join("".join(page.texts).split("Score in %, by task and model")[1].split("demo_snips")[0].split())
    assert table.startswith("Task")
    assert ("Centralized" in table) == ("centralized" not in missing)
    assert ("Fused LLM" in table) == ("fused" not in missing)


def test_one_client_has_no_heat_map(tmp_path):
    _, page = write(tmp_path, sample(["alone"], rounds=1))
    text = "".join(page.texts)
    assert "Training loss by client" in text
    assert "Similarity of the updates" not in text


def test_many_clients_and_rounds(tmp_path):
    raw = sample([f"client {index}" for index in range(14)], rounds=26)
    raw["proxy"] |= {"scores": [0.1] * 80, "layer_map": list(range(40))}
    _, page = write(tmp_path, raw)
    assert len(page.labels) == 12 + 4000 // 14**2


def test_too_many_clients_for_a_heat_map_is_said(tmp_path):
    _, page = write(tmp_path, sample([f"client {index}" for index in range(61)], rounds=1))
    text = "".join(page.texts)
    assert "Similarity of the updates" not in text
    assert "61 clients are too many for a heat map" in text


def test_null_losses_and_zero_scores_are_drawn(tmp_path):
    raw = sample(rounds=2)
    raw["rounds"][0]["clients"]["bank"]["loss"] = None
    raw["proxy"]["scores"][3] = 0.0
    _, page = write(tmp_path, raw)
    assert len(page.labels) == 12 + 1


def test_missing_run_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"results\.json is missing"):
        report(tmp_path / "nowhere")


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_extra_is_named_and_leaves_no_page(tmp_path, monkeypatch, module):
    (tmp_path / "results.json").write_text(json.dumps(sample(rounds=1)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"fedproxy\[report\]"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()

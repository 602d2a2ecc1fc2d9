"""What a dry run says of a comparison is what its cells record."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedproxy.comparison import compare
from fedproxy.errors import UsageError
from fedproxy.forecast import forecast_comparison, given_speed
from tests.comparison.conftest import experiment_file

__all__ = ["experiment_file"]

SPEED = given_speed(1.0)
METHODS = [
    "zero-shot", "zero-shot-proxy", "local", "centralized", "centralized-proxy", "fedavg-llm", "scaffold",
    "offsite-tuning", "fedbiot", "proxy-tuning", "fedproxy",
]  # fmt: skip


@pytest.mark.long
def test_costs_are_foretold(experiment_file: Callable[..., Path], tmp_path: Path) -> None:
    path = experiment_file(f"methods = {METHODS}\nseeds = [0]", epochs=1.5)
    found = forecast_comparison(path, SPEED)
    done = compare(path, tmp_path / "out")
    keys = ("method", "seed", "remove")
    foretold = {tuple(cell[key] for key in keys): cell for cell in found["cells"]}
    assert len(foretold) == len(done["cells"]) == len(METHODS)
    for cell in done["cells"]:
        one = foretold[tuple(cell[key] for key in keys)]
        assert {name: one["flops"][name] for name in cell["flops"]} == pytest.approx(cell["flops"], rel=1e-12)
        for name in ("exposed", "bytes_up", "bytes_down"):
            assert one[name] == pytest.approx(cell[name], rel=1e-12), name
        header = cell["proxy_bytes"] - one["proxy_bytes"]
        assert 0 <= header < 20_000
        assert (header > 0) == (cell["proxy_bytes"] > 0)


def test_shared_work_counts_once(experiment_file: Callable[..., Path]) -> None:
    found = forecast_comparison(experiment_file('methods = ["zero-shot", "fedavg", "h-ties"]\nseeds = [0, 1]'), SPEED)
    cells = {(cell["method"], cell["seed"]): cell["flops"]["all"] for cell in found["cells"]}
    assert cells["fedavg", 0] == cells["h-ties", 0]
    # The LLM is scored once for both seeds; each seed's proxy serves two methods, of which each scores two models.
    assert (found["all"]["cells"], found["all"]["jobs"]) == (6, 1 + 2 * (1 + 2 * (1 + 2)))
    assert found["all"]["flops"] < sum(cells.values())
    assert found["all"]["seconds"] == found["all"]["flops"] / 1e12


def test_a_scale_costs_a_score_and_no_training(experiment_file: Callable[..., Path]) -> None:
    file = experiment_file('methods = ["fedavg"]\nseeds = [0]\n')
    jobs = forecast_comparison(file, SPEED)["all"]["jobs"]
    half = '\n[[compare.variant]]\nname = "half"\nmethod = "fedavg"\nfuse = { scale = 0.5 }\n'
    file.write_text(file.read_text() + half)
    assert forecast_comparison(file, SPEED)["all"]["jobs"] == jobs + 1


def test_scoring_counts_in_the_work_and_not_in_what_a_method_costs(experiment_file: Callable[..., Path]) -> None:
    """Of the methods that federate; who trains alone, or on pooled rows, scores for nobody."""
    path = experiment_file('methods = ["fedavg", "local", "centralized"]\nseeds = [0]')
    text = path.read_text()

    def forecast(federate: str) -> dict[str, dict[str, float]]:
        path.write_text(text.replace("[federate]", f"[federate]\n{federate}"))
        return {cell["method"]: cell["flops"] for cell in forecast_comparison(path, SPEED)["cells"]}

    scored, alone = forecast("validation = 0.5"), forecast("validation = 0.5\nalone = true")
    for method, flops in scored.items():
        assert flops["clients"] == alone[method]["clients"]
        assert (alone[method]["all"] > flops["all"]) == (method == "fedavg")


def test_nothing_to_compare_by(experiment_file: Callable[..., Path]) -> None:
    path = experiment_file('methods = ["fedavg"]')
    (path.parent / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    text = path.read_text().replace('task = "colour"', 'data = "rows.jsonl"')
    path.write_text(text.replace('task = "shape"', 'data = "rows.jsonl"'))
    with pytest.raises(UsageError, match="nothing to compare by"):
        forecast_comparison(path, SPEED)


def test_a_method_that_does_not_fit_is_named(experiment_file: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"fedot, remove = 0\.75"):
        forecast_comparison(experiment_file('methods = ["fedot"]\nratios = [0.75]'), SPEED)
    with pytest.raises(UsageError, match="leaves no block of the proxy to heal"):
        forecast_comparison(experiment_file('methods = ["fedot"]\nratios = [0.5]'), SPEED)

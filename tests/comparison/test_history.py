"""What a cell keeps of its rounds, against the run directory of its training; and the page that is made of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedproxy.artifacts import Manifest, read_json
from fedproxy.comparison import compare
from fedproxy.layer_map import split_name
from fedproxy.records import Analysis, Round
from fedproxy.reporting import report_comparison
from fedproxy.reporting.rows import Compared
from fedproxy.typed_json import read_record

PLACES = {"proxy_tuned": "proxy_tuned.average", "worst": "worst.accuracy", "gap_closed": "gap_closed"}
METHODS = ("zero-shot", "centralized", "fedavg", "proxy-tuning", "fedproxy")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, experiment_file: Write) -> Path:
    path = tmp_path_factory.mktemp("compared") / "few"
    compare(experiment_file(f"seeds = [0, 1]\nmethods = {list(METHODS)}\n", blocks=4), path, jobs=1)
    return path


def cells(out: Path, method: str) -> list[dict[str, Any]]:
    return [cell for cell in read_json(out / "compare.json")["cells"] if cell["method"] == method]


@pytest.mark.parametrize("method", ["fedavg", "fedproxy"])
def test_rounds_are_those_of_the_training(out: Path, method: str) -> None:
    for cell in cells(out, method):
        [name] = cell["trainings"]
        run = out / "work" / "trainings" / name
        proxy = Manifest.read(run / "proxy")
        assert cell["proxy"] == {"layer_map": proxy.layer_map, "scores": proxy.scores}
        assert [round_["round"] for round_ in cell["rounds"]] == [1, 2]
        for round_ in cell["rounds"]:
            folder = run / "rounds" / f"{round_['round']:04d}"
            record = read_json(folder / "round.json")
            typed = read_record(folder / "round.json", Round)
            assert (typed.number, typed.seconds) == (record["round"], record["seconds"])
            assert {name: client.loss for name, client in typed.clients.items()} == {
                name: client["loss"] for name, client in record["clients"].items()
            }
            assert typed.analysis.model_dump() == {key: record["analysis"][key] for key in Analysis.model_fields}
            assert round_["analysis"]["names"] == ["colour-owner", "shape-owner"]
            for key, value in round_["analysis"].items():
                full = record["analysis"][key]
                if key == "names":
                    assert value == full
                elif key == "similarity":
                    assert [pytest.approx(row, abs=1e-4) for row in full] == value
                else:
                    assert value == pytest.approx(full, abs=1e-4)
            for client, kept in round_["clients"].items():
                assert kept["loss"] == pytest.approx(record["clients"][client]["loss"], abs=1e-4)
                assert kept["rows"] == record["clients"][client]["rows"] == 6


def test_conflict_is_the_mean_over_a_block_and_counts_blocks_of_the_llm(out: Path) -> None:
    cell = cells(out, "fedproxy")[0]
    [name] = cell["trainings"]
    tensors = load_file(out / "work" / "trainings" / name / "rounds" / "0002" / "conflict.safetensors")
    layers = cell["proxy"]["layer_map"]
    assert list(cell["rounds"][1]["conflict"]) == [str(block) for block in layers]
    last = [tensor for name, tensor in tensors.items() if split_name(name)[1] == len(layers) - 1]
    mean = sum(float(tensor.sum()) for tensor in last) / sum(tensor.numel() for tensor in last)
    assert cell["rounds"][1]["conflict"][str(layers[-1])] == pytest.approx(mean, abs=1e-4)


def test_only_federations_have_rounds(out: Path) -> None:
    assert all("rounds" not in cell for name in ("zero-shot", "centralized") for cell in cells(out, name))
    assert cells(out, "proxy-tuning")[0]["rounds"] == cells(out, "fedavg")[0]["rounds"]


def test_the_page_has_the_means_of_the_summary(out: Path) -> None:
    found, raw = read_record(out / "compare.json", Compared), read_json(out / "compare.json")
    assert [row.method for row in found.rows] == [row["method"] for row in raw["summary"]]
    for row, said in zip(found.rows, raw["summary"], strict=True):
        assert row.accuracy.__dict__ == pytest.approx(said["accuracy"])
        for quantity, place in PLACES.items():
            spread = row.spread(place)
            assert (spread and spread.__dict__) == (said[quantity] and pytest.approx(said[quantity]))
        assert {task: spread.__dict__ for task, spread in row.tasks.items()} == {
            task: pytest.approx(spread) for task, spread in said["tasks"].items()
        }
    assert found.clients == 2


def test_the_page_shows_the_rounds(out: Path, tmp_path: Path) -> None:
    page = report_comparison(out, tmp_path / "page.html").read_text()
    assert "fedavg, proxy-tuning · seed 0 · 2 rounds" in page
    assert "fedproxy · seed 0 · 2 rounds" in page
    for title in ("Similarity of the updates, round 2", "Mean conflict by block and round", "Score of each block"):
        assert title in page

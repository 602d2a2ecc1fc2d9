"""Choices that other packages add: found by name in any process, and told by their package where they are broken."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedproxy
from fedproxy.aggregation.merge import RULES, Rule
from fedproxy.aggregation.regularise import REGULARISERS, Regulariser
from fedproxy.errors import UsageError
from fedproxy.registry import AXES, Axis, axis
from tests.contracts.foreign import FEDERATE, install, install_others
from tests.test_pipeline import adapter_bytes, write_experiment


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`fedproxy ARGUMENT...` where the packages in a folder are installed."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "fedproxy", *map(str, arguments)]
    return subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_line_merges_by_a_rule_of_another_package(tmp_path):
    for name, values in (("a", [1.0, 3.0]), ("b", [3.0, 5.0])):
        save_file({"w": torch.tensor(values)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = command(
        install_others(tmp_path / "site"), "merge", *files, "--out", tmp_path / "m.safetensors", "--rule", "half-mean"
    )
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "m.safetensors")["w"].tolist() == [1.0, 2.0]


@pytest.mark.slow
def test_the_command_line_runs_an_experiment_that_chooses_them_on_every_axis(tmp_path, tiny_checkpoint, calibration):
    lines = "".join(f'{key} = "{value}"\n' for key, value in FEDERATE.items())
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=lines, rounds=2)
    path.write_text(path.read_text().replace("[compress]\n", '[compress]\nscore = "last-first"\n'))
    site = install_others(tmp_path / "site")
    done = command(site, "federate", path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    records = tmp_path / "run" / "rounds"
    assert (
        load_file(records / "0002" / "regulariser.safetensors").keys()
        == load_file(records / "0002" / "conflict.safetensors").keys()
    )
    assert {path.name for path in (tmp_path / "run" / "clients" / "colours").iterdir()} == {
        "0002.safetensors",
        "0003.safetensors",
    }
    assert adapter_bytes(tmp_path / "run")
    refused = command(tmp_path, "federate", path, "--out", tmp_path / "elsewhere")
    assert refused.returncode == 2
    assert all(name in refused.stderr for name in (*FEDERATE.values(), "last-first"))


ROW = RULES["mean"]


def rules() -> Axis[Rule]:
    """The axis as a fresh process has it."""
    return Axis("merge rule", "fedproxy.rules", Rule, {"mean": ROW})


@pytest.mark.parametrize(
    ("name", "module", "says"),
    [
        ("mine", "raise RuntimeError('no such card')", "no such card"),
        ("mine", "", "ROW"),
        ("mine", "ROW = 3", "a int"),
        ("mine", "from fedproxy.aggregation.merge import RULES\nROW = RULES['ties']", "'ties'"),
        ("mean", "ROW = 3", "taken"),
    ],
)
def test_a_choice_that_cannot_be_used_is_told_by_its_package(tmp_path, monkeypatch, name, module, says):
    monkeypatch.syspath_prepend(
        install(tmp_path, "fedproxy-broken", {"fedproxy.rules": {name: "broken:ROW"}}, broken=module)
    )
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match=rf"{name}.*fedproxy-broken") as refused:
        [rules().choose(found) for found in rules()]
    assert says in str(refused.value)


def test_two_packages_of_one_name_are_told(tmp_path, monkeypatch):
    for package in ("one", "other"):
        monkeypatch.syspath_prepend(install(tmp_path / package, package, {"fedproxy.rules": {"mine": "x:ROW"}}))
    with pytest.raises(UsageError, match=r"'mine' of the package (one|other)"):
        list(rules())


def test_one_broken_choice_leaves_the_others_usable(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, "broken", {"fedproxy.rules": {"mine": "nowhere:ROW"}}))
    assert rules().choose("mean") is ROW
    assert list(rules()) == ["mean", "mine"]


@pytest.fixture
def forgotten():
    """What a test registers is forgotten after it."""
    rows = {group: dict(axis(group)._rows) for group in AXES}
    yield
    for group, held in rows.items():
        axis(group)._rows.clear()
        axis(group)._rows.update(held)


def test_a_program_registers_its_own(forgotten):
    fedproxy.register_rule(replace(ROW, name="mine"))
    merged, _ = fedproxy.merge([{"w": torch.ones(2)}, {"w": torch.zeros(2)}], rule="mine")
    assert merged["w"].tolist() == [0.5, 0.5]
    fedproxy.register_regulariser(Regulariser("still"))
    assert "still" in REGULARISERS


@pytest.mark.parametrize(
    "bad", [replace(ROW, name="ties"), 3, Regulariser("mine")], ids=["taken", "a number", "of another axis"]
)
def test_what_is_taken_or_no_choice_is_not_registered(bad, forgotten):
    with pytest.raises(UsageError, match=r"fedproxy\.rules"):
        fedproxy.register_rule(bad)

from dataclasses import dataclass

import pytest

from fedproxy.artifacts import read_json, write_json
from fedproxy.attack_records import ATTACKS_FILE
from fedproxy.privacy.attacks import Attack, Figure, Found
from fedproxy.privacy.attacks import audit as module
from fedproxy.registry import Axis


@dataclass(frozen=True)
class Options:
    depth: float = 1.0


@dataclass
class Subject:
    path: object
    seed: int = 5


def test_what_another_audit_notes_meanwhile_stays(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"attacks": {"theirs": {"title": "noted by another process"}}}

    def attack(subject, options, tell):
        write_json(tmp_path / ATTACKS_FILE, other)
        return Found([Figure("update", "AUC", options.depth / 4)])

    row = Attack("ours", "Ours", "none", "nothing", Options, attack)
    monkeypatch.setattr(module, "ATTACKS", Axis("attack", "fedproxy.tried", Attack, {"ours": row}))
    monkeypatch.setattr(module, "Subject", Subject)
    found = module.audit(tmp_path, options={"ours": {"depth": 2.0}})
    assert read_json(tmp_path / ATTACKS_FILE).keys() == found.keys()
    assert sorted(found["attacks"]) == ["ours", "theirs"]
    assert found["attacks"]["ours"]["figures"][0]["value"] == 0.5

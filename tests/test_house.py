"""Limits that keep the house small enough to be read."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lines(*folders):
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in files}


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "scripts"])
def test_no_file_is_longer_than_500_lines(folder):
    found = lines(folder)
    assert found
    assert {name: count for name, count in found.items() if count > 500} == {}


def test_the_rounds_are_read_in_an_afternoon():
    found = lines("src/fedproxy/federation")
    secure = sum(count for name, count in found.items() if "/secure/" in name)
    assert 0 < sum(found.values()) - secure < 5000
    assert 0 < secure < 800

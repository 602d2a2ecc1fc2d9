"""What the how-to tells those who have an idea of their own to write is run as it stands there."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch

from fedproxy.aggregation.merge import Rule, merge
from fedproxy.aggregation.regularise import Regulariser
from fedproxy.registry import axis
from tests.contracts.foreign import install

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "add_a_choice.md"
BLOCK = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def told(title: str) -> dict[str, str]:
    """The files that a section tells to write, by name."""
    section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    return dict(BLOCK.findall(section))


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Install what a section tells; gives the one choice that it adds."""
    axes = []

    def install_and_choose(title):
        files = told(title)
        project = tomllib.loads(files.pop("pyproject.toml"))["project"]
        assert sum(len(text.splitlines()) for text in files.values()) <= 30
        sources = {name.removesuffix(".py"): text for name, text in files.items()}
        monkeypatch.syspath_prepend(install(tmp_path, project["name"], project["entry-points"], **sources))
        importlib.invalidate_caches()
        [(group, points)] = project["entry-points"].items()
        axes.append((axis(group), *points))
        axis(group)._found = None  # as a process that starts now
        [name] = points
        return axis(group).choose(name)

    yield install_and_choose
    for held, name in axes:
        held._rows.pop(name, None)
        held._found = None


def test_the_merge_rule_that_the_page_tells(packaged):
    rule = packaged("Add a merge rule from outside the package")
    assert isinstance(rule, Rule)
    merged, _ = merge([{"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([3.0, 1.0])}], rule.name, factor=0.5)
    assert merged["w"].tolist() == [1.5, -2.0]


def test_the_regulariser_that_the_page_tells(packaged):
    row = packaged("Add a regulariser from outside the package")
    assert isinstance(row, Regulariser)
    given = {"w": torch.tensor([1.0, -4.0], requires_grad=True)}
    value = row.term({"w": torch.tensor([0.0, -1.0])}, None, 0.5, torch.device("cpu"))(given)
    value.backward()
    assert (value.item(), given["w"].grad.tolist()) == (2.0, [0.5, -0.5])

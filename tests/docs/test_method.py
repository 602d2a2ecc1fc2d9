"""The page of the method and the code that it speaks of: each names the other, equation by equation."""

import ast
import re
from pathlib import Path

import pytest

import fedproxy
from tests.docs.terminal import DOCS

PACKAGE = Path(fedproxy.__file__).parent
PAGE = (DOCS / "method.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### Eq\. ([\d–]+): .*\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE)
CITED = re.compile(r"Eq\. (\d+(?:-\d+)?(?:(?:, | and )\d+(?:-\d+)?)*)")


def numbers(text: str) -> set[int]:
    """The equations that "5-7 and 10" means."""
    found = re.findall(r"(\d+)(?:[-–](\d+))?", text)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


def cited(text: str) -> set[int]:
    return {number for equations in CITED.findall(text) for number in numbers(equations)}


def docstring(path: str, name: str) -> str:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return ast.get_docstring(node) or ""


def test_every_equation_of_the_paper_has_a_section():
    assert sorted(number for equations, _ in SECTIONS for number in numbers(equations)) == list(range(4, 16))
    assert PAGE.count("\n") <= 150


@pytest.mark.parametrize(("equations", "text"), SECTIONS, ids=[equations for equations, _ in SECTIONS])
def test_the_functions_of_an_equation_are_there_and_cite_it(equations, text):
    where = text.partition("- Where: ")[2].partition("\n- ")[0]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", where)
    found = set().union(*(cited(docstring(path, name)) for path, name in named))
    assert numbers(equations) <= found, "no function that the page names cites it"


def test_the_page_has_the_defaults_of_the_code():
    from fedproxy.aggregation.analyse import DELTA, R0
    from fedproxy.aggregation.merge.h_ties import HTiesOptions
    from fedproxy.aggregation.regularise import REGULARISERS

    said = dict(re.findall(r"(r0|δ|ρ|λ) = ([\d.e-]*\d)", PAGE))
    options = {"r0": R0, "δ": DELTA, "ρ": HTiesOptions().rho, "λ": REGULARISERS["pcr"].strength}
    assert {name: float(value) for name, value in said.items()} == options

"""Flower is used as it is: nothing under src assigns into its modules, classes or functions."""

import ast
from pathlib import Path

import pytest

import fedproxy

SOURCES = sorted(Path(fedproxy.__file__).parent.rglob("*.py"))
PATCHED = """
import flwr.supercore.retry.http_retry as retry
from flwr.supercore.inflatable import inflatable_utils as utils
from flwr.supernode import start_client_internal
import flwr.app, importlib
{change}
"""


def flowers(tree: ast.AST) -> set[str]:
    """The names that a module has from flwr."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "flwr"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root(node: ast.expr) -> str:
    """The name at the left end of a.b[c].d, also of vars(a)[b]."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in ("vars", "getattr") and node.args
            node = node.args[0] if named else node.func
        elif isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
            node = node.value
        else:
            return ""
    return node.id


def changes(source: str) -> list[int]:
    """Lines that change something of flwr's: an assignment or deletion below it, setattr, an import by its name."""
    tree = ast.parse(source)
    names, found = flowers(tree), []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("setattr", "delattr") and root(node.args[0]) in names:
                found.append(node.lineno)
            if name.endswith(("import_module", "__import__")) and "flwr" in ast.unparse(node):
                found.append(node.lineno)
            if name.endswith((".update", ".setdefault")) and root(node.func) in names:
                found.append(node.lineno)
        for target in targets:
            if not isinstance(target, ast.Name) and root(target) in names:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_of_flower_is_changed(path: Path) -> None:
    assert changes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "change",
    [
        "retry.MAX_RETRY_DELAY = 2",
        "vars(retry)['MAX_RETRY_DELAY'] = 2",
        "utils.pull_objects.__defaults__ = (1,)",
        "utils.pull_objects.__kwdefaults__.update(x=1)",
        "setattr(start_client_internal, 'time', None)",
        "flwr.app.Message = None",
        "flwr.app.Message.x += 1",
        "del utils.pull_objects",
        "importlib.import_module('flwr.app')",
    ],
)
def test_a_change_would_be_found(change: str) -> None:
    assert changes(PATCHED.format(change=change)) == [PATCHED.count("\n", 0, PATCHED.index("{change}")) + 1]

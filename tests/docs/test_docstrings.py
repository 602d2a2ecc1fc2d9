"""What the docstrings promise: every public name has one, says what a caller must know, and its examples are right."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedproxy
from fedproxy import errors

ROOT = Path(fedproxy.__file__).parent
MODULES = {path.relative_to(ROOT.parent): path for path in sorted(ROOT.rglob("*.py"))}
EXAMPLES = [name for name, path in MODULES.items() if ">>>" in path.read_text()]
RAISED = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
MANY = 6
"""A function of so many parameters names them; a command's are named in its `--help`."""
ELSEWHERE = re.compile(r"(?:see|as of) `")
"""How a docstring says that another one says the rest."""


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def public(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The public classes, functions and methods of a module; none of what lies within a function or a private class."""
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    todo.append(node)


def own(node: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function does itself, not what functions within it do, nor what it tries and catches."""
    todo: list[ast.AST] = [node]
    while todo:
        parent = todo.pop()
        tried = parent.body if isinstance(parent, ast.Try) and parent.handlers else []
        for child in ast.iter_child_nodes(parent):
            if child not in tried:
                yield child
                if not isinstance(child, ast.FunctionDef | ast.Lambda):
                    todo.append(child)


def problems(tree: ast.Module, *, command: bool = False) -> list[str]:
    """What the docstrings of a module lack."""
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for node in public(tree):
        text = ast.get_docstring(node)
        if text is None:
            found.append(f"{node.name} has no docstring")
        if text is None or isinstance(node, ast.ClassDef) or command or ELSEWHERE.search(text):
            continue
        arguments = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)} - {"self"}
        if len(arguments) >= MANY and "Args:" not in text:
            found.append(f"{node.name} has {len(arguments)} parameters and no Args")
        kinds = {n.exc.func.id for n in own(node) if isinstance(n, ast.Raise) and _called(n.exc)} & RAISED
        if kinds and "Raises:" not in text:
            found.append(f"{node.name} raises {', '.join(sorted(kinds))} and has no Raises")
    return found


def _called(raised: ast.expr | None) -> bool:
    return isinstance(raised, ast.Call) and isinstance(raised.func, ast.Name)


@pytest.mark.parametrize("name", MODULES, ids=str)
def test_public_names_are_documented(name):
    assert problems(ast.parse(MODULES[name].read_text()), command="cli" in name.parts) == []


def test_the_check_finds_what_is_missing():
    source = "def f(a, b): ...\ndef _g(): ...\nclass C:\n    '''C.'''\n    def m(self): ..."
    assert problems(ast.parse(source)) == ["the module has no docstring", "f has no docstring", "m has no docstring"]
    said = "'''M.'''\ndef f(a, b, c, d, e, f):\n    '''F.'''\n    raise UsageError('no')"
    assert [text.split()[-1] for text in problems(ast.parse(said))] == ["Args", "Raises"]


@pytest.mark.parametrize("name", fedproxy.__all__)
def test_the_public_surface_says_all(name):
    thing = getattr(fedproxy, name)
    text = inspect.getdoc(thing) or ""
    if isinstance(thing, type):
        assert "Attributes:" in text
        return
    order = [text.index(f"\n{part}:\n") for part in ("Args", "Returns", "Raises", "Example")]
    assert order == sorted(order)
    arguments = text[order[0] : order[1]]
    for parameter in inspect.signature(thing).parameters:
        assert f"\n    {parameter}: " in arguments.replace("**", ""), parameter
    assert text.split("\n\n")[0].count("\n") == 0


def test_the_public_surface_is_sorted_and_whole():
    names = fedproxy.__all__
    assert names == sorted(set(names))
    assert dir(fedproxy) == sorted([*names, "__version__"])
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    nodes = list(ast.walk(typed))
    imported = {node.name for node in nodes if isinstance(node, ast.alias)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    axes = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and node.attr == "register"}
    assert sorted((imported - axes) | stored) == names  # what type checkers see
    assert (ROOT / "py.typed").is_file()
    with pytest.raises(AttributeError, match="compres"):
        fedproxy.compres  # noqa: B018


@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_examples_are_right(name):
    found = doctest.testmod(importlib.import_module(module(name)), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed

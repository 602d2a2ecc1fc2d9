"""Every text file is UTF-8, with or without a byte order mark, whatever the locale says."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedproxy.artifacts import read_json
from fedproxy.config import load_experiment
from fedproxy.data import read_objects
from fedproxy.public_text import read_documents
from tests.test_pipeline import adapter_bytes, write_experiment

MARK = b"\xef\xbb\xbf"
SOURCE = Path(__file__).parents[1] / "src"


def says_no_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file, or a process' pipes, as text in whatever encoding the locale has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    modes = [argument.value for argument in call.args[1:2] if isinstance(argument, ast.Constant)]
    binary = any("b" in str(mode) for mode in [*modes, given.get("mode", "")])
    opens = (isinstance(call.func, ast.Name) and name == "open") or name == "fdopen"
    texts = (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) < 2)
    return "encoding" not in given and (given.get("text") is True or texts or (opens and not binary))


def test_whoever_reads_or_writes_text_names_its_encoding() -> None:
    calls = {
        f"{file.name}, line {call.lineno}": call
        for file in SOURCE.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
    }
    assert [where for where, call in calls.items() if says_no_encoding(call)] == []


def marked(path: Path, text: str) -> Path:
    path.write_bytes(MARK + text.encode())
    return path


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, tiny_checkpoint, calibration) -> None:
    plain = write_experiment(tmp_path, tiny_checkpoint(), calibration)
    text = plain.read_text(encoding="utf-8")
    assert load_experiment(marked(tmp_path / "marked.toml", text)) == load_experiment(plain)
    assert read_json(marked(tmp_path / "a.json", '{"ä": 1}')) == {"ä": 1}
    assert list(read_objects(marked(tmp_path / "a.jsonl", '{"text": "ä"}\n'))) == [{"text": "ä"}]
    assert read_documents(marked(tmp_path / "b.jsonl", '{"text": "ä"}\n'))[0] == ["ä"]
    assert read_documents(marked(tmp_path / "b.txt", "ä"))[0] == ["ä"]


@pytest.mark.long
def test_a_locale_of_ascii_changes_nothing(tmp_path: Path, tiny_checkpoint, calibration) -> None:
    """Names of clients and files that ASCII cannot say, and output that it cannot."""
    project = tmp_path / "Bücher Łódź"
    project.mkdir()
    experiment = write_experiment(project, tiny_checkpoint(), calibration, rounds=1)
    (project / "colours.jsonl").rename(project / "Bäcker.jsonl")
    text = experiment.read_text(encoding="utf-8").replace("colours.jsonl", "Bäcker.jsonl")
    experiment.write_text(text, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for out, extra in (("as usual", {}), ("für ASCII", ascii_only), ("für ASCII", ascii_only)):
        done = subprocess.run(
            [sys.executable, "-m", "fedproxy", "run", str(experiment), "--out", str(project / out), "--resume"],
            env={**os.environ, **extra},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
    assert adapter_bytes(project / "as usual") == adapter_bytes(project / "für ASCII")
    events = (project / "für ASCII" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert any(json.loads(line)["event"] == "resumed" for line in events)
    wrong = subprocess.run(
        [sys.executable, "-m", "fedproxy", "run", str(project / "Öl.toml"), "--out", str(project / "x")],
        env={**os.environ, **ascii_only},
        capture_output=True,
        check=False,
    )
    assert (wrong.returncode, "Öl.toml" in wrong.stderr.decode()) == (3, True)

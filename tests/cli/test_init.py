"""An experiment file is written that the dry run accepts, and the doctor finds what is wrong with one."""

import json
import os
import pty
import select
import shutil
import sys
from pathlib import Path

import pytest

import fedproxy
from fedproxy.config import load_experiment
from fedproxy.demo import CALIBRATION, LLM

DEMO = Path(fedproxy.__file__).parent / "demo"
FLAGS = ("--llm", DEMO / "llm", "--calibration", DEMO / "calibration.txt")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bank.csv").write_text("prompt,completion,label\na, b,x\nc, d,y\n")
    Path("travel.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    return tmp_path


def test_the_dry_run_and_the_doctor_accept_what_init_writes(cli, rows):
    code, out, _ = cli(
        "init",
        *FLAGS,
        "--client",
        "bank = bank.csv",
        "--client",
        "travel=travel.jsonl",
        "--out",
        "new/e.toml",
        "--json",
    )
    assert (code, json.loads(out)["path"]) == (0, "new/e.toml")
    written = load_experiment(Path("new/e.toml"))
    assert [(client.name, client.data) for client in written.client] == [
        ("bank", str(rows / "bank.csv")),
        ("travel", str(rows / "travel.jsonl")),
    ]
    assert 'data = "../bank.csv"' in Path("new/e.toml").read_text()
    code, out, _ = cli("run", "new/e.toml", "--dry-run", "--tflops", 1, "--json")
    assert (code, set(json.loads(out)["clients"])) == (0, {"bank", "travel"})
    code, out, _ = cli("doctor", "new/e.toml", "--json")
    assert code == 0
    assert [one["fault"] for one in json.loads(out)["experiment"]] == [None] * 5


def test_demo_is_what_the_package_has_unless_something_here_is_called_so(cli, rows):
    flags = ["init", "--llm", "demo", "--calibration", "demo", "--client", "bank=bank.csv", "--overwrite"]
    assert cli(*flags)[0] == 0
    written = load_experiment(Path("experiment.toml"))
    assert (written.llm.path, written.compress.calibration) == (str(LLM), str(CALIBRATION))
    code, out, _ = cli("data", "check", "bank.csv", "--model", "demo", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 2)
    shutil.copytree(LLM, "demo")
    assert cli(*flags[:3], "--calibration", str(CALIBRATION), *flags[5:])[0] == 0
    assert load_experiment(Path("experiment.toml")).llm.path == str(rows / "demo")


def test_one_file_becomes_a_partition(cli, rows):
    assert cli("init", *FLAGS, "--data", "bank.csv", "--clients", 2)[0] == 0
    cut = load_experiment(Path("experiment.toml")).partition
    assert (cut.data, cut.clients, cut.scheme) == (str(rows / "bank.csv"), 2, "dirichlet")
    assert cli("init", *FLAGS, "--data", "travel.jsonl", "--clients", 1, "--out", "b.toml")[0] == 0
    assert load_experiment(Path("b.toml")).partition.scheme == "iid"
    assert cli("run", "experiment.toml", "--dry-run", "--tflops", 1)[0] == 0


def test_what_is_there_is_replaced_only_when_told(cli, rows):
    Path("experiment.toml").write_text("mine")
    assert cli("init", *FLAGS, "--client", "bank=bank.csv")[0] == 2
    assert Path("experiment.toml").read_text() == "mine"
    assert cli("init", *FLAGS, "--client", "bank=bank.csv", "--overwrite")[0] == 0
    assert load_experiment(Path("experiment.toml")).client[0].name == "bank"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (FLAGS, 2, "--client or --data"),
        (FLAGS[:2], 2, "--calibration"),
        ((*FLAGS, "--data", "bank.csv"), 2, "--clients"),
        ((*FLAGS, "--data", "bank.csv", "--clients", 3), 2, "2 rows"),
        ((*FLAGS, "--data", "bank.csv", "--client", "a=bank.csv"), 2, "exclude"),
        ((*FLAGS, "--clients", 3), 2, "--data"),
        ((*FLAGS, "--client", "bank.csv"), 2, "NAME=FILE"),
        ((*FLAGS, "--client", "a=bank.csv", "--client", "a=bank.csv"), 2, "called a"),
        ((*FLAGS, "--client", "a/b=bank.csv"), 2, "a/b"),
        ((*FLAGS, "--client", "a=gone.csv"), 3, "gone.csv"),
        (("--llm", "./x", *FLAGS[2:], "--client", "a=bank.csv"), 3, "./x"),
        (("--llm", ".", *FLAGS[2:], "--client", "a=bank.csv"), 3, "config.json"),
        ((*FLAGS[:2], "--calibration", "/", "--client", "a=bank.csv"), 3, "save_to_disk"),
        (("--llm", "x", "--calibration", "gone.txt", "--client", "a=bank.csv"), 2, "gone.txt"),
    ],
)
def test_nothing_is_written_or_asked_where_it_cannot_be(cli, rows, flags, code, said):
    found, _, told = cli("init", *flags)
    assert (found, Path("experiment.toml").exists()) == (code, False)
    assert said in " ".join(told.split())


@pytest.mark.slow
def test_on_a_terminal_it_asks(rows):
    """A real terminal, and the answers of somebody at it."""
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "fedproxy", "init", "--llm", str(DEMO / "llm")])
    shown = b""
    for question, answer in (
        (b"Public text", str(DEMO / "calibration.txt")),
        (b"One file of rows", ""),
        (b"Client 1", "bank"),
        (b"The rows of bank", "bank.csv"),
        (b"Client 2", ""),
    ):
        while question not in shown:
            assert select.select([terminal], [], [], 120)[0], shown
            shown += os.read(terminal, 4096)
        os.write(terminal, answer.encode() + b"\n")
    while select.select([terminal], [], [], 120)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # it has ended
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    assert [client.name for client in load_experiment(Path("experiment.toml")).client] == ["bank"]


def test_the_doctor_names_each_fault(cli, rows):
    Path("broken.json").write_text('[{"prompt": "a"}]')
    Path("e.toml").write_text(
        f'[llm]\npath = "{rows}"\n[compress]\ncalibration = "travel.jsonl"\n'
        '[[client]]\nname = "a"\ndata = "broken.json"\n[[client]]\nname = "b"\ndata = "bank.csv"\n'
        '[[client]]\nname = "c"\ntask = "no_such_task"\n'
    )
    code, out, _ = cli("doctor", "e.toml", "--json")
    found = {
        one["of"].partition(" ")[0] + " " + one["of"].split()[1].rstrip(","): one
        for one in json.loads(out)["experiment"][1:]
    }
    assert code == 3
    assert {name for name, one in found.items() if one["fault"]} == {
        "LLM " + str(rows),
        "client a",
        "client c",
        "tasks no_such_task",
    }
    assert "row 1: completion is missing" in found["client a"]["fault"]
    assert found["client b"]["found"] == "2 rows"
    code, out, told = cli("doctor", "e.toml")
    assert (code, out) == (3, "")
    assert told.count("✗") == 4


def test_the_doctor_lists_all_that_is_wrong_with_the_file_itself(cli, rows):
    Path("e.toml").write_text('[llm]\npath = "x"\n[compress]\ncalibration = "gone.txt"\n[train]\nepochs = -1\n')
    code, out, _ = cli("doctor", "e.toml", "--json")
    faults = [one["fault"] for one in json.loads(out)["experiment"]]
    assert code == 2
    assert len(faults) == 3
    assert any("gone.txt" in fault for fault in faults)
    assert cli("doctor", "gone.toml")[0] == 3

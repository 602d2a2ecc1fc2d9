import json
import subprocess
import sys

import pytest
import torch

import fedproxy
from fedproxy.cli import _command, main
from fedproxy.tensor_files import save_tensors


@pytest.fixture
def updates(tmp_path):
    paths = []
    for index in range(2):
        paths.append(tmp_path / f"client{index}.safetensors")
        save_tensors(paths[-1], {"w": torch.tensor([1.0 + index, -2.0, 3.0 * index])})
    return paths


COMMANDS = [
    "demo",
    "run",
    "compress",
    "federate",
    "serve",
    "join",
    "merge",
    "fuse",
    "evaluate",
    "report",
    "log",
    "data",
    "init",
    "doctor",
    "compare",
    "methods",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"Example: fedproxy {command}" in " ".join(out.split())


def test_help_needs_no_torch():
    script = "import sys, fedproxy.cli\ntry: fedproxy.cli.main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_shows_its_texts_as_they_are_meant():
    from rich.markup import render

    commands, seen = [_command()], 0
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for text in (command.help, command.epilog, *(getattr(parameter, "help", None) for parameter in command.params)):
            if text:
                assert render(text).plain == text.replace("\\[", "[")
                seen += 1
    assert seen > 100


def test_the_table_of_a_comparison_stands_in_its_help(cli):
    assert "[compare]" in cli("compare", "--help")[1]


@pytest.mark.parametrize("words", [["server"], ["keys", "ini"]])
def test_what_may_be_meant_is_said_once(cli, words):
    code, _, err = cli(*words)
    assert code == 2
    assert err.count("Did you mean") == 1


@pytest.mark.parametrize("words", [["--out", "~/m"], ["--out=~/m"]])
def test_the_home_directory_is_found_where_no_shell_did(cli, updates, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("merge", "~/client0.safetensors", updates[1], *words)[0] == 0
    assert (tmp_path / "m").is_file()


def test_wrong_usage_is_code_2(cli):
    assert cli("merge", "--no-such-flag")[0] == 2
    assert cli("no-such-command")[0] == 2


def test_merge_prints_one_json_object(cli, updates, tmp_path):
    out_file, conflict = tmp_path / "merged.safetensors", tmp_path / "conflict.safetensors"
    code, out, err = cli("merge", *updates, "--rule", "h-ties", "--out", out_file, "--conflict-out", conflict, "--json")
    assert (code, err) == (0, "")
    keys = {
        "clients",
        "parameters",
        "similarity",
        "heterogeneity",
        "weights",
        "retention",
        "conflict_mean",
        "zero_fraction",
    }
    assert keys <= json.loads(out).keys()
    assert out_file.exists()
    assert conflict.exists()


def test_merge_options_and_rows(cli, updates, tmp_path):
    code, _, _ = cli("merge", *updates, "--rule", "mean", "--rows", "1,3", "--out", tmp_path / "m")
    assert code == 0
    from safetensors.torch import load_file

    assert load_file(tmp_path / "m")["w"].tolist() == pytest.approx([1.75, -2.0, 2.25])
    _, out, _ = cli("merge", *updates, "--rule", "mean", "--rows", "1,3", "--out", tmp_path / "m2", "--json")
    assert json.loads(out)["weights"] == [0.25, 0.75]
    assert "weights 0.250, 0.750" in cli("merge", *updates, "--rule=mean", "--rows=1,3", "--out", tmp_path / "m3")[2]
    assert "weights none" in cli("merge", *updates, "--rule", "median", "--out", tmp_path / "m4")[2]
    for rule in (["h-ties"], ["mean", "--option", "weights=uniform"]):
        code, _, err = cli("merge", *updates, "--rows", "1,3", "--out", tmp_path / "r", "--rule", *rule)
        assert code == 2
        assert "does not weigh by them" in err
    assert not (tmp_path / "r").exists()
    assert cli("merge", *updates, "--option", "rho=1.5", "--out", tmp_path / "n")[0] == 0
    code, _, err = cli("merge", *updates, "--option", "roh=1.5", "--out", tmp_path / "o")
    assert code == 2
    assert "rho" in err
    assert cli("merge", *updates, "--option", "rho", "--out", tmp_path / "o")[0] == 2
    assert cli("merge", *updates, "--rows", "1;2", "--out", tmp_path / "o")[0] == 2


def corrupt(kind, path):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-3])
    elif kind == "no safetensors":
        path.write_text("hello")
    else:
        values = {
            "renamed tensor": {"v": torch.zeros(3)},
            "another shape": {"w": torch.zeros(4)},
            "NaN": {"w": torch.tensor([1.0, float("nan"), 1.0])},
            "Inf": {"w": torch.tensor([1.0, float("inf"), 1.0])},
        }
        save_tensors(path, values[kind])


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "no safetensors", "renamed tensor", "another shape", "NaN", "Inf"]
)
def test_a_bad_update_is_code_3_and_nothing_is_written(cli, updates, tmp_path, kind):
    corrupt(kind, updates[1])
    out_file = tmp_path / "merged.safetensors"
    out_file.write_text("complete")
    code, out, err = cli("merge", *updates, "--out", out_file, "--overwrite")
    assert (code, out) == (3, "")
    assert "client1" in err
    assert "Traceback" not in err
    assert out_file.read_text() == "complete"
    assert not list(tmp_path.glob(".*"))


def test_existing_output_needs_overwrite(cli, updates, tmp_path):
    (tmp_path / "m").write_text("complete")
    code, _, err = cli("merge", *updates, "--out", tmp_path / "m")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "m").read_text() == "complete"


def test_unwritable_output_is_code_2(cli, updates, tmp_path):
    code, _, err = cli("merge", *updates, "--out", tmp_path / "client0.safetensors" / "m")
    assert code == 2
    assert "cannot write" in err


def test_compress_refusals(cli, tiny_checkpoint, calibration, tmp_path):
    llm = tiny_checkpoint()
    common = ["--calibration", calibration]
    (tmp_path / "empty").mkdir()
    assert cli("compress", tmp_path / "empty", tmp_path / "p", *common)[0] == 3
    assert cli("compress", tmp_path / "missing" / "x" / "y", tmp_path / "p", *common)[0] == 3
    for remove in ("1", "-0.1", "nan", "2"):
        code, _, err = cli("compress", llm, tmp_path / "p", *common, "--remove", remove)
        assert code == 2
        assert "remove" in err
    code, _, err = cli("compress", llm, tmp_path / "p", *common, "--score", "block-inflence")
    assert code == 2
    assert "block-influence" in err
    assert cli("compress", llm, tmp_path / "p", "--calibration", tmp_path / "none.txt")[0] == 3
    assert not (tmp_path / "p").exists()


def test_compress_then_existing_output(cli, tiny_checkpoint, calibration, tmp_path):
    code, out, _ = cli("compress", tiny_checkpoint(), tmp_path / "p", "--calibration", calibration, "--json")
    assert code == 0
    assert len(json.loads(out)["layer_map"]) == 3
    before = {path: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    assert cli("compress", tiny_checkpoint(), tmp_path / "p", "--calibration", calibration)[0] == 2
    assert {path: path.read_bytes() for path in (tmp_path / "p").iterdir()} == before


def test_config_errors_are_code_2_and_come_together(cli, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text('[llm]\npth = "x"\n[federate]\nrounds = 0\n')
    code, _, err = cli("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert 'Did you mean "path"' in err
    assert "rounds = 0" in err
    assert not (tmp_path / "run").exists()
    assert cli("run", tmp_path / "missing.toml", "--out", tmp_path / "run")[0] == 3


def test_unknown_task_is_code_2(cli, tiny_checkpoint):
    code, _, err = cli("evaluate", tiny_checkpoint(), "--tasks", "ssst2")
    assert code == 2
    assert "sst2" in err


def test_report_of_no_run_is_code_3(cli, tmp_path):
    assert cli("report", tmp_path)[0] == 3


def test_report_of_several_runs_writes_their_pages_and_one_that_compares_them(cli, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()
        (run / "results.json").write_text("{}")
    code, out, err = cli("report", *runs, "--out", tmp_path / "both.html", "--json")
    assert code == 0, err
    pages = [str(run / "report.html") for run in runs]
    assert json.loads(out) == {"reports": pages, "comparison": str(tmp_path / "both.html")}
    assert all((run / "report.html").is_file() for run in runs)
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    assert "comparison" not in json.loads(cli("report", runs[0], "--json")[1])
    assert cli("report", runs[0], runs[0], "--out", tmp_path / "both.html")[0] == 2


def test_our_bugs_are_code_1_without_a_traceback(cli, monkeypatch, updates, tmp_path):
    def broken(*arguments, **keywords):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fedproxy.federation.merge_files.merge_files", broken)
    code, _, err = cli("merge", *updates, "--out", tmp_path / "m")
    assert code == 1
    assert "bug in fedproxy: ZeroDivisionError: oops" in " ".join(err.split())
    with pytest.raises(ZeroDivisionError):
        main(["merge", *map(str, updates), "--out", str(tmp_path / "m"), "--debug"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), OSError(28, "No space left")])
def test_exhausted_resources_are_code_5(cli, monkeypatch, updates, tmp_path, error):
    def broken(*arguments, **keywords):
        raise error

    monkeypatch.setattr("fedproxy.federation.merge_files.merge_files", broken)
    assert cli("merge", *updates, "--out", tmp_path / "m")[0] == 5


def test_doctor(cli):
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    assert "torch" in json.loads(out)["versions"]


def test_public_names_are_sorted_and_there():
    assert fedproxy.__all__ == sorted(fedproxy.__all__)
    for name in fedproxy.__all__:
        assert getattr(fedproxy, name).__doc__
    with pytest.raises(AttributeError):
        fedproxy.nothing  # noqa: B018

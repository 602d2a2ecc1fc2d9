"""A run or a comparison that somebody else sent: what it says stays within bounds, and nothing outside it is read."""

import html as escapes
import json
import re
import shlex
import tomllib

import pytest

from fedproxy.artifacts import SHAPING
from fedproxy.errors import ArtifactError
from fedproxy.reporting import compare_runs, report, report_comparison

from .methods_sample import methods_sample, parse
from .sample import sample, write_conflict

EVIL = [
    "1.0\nrm -rf ~",
    "1.0; rm -rf ~",
    "$(rm -rf ~)",
    "1.0' rm -rf ~ '",
    "--index-url=http://rm",
    "</pre><pre>rm -rf ~",
    "1.0\u202erm",
    "1.0\u2028rm -rf ~",
]
VERSIONS = {"fedproxy": "1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0.dev0", "lm_eval": "0.4.13rc1"}
PIP = "pip install fedproxy==1.0 torch==2.13.0 transformers==5.23.0.dev0 lm_eval==0.4.13rc1"


def section(html):
    return html[html.index(">Reproduce</h2>") :]


def commands(html):
    return escapes.unescape(re.search('aria-label="Commands">(.*?)</pre>', section(html), re.DOTALL)[1]).splitlines()


def evil_everywhere(value, text):
    """A value with `text` for every string, and as a key more in every object."""
    if isinstance(value, dict):
        return {name: evil_everywhere(entry, text) for name, entry in value.items()} | {text: text}
    if isinstance(value, list):
        return [evil_everywhere(entry, text) for entry in value]
    return text if isinstance(value, str) else value


def compared(folder, text):
    raw = methods_sample(["fedavg"], seeds=(0,), tasks=["a"], rounds=1)
    raw["environment"] = evil_everywhere({"versions": dict.fromkeys([*SHAPING, "other"], "1"), "command": ["x"]}, text)
    for key in ("experiment", "compare"):
        raw[key] = evil_everywhere(raw[key], text)
    raw |= {"commit": text, "name": text, "flops": text}
    (folder / "compare.json").write_text(json.dumps(raw))
    return report_comparison(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", EVIL)
def test_a_comparisons_words_reach_no_command_and_stay_in_the_lines_of_its_experiment(tmp_path, text):
    html = compared(tmp_path, text)
    assert commands(html) == ["fedproxy compare experiment.toml --out NEW", "fedproxy report NEW"]
    rest = re.sub("<details>.*?</details>", "", section(html), flags=re.DOTALL)
    assert "rm" not in re.sub("<.*?>", "", re.sub("<script>.*", "", rest, flags=re.DOTALL)).replace("experiment", "")

    told = re.search('aria-label="Experiment file">(.*?)</pre>', section(html), re.DOTALL)[1]
    told = escapes.unescape(told)
    assert tomllib.loads(told)[text] == text
    assert not [line for line in told.splitlines() if line and not re.match(r'\[|[a-z_]+ = |"', line)]


@pytest.mark.parametrize("text", EVIL)
def test_a_runs_words_do_not_reach_the_commands(tmp_path, text):
    results = sample(rounds=0) | {"name": text}
    results["experiment"] = evil_everywhere(results["experiment"], text)
    results["environment"] = {"versions": {**VERSIONS, "peft": text, text: "1.0", "other": "1.0"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    html = report(tmp_path / "run").read_text(encoding="utf-8")
    assert commands(html) == [PIP, "fedproxy run run/experiment.toml --out NEW_RUN", "fedproxy report run NEW_RUN"]


@pytest.mark.parametrize("name", ["-x", "--out=x", "a\nrm b", "$(rm b)", "a'b", "a\u202eb", "a b; rm c"])
def test_a_folders_name_is_one_argument_on_one_line(tmp_path, name):
    folders = [tmp_path / name, tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(sample(rounds=0) | {"environment": {}}))
    one, two = commands(report(folders[0]).read_text(encoding="utf-8"))
    assert [len(shlex.split(line)) for line in (one, two)] == [5, 4]
    assert not [part for part in shlex.split(two)[2:] if part.startswith("-")]
    several = commands(compare_runs(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [len(shlex.split(line)) for line in several] == [5, 5, 4]
    assert not [line for line in several if shlex.split(line)[2].startswith("-")]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write_conflict(folder, rounds=2)
    results = sample(rounds=2)
    for record in results.pop("rounds"):
        (folder / "rounds" / f"{record['round']:04d}" / "round.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "events.jsonl").write_text('{"event": "begun"}\n')
    return folder


INSIDE = ["results.json", "events.jsonl", "rounds", "rounds/0001", "rounds/0001/round.json"]
INSIDE += ["rounds/0002/conflict.safetensors"]


@pytest.mark.parametrize("name", INSIDE)
def test_a_link_out_of_a_run_is_not_followed(run, tmp_path, name):
    report(run)
    (run / name).rename(tmp_path / "secret")
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=re.escape(str(run / name))):
        report(run)


def test_a_link_within_a_run_and_one_to_a_run_are_followed(run, tmp_path):
    page = report(run).read_text(encoding="utf-8")
    (run / "events.jsonl").rename(run / "log")
    (run / "events.jsonl").symlink_to("log")
    (tmp_path / "elsewhere").mkdir()
    run.rename(tmp_path / "elsewhere" / "run")
    run.symlink_to(tmp_path / "elsewhere" / "run")
    assert report(run).read_text(encoding="utf-8") == page


def test_a_link_out_of_a_comparison_is_not_followed(tmp_path):
    raw = json.dumps(methods_sample(["fedavg"], seeds=(0,), tasks=["a"], rounds=1))
    (tmp_path / "secret").write_text(raw)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "compare.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="compare"):
        report_comparison(tmp_path / "compare")
    assert report_comparison(tmp_path / "secret", tmp_path / "page.html").is_file()  # it is named: the link is no trap


CELL = {"accuracy": {"average": 0.5}}


def cells(count, **varied):
    return [
        {"method": "m", "seed": 0, "remove": 0.5, **CELL, **{k: f(i) for k, f in varied.items()}} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"cells": cells(20_000, seed=int)}, "cells"),
        ({"cells": cells(20_000)}, "cells"),
        ({"cells": cells(9_999, seed=int) + cells(1)}, "cells"),
        ({"cells": cells(500, method=str)}, "cells"),
        ({"cells": cells(500, remove=lambda i: i / 500)}, "cells"),
        ({"cells": [{**cells(1)[0], "proxy": {"scores": [0.5] * 20_000}}]}, "cells[0].proxy.scores"),
    ],
)
def test_a_comparison_too_large_or_with_a_cell_twice_is_refused(record, place):
    with pytest.raises(ArtifactError) as caught:
        parse(record)
    assert str(caught.value).startswith(f"FILE.{place} ")


def test_as_many_cells_as_there_may_be_are_read():
    found = parse({"cells": cells(10_000, seed=lambda i: i // 400, method=lambda i: f"m{i % 400}")})
    assert [len(row.cells) for row in found.rows] == [25] * 400

"""What announces gigantic things is refused in the memory and time that a healthy artifact takes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hostile.checkpoints import GIGANTIC_ADAPTERS, GIGANTIC_CHECKPOINTS
from tests.hostile.tensor_files import GIGANTIC_TENSOR_FILES, Attack

ROOT = Path(__file__).parents[2]
SPARE_MIB, SECONDS = 256, 20
MERGE = ["merge", "update.safetensors", "update.safetensors", "--out", "out"]
COMPRESS = ["compress", "llm", "out", "--calibration", "calibration.txt"]
FUSE = ["fuse", "llm", "adapter", "out", "--as", "checkpoint"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space"),
]


def refused(whole: Path, tmp_path: Path, command: list[str], target: str, table: Mapping[str, Attack]) -> None:
    places = []
    for number, attack in enumerate([lambda path: None, *table.values()]):
        places.append(tmp_path / str(number))
        shutil.copytree(whole, places[-1])
        (places[-1] / "command.json").write_text(json.dumps(command))
        attack(places[-1] / target)
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile.limited", str(SPARE_MIB), str(SECONDS), *map(str, places)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + SECONDS * len(table),
    )
    found = [json.loads(line) for line in process.stdout.splitlines()]
    report = {
        attack: (code, said[:300], seconds) for attack, (_, code, said, seconds) in zip(table, found, strict=False)
    }
    assert {attack: result for attack, result in report.items() if result[0] != 3 or "alloc" in result[1]} == {}
    assert (len(found), process.returncode) == (len(table), 0), process.stderr[-2000:]
    assert not any((place / "out").exists() for place in places[1:])


def test_tensor_files(whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path, MERGE, "update.safetensors", GIGANTIC_TENSOR_FILES)


def test_adapters(whole: Path, tmp_path: Path) -> None:
    refused(whole, tmp_path, FUSE, "adapter", GIGANTIC_ADAPTERS)


@pytest.mark.parametrize("command", [COMPRESS, FUSE], ids=lambda command: command[0])
def test_checkpoints(whole: Path, tmp_path: Path, command: list[str]) -> None:
    refused(whole, tmp_path, command, "llm", GIGANTIC_CHECKPOINTS)

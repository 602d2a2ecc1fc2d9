"""kill -9 at random moments of prune, score, heal and fuse: what is there is whole, and running again succeeds."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from fedproxy.artifacts import Manifest
from fedproxy.compression import compress
from fedproxy.config import Heal
from fedproxy.fusion import fuse
from tests.fusion.test_fuse import make_adapter

KILLS = 20
BLOCKS = 12
pytestmark = pytest.mark.slow


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own, which has all imports already; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


STAGES = ["prune", "score", "heal-lora", "heal-full", "fuse-checkpoint", "fuse-adapter"]


@pytest.mark.parametrize("stage", STAGES)
def test_kills_at_random_moments(
    stage: str, tiny_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(num_hidden_layers=BLOCKS, hidden_size=64, intermediate_size=256)
    place = tmp_path / "place"
    out = place / "out"
    _, adapter = make_adapter(llm, tmp_path / "adapter")

    def work(target: Path = out) -> None:
        if stage.startswith("fuse"):
            fuse(llm, adapter, target, form=stage.removeprefix("fuse-"))
        elif stage.startswith("heal"):
            mode = stage.removeprefix("heal-")
            heal = Heal(steps=12, mode=mode, save_every=2, batch_size=2, max_length=24, lora_r=4, held_out=2)  # type: ignore[arg-type]
            compress(llm, target, calibration=calibration, max_length=24, heal=heal)
        elif stage == "score":
            compress(llm, target, calibration=calibration, max_length=64, batch_size=1, placement="stream")
        else:
            compress(llm, target, score="uniform")

    started = time.monotonic()
    assert os.waitpid(in_child(lambda: work(tmp_path / "whole")), 0)[1] == 0
    taken = time.monotonic() - started
    expected = contents(tmp_path / "whole")
    generator = random.Random(stage)
    killed = 0
    while killed < KILLS:
        child = in_child(work)
        time.sleep(generator.uniform(0, taken))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        if out.exists():  # nothing but the whole artifact ever bears its name
            assert without_times(contents(out)) == without_times(expected)
            Manifest.read(out)
            for file in (*out.iterdir(), out):
                file.rmdir() if file.is_dir() else file.unlink()
    assert os.waitpid(in_child(work), 0)[1] == 0
    assert without_times(contents(out)) == without_times(expected)
    assert [path.name for path in place.iterdir()] == ["out"]


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files without the seconds that healing took."""
    return {
        name: b"\n".join(line for line in content.split(b"\n") if b'"seconds"' not in line)
        if name == "fedproxy.json"
        else content
        for name, content in files.items()
    }

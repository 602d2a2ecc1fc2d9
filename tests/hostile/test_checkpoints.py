"""A checkpoint or an adapter whose files contradict each other or point elsewhere: exit code 3, nothing written."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError
from tests.hostile.checkpoints import ADAPTERS, CHECKPOINTS

COMMANDS = {
    "compress": ["compress", "llm", "out", "--calibration", "calibration.txt"],
    "compress unread": ["compress", "llm", "out", "--score", "uniform"],
    "fuse": ["fuse", "llm", "adapter", "out"],
    "fuse to checkpoint": ["fuse", "llm", "adapter", "out", "--as", "checkpoint"],
}


def believe(place: Path) -> None:
    """Make the adapter name the damaged LLM as its own, if that has an identity: the two were made by the same hand."""
    with contextlib.suppress(ArtifactError):
        identity = model_identity(place / "llm")
        config, tensors, manifest = read_adapter(place / "adapter")
        write_adapter(place / "adapter", config, tensors, replace(manifest, llm_sha256=identity))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(
    command: str, attack: str, place: Path, fedproxy: Callable[..., tuple[int, str]]
) -> None:
    CHECKPOINTS[attack](place / "llm")
    believe(place)
    before = sorted(place.rglob("*"))
    code, said = fedproxy(*COMMANDS[command])
    assert code == 3, said
    assert "llm" in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
@pytest.mark.parametrize("attack", ADAPTERS)
def test_a_hostile_adapter_is_refused(
    form: str, attack: str, place: Path, fedproxy: Callable[..., tuple[int, str]]
) -> None:
    ADAPTERS[attack](place / "adapter")
    before = sorted(place.rglob("*"))
    code, said = fedproxy("fuse", "llm", "adapter", "out", "--as", form)
    assert code == 3, said
    assert "adapter" in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_whole_one_is_taken(command: str, place: Path, fedproxy: Callable[..., tuple[int, str]]) -> None:
    code, said = fedproxy(*COMMANDS[command])
    assert code == 0, said

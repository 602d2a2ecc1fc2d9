"""Whole artifacts to damage: a sharded checkpoint, an adapter of its proxy, an update."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.models import lora
from fedproxy.models.families import keep_blocks
from fedproxy.tensor_files import save_tensors
from tests.conftest import make_model, make_tokenizer

KEEP = [1, 2, 5]


def make_artifacts(directory: Path) -> None:
    """Write llm/, adapter/ and update.safetensors into `directory`."""
    llm, adapter = directory / "llm", directory / "adapter"
    make_model().save_pretrained(llm, max_shard_size="100kB")
    make_tokenizer().save_pretrained(llm)
    assert len(list(llm.glob("model-*-of-00003.safetensors"))) == 3
    proxy = lora.attach(keep_blocks(make_model(), KEEP), r=4, alpha=6, dropout=0.1, seed=0)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor if "lora_A" in name else torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.adapter_state(proxy).items()
    }
    adapter.mkdir()
    write_adapter(adapter, lora.adapter_config(proxy), state, Manifest("proxy-adapter", model_identity(llm), 6, KEEP))
    save_tensors(directory / "update.safetensors", {"w": torch.ones(2)})
    (directory / "calibration.txt").write_text("A document.\n\nAnother document.")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with whole artifacts; shared: do not write into it."""
    directory = tmp_path_factory.mktemp("whole")
    make_artifacts(directory)
    return directory


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the whole artifacts to damage, which is the current directory too."""
    copy = tmp_path / "place"
    shutil.copytree(whole, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def fedproxy(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs the command line and gives the exit code and what was said on stderr."""
    from fedproxy.cli import main

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return int(str(end.value.code)), capsys.readouterr().err

    return call

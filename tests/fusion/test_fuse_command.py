import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.cli import main
from tests.fusion.test_fuse import make_adapter

Checkpoint = Callable[..., Path]


def exit_code(*arguments: object) -> object:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_scale_auto_prints_the_curve(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    arguments = ["fuse", llm, adapter, tmp_path / "out", "--scale", "auto", "--public", calibration]
    assert exit_code(*arguments, "--samples", 4, "--max-length", 16) == 0
    shown = capsys.readouterr().err
    assert "nats per token" in shown
    assert "chosen" in shown
    assert "the LLM itself" in shown
    assert exit_code(*arguments, "--samples", 4, "--max-length", 16, "--json", "--overwrite") == 0
    printed = json.loads(capsys.readouterr().out)
    settings = Manifest.read(tmp_path / "out").settings
    assert printed["scale"] == settings["scale"] == min(printed["scale_curve"][1:], key=lambda row: row[1])[0]
    assert printed["scale_curve"] == settings["scale_curve"]
    assert "note" not in printed


def test_wrong_scales_are_wrong_usage(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    for options in (["--scale", "auto"], ["--public", str(calibration)], ["--scale", "big"], ["--scale", "nan"]):
        assert exit_code("fuse", llm, adapter, tmp_path / "out", *options) == 2
        assert "scale" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_adapter_that_servers_do_not_take_says_so(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    config, tensors, manifest = read_adapter(adapter)
    tensors["base_model.model.model.norm.weight"] = torch.ones(32)
    write_adapter(adapter, {**config, "modules_to_save": ["norm"]}, tensors, manifest)
    assert exit_code("fuse", llm, adapter, tmp_path / "out") == 0
    assert "vLLM" in capsys.readouterr().err
    assert exit_code("fuse", llm, adapter, tmp_path / "c", "--as", "checkpoint") == 0
    assert "vLLM" not in capsys.readouterr().err

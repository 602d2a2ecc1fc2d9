from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedproxy.errors import UsageError
from fedproxy.models import placement
from fedproxy.models.placement import open_stream
from fedproxy.models.source import open_source

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(
    ("asked", "free", "stays"),
    [("auto", 10**9, True), ("auto", 1000, False), ("memory", 1000, True), ("stream", 10**9, False)],
)
def test_what_fits_is_kept_and_it_is_said(
    asked: str,
    free: int,
    stays: bool,
    tiny_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(placement, "available_memory", lambda: free)
    caplog.set_level("INFO", "fedproxy")
    stream = open_stream(open_source(tiny_checkpoint()), asked)
    for _ in stream.walk():
        pass
    if not torch.cuda.is_available():
        assert all(not weight.is_meta for weight in stream.blocks.parameters()) == stays
        assert ("one block at a time" in caplog.text) != stays
        assert "GB needed" in caplog.text
        assert "GB free" in caplog.text


def test_unknown_placements_are_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="auto, memory, stream"):
        open_stream(open_source(tiny_checkpoint()), "disk")

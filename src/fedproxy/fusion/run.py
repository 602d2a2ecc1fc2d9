"""Fuse the adapter that a run ended with."""

from collections.abc import Callable
from pathlib import Path

from fedproxy.config import Experiment
from fedproxy.fusion import fuse


def fuse_run(
    experiment: Experiment, path: Path, on_progress: Callable[[str, float, str], None], out: Path | None = None
) -> None:
    """Fuse RUN/adapter as [fuse] says into `out`, or into RUN/fused; errors as of `fuse`."""
    fuse(
        experiment.llm.path,
        path / "adapter",
        out or path / "fused",
        scale=experiment.fuse.scale,
        public=experiment.fuse.public or None,
        proxy=path / "proxy",
        trust_remote_code=experiment.llm.trust_remote_code,
        on_progress=lambda fraction, text: on_progress("fuse", fraction, text),
    )

"""The demo: a small LLM, four clients' licensed data and the experiment that joins them, all in the package."""

from pathlib import Path

EXPERIMENT = Path(__file__).parent / "experiment.toml"

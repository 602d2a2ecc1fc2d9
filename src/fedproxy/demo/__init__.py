"""The demo: a small LLM, four clients' licensed data and the experiment that joins them, all in the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent
EXPERIMENT, LLM, CALIBRATION = _FOLDER / "experiment.toml", _FOLDER / "llm", _FOLDER / "calibration.txt"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BLOCKS = 8
TASK = (
    "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{train: {name}.jsonl, test: {name}.jsonl}}\n"
    "training_split: train\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{name} of {{{{text}}}}:'\n"
    "doc_to_target: label\ndoc_to_choice: ['{one}', '{other}']\nmetric_list:\n  - metric: acc\n"
)
WORDS = {"colour": ("red", "blue"), "shape": ("round", "flat")}


@pytest.fixture(scope="session")
def experiment_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path], calibration: Path
) -> Callable[..., Path]:
    """A function that writes an experiment of two clients with a task each, and its [compare] table."""

    def write(
        compare: str, *, blocks: int = BLOCKS, clients: int = 2, rounds: int = 2, extra: str = "", **train: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("experiment")
        tables = ""
        for name, (one, other) in list(WORDS.items())[:clients]:
            (folder / f"{name}.yaml").write_text(TASK.format(name=name, one=one, other=other))
            rows = [{"text": f"thing {i}", "label": i % 2} for i in range(6)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            tables += f'[[client]]\nname = "{name}-owner"\ntask = "{name}"\n'
        settings = {"batch_size": 4, "lora_r": 2, "max_length": 32, "learning_rate": 0.01, **train}
        path = folder / "experiment.toml"
        path.write_text(
            f'[llm]\npath = "{tiny_checkpoint(num_hidden_layers=blocks)}"\n[compress]\nremove = 0.25\n'
            f'calibration = "{calibration}"\nmax_length = 16\n{tables}[train]\n'
            + "".join(f"{key} = {value}\n" for key, value in settings.items())
            + f'[federate]\nrounds = {rounds}\n[evaluate]\ninclude = "{folder}"\n'
            f"[heal]\nrefit = 4\nsteps = 1\nbatch_size = 2\nmax_length = 8\nlora_r = 2\n{extra}[compare]\n{compare}"
        )
        return path

    return write


def timeless(value: Any) -> Any:
    """Without seconds, memory, the command that was given and the state of the clone."""
    if isinstance(value, dict):
        varying = ("seconds", "peak_memory_bytes", "command", "commit", "environment")
        return {key: timeless(part) for key, part in value.items() if key not in varying}
    return [timeless(part) for part in value] if isinstance(value, list) else value

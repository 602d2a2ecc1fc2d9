import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedproxy.tensor_files import save_tensors

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "merge_memory.py"


@pytest.mark.long
@pytest.mark.parametrize(("rule", "options"), [("mean", {}), ("ties", {}), ("h-ties", {"r0": 0.8})])
def test_merging_files_takes_at_most_the_inputs_and_30_percent(tmp_path, rule, options):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        save_tensors(path, {"w": torch.randn(10_000_000)})
    job = {"paths": [str(path) for path in paths], "out": str(tmp_path / "out"), "rule": rule, "options": options}
    command = [sys.executable, str(BENCHMARK), "--child", json.dumps(job)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["ratio"] <= 1.3, found

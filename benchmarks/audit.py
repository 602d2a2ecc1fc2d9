"""What attacks find on the demo: every attack on a run of it, and the LLM from nine proxies of other blocks.

    python benchmarks/audit.py [--run DIR]

Writes benchmarks/results/audit.json. DIR is a run of the demo that is complete up to the fused LLM; without it one is
made.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import commit

import fedproxy
from fedproxy.artifacts import write_json
from fedproxy.demo import EXPERIMENT
from fedproxy.fusion.run import fuse_run
from fedproxy.pipeline import read_experiment
from fedproxy.privacy.attacks.audit import audit
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
OWN, ALL = "the demo's run", "proxies of other blocks"
FEW: dict[str, Any] = {"proxies": "all", "steps": 10.0}


def attacked(run: Path) -> dict[str, Any]:
    def show(attack: str, fraction: float, text: str) -> None:
        print(f"{attack} {fraction:4.0%} {text}", flush=True)

    found = audit(run, on_progress=show)["attacks"]
    more = audit(run, ["llm-from-proxy"], options={"llm-from-proxy": FEW}, on_progress=show)["attacks"]
    return {OWN: found, ALL: {"llm-from-proxy": more["llm-from-proxy"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "audit.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run
        if run is None:
            experiment, run = read_experiment(EXPERIMENT), Path(folder) / "run"
            fedproxy.federate(experiment, run)
            fuse_run(experiment, run, lambda *_: None)
        found = attacked(run)
    for attacks in found.values():
        for one in attacks.values():
            del one["environment"]
    write_json(
        args.out, {"commit": commit(), "environment": {**environment(), "command": ["audit.py"]}, "attacks": found}
    )


if __name__ == "__main__":
    main()

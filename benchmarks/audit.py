"""What attacks find on the demo: every attack on a run of it, and the LLM from nine proxies of other blocks.

    python benchmarks/audit.py [--run DIR] [--attack NAME]

Writes benchmarks/results/audit.json. DIR is a run of the demo that is complete up to the fused LLM; without it one is
made. With NAME that attack alone is measured, the file keeps what it holds of the others, and the attack's figures name
their own commit and environment.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import commit

import fedproxy
from fedproxy.artifacts import read_json, write_json
from fedproxy.attack_records import FROM_PROXY
from fedproxy.demo import EXPERIMENT
from fedproxy.fusion.run import fuse_run
from fedproxy.pipeline import read_experiment
from fedproxy.privacy.attacks.audit import audit
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
OWN, ALL = "the demo's run", "proxies of other blocks"
FEW: dict[str, Any] = {"proxies": "all", "steps": 10.0}


def attacked(run: Path, attacks: list[str]) -> dict[str, dict[str, Any]]:
    """Attack → what it found, on the demo's run and on proxies of other blocks; all attacks if none is named."""

    def show(attack: str, fraction: float, text: str) -> None:
        print(f"{attack} {fraction:4.0%} {text}", flush=True)

    own = audit(run, attacks, on_progress=show)["attacks"]
    found = {OWN: {name: own[name] for name in attacks or own}}
    if not attacks or FROM_PROXY in attacks:
        more = audit(run, [FROM_PROXY], options={FROM_PROXY: FEW}, on_progress=show)["attacks"]
        found[ALL] = {FROM_PROXY: more[FROM_PROXY]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--attack", action="append", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "audit.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run
        if run is None:
            experiment, run = read_experiment(EXPERIMENT), Path(folder) / "run"
            fedproxy.federate(experiment, run)
            fuse_run(experiment, run, lambda *_: None)
        found = attacked(run, args.attack)
    made = {"commit": commit(), "environment": {**environment(), "command": ["audit.py"]}}
    for attacks in found.values():
        for one in attacks.values():
            del one["environment"]
            one |= made if args.attack else {}
    if args.attack:
        made = read_json(args.out)
        found = {place: made["attacks"].get(place, {}) | attacks for place, attacks in found.items()}
        found = made.pop("attacks") | found
    write_json(args.out, {**made, "attacks": found})


if __name__ == "__main__":
    main()

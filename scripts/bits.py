"""What a change does to the bits: hashes of all tensors that runs of the demo and of every variant write.

    PYTHONPATH=OLD/src python scripts/bits.py write old.json
    PYTHONPATH=NEW/src python scripts/bits.py write new.json
    python scripts/bits.py compare old.json new.json

Runs: the demo with three seeds; each choice of wire, space and regulariser on two small clients of the demo's LLM, once
whole and once killed in the second round and resumed; both ends of the hand-out by Flower are held to the inline engine
by the tests. One thread throughout, since sums depend on their number.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

VARIANTS = {
    "plain": "",
    "bf16": 'wire = "bf16"\nwire_down = "bf16"',
    "int8": 'wire = "int8"\nwire_down = "int8"',
    "int4": 'wire = "int4"\nwire_down = "int4"',
    "top-k": 'wire = "top-k"\nwire_options = { values = "int8" }\nmerge_options = { r0 = 0.5 }\nwire_down = "int8"',
    "top-k 10 %": 'wire = "top-k"\nwire_options = { share = 0.1, values = "int4" }',
    "frozen-a": 'space = "frozen-a"',
    "frozen-a, int4": 'space = "frozen-a"\nwire = "int4"\nwire_down = "int4"',
    "product": 'space = "product"\nregulariser = "none"',
    "product, momentum": 'space = "product"\nregulariser = "none"\nserver_optimizer = "fedavgm"',
    "fedprox, fedadam": 'regulariser = "fedprox"\nmerge = "mean"\nserver_optimizer = "fedadam"',
    "scaffold": 'regulariser = "scaffold"\nmerge = "mean"',
    "scaffold, frozen-a, int4": 'regulariser = "scaffold"\nspace = "frozen-a"\nwire = "int4"',
    "one of two clients": 'wire = "int4"\nparticipation = 0.5\nquorum = 1',
    "ties": 'merge = "ties"',
    "mean, clipped": 'merge = "mean"\nmerge_options = { clip_norm = "median" }',
    "median": 'merge = "median"',
    "trimmed-mean": 'merge = "trimmed-mean"',
}
WORDS = {"colours": ("red", "green", "blue"), "numbers": ("one", "two", "three")}


class Killed(BaseException):
    """Ends a run as a kill would, at a step of the second round."""


def kill_in_round_two(stage: str, fraction: float, text: str) -> None:
    if stage == "federate" and text.startswith("round 2/") and "numbers" in text:
        raise Killed


def hashes(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*.safetensors"))
        if path.relative_to(run).parts[0] not in ("clients", "proxy")
    }


def write_variant(folder: Path, extra: str) -> Path:
    from fedproxy.demo import EXPERIMENT

    folder.mkdir()
    text = f'name = "bits"\n[llm]\npath = "{EXPERIMENT.parent / "llm"}"\n[compress]\nsamples = 16\nmax_length = 32\n'
    text += f'calibration = "{EXPERIMENT.parent / "calibration.txt"}"\n'
    for name, words in WORDS.items():
        rows = [{"prompt": f"say {word} {i}:", "completion": f" {word}"} for i in range(8) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text += f'[[client]]\nname = "{name}"\ndata = "{name}.jsonl"\n'
    text += (
        "[train]\nbatch_size = 8\nlearning_rate = 1e-2\nlora_r = 4\nlora_alpha = 8\nmax_length = 32\nblocks = [0, -1]\n"
    )
    path = folder / "experiment.toml"
    path.write_text(f"{text}[federate]\nrounds = 3\n{extra}\n")
    return path


def write(out: Path, only: list[str]) -> None:
    import torch

    import fedproxy
    from fedproxy.demo import EXPERIMENT

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, extra in VARIANTS.items():
            if only and name not in only:
                continue
            path = write_variant(work / name.replace(" ", "-"), extra)
            fedproxy.federate(path, path.parent / "whole")
            found[name] = hashes(path.parent / "whole")
            with contextlib.suppress(Killed):
                fedproxy.federate(path, path.parent / "killed", on_progress=kill_in_round_two)
            fedproxy.federate(path, path.parent / "killed", resume=True)
            found[f"{name}, resumed"] = hashes(path.parent / "killed")
            print(name, len(found[name]), file=sys.stderr)
        for seed in range(3):
            if only and "demo" not in only:
                continue
            text = EXPERIMENT.read_text().replace("seed = 0", f"seed = {seed}")
            for key in ('path = "llm"', 'calibration = "calibration.txt"', 'include = "tasks"'):
                name, value = key.split(" = ")
                text = text.replace(key, f'{name} = "{EXPERIMENT.parent / value[1:-1]}"')
            path = work / f"demo-{seed}.toml"
            path.write_text(text)
            fedproxy.federate(path, work / f"demo-{seed}")
            found[f"demo, seed {seed}"] = hashes(work / f"demo-{seed}")
            print("demo", seed, file=sys.stderr)
    out.write_text(json.dumps(found, indent=1))


def named(run: dict[str, str]) -> dict[str, str]:
    """The files of a run by today's names."""
    return {name.replace("/control.safetensors", "/regulariser.safetensors"): found for name, found in run.items()}


def compare(old: Path, new: Path) -> int:
    before, after = ({run: named(files) for run, files in json.loads(p.read_text()).items()} for p in (old, new))
    differ = [
        f"{run}: {name}"
        for run in before
        for name in before[run].keys() | after.get(run, {}).keys()
        if before[run].get(name) != after.get(run, {}).get(name)
    ]
    print("\n".join(sorted(differ)) or f"{sum(map(len, before.values()))} files of {len(before)} runs: all equal")
    return bool(differ)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("out", type=Path)
    writing.add_argument("--only", action="append", default=[], help="a variant's name, or demo")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.old, given.new)
    write(given.out, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())

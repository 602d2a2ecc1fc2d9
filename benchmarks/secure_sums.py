"""Seconds and bytes of secure sums: groups of 8 and 100 members, 300,000 values each.

    python benchmarks/secure_sums.py [--members 8,100] [--values 300000]

All members and the server are one process on one thread, and take turns. One setup serves two sums: of the first nobody
is lost, of the second one member after the keys are shared. The threshold is two thirds of the members. A member's
seconds are medians and ranges over members; those of message 1 are for the keys that it tells of, too. The server's are
those of all members' messages together. Bytes are those of the messages themselves, a word in four bytes. Writes
benchmarks/results/secure_sums.json.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from measuring import commit, spread

from fedproxy.artifacts import versions, write_json
from fedproxy.privacy.sums import Member, Tally, drawn

CONTEXT = b"benchmark"
LABELS = {"nobody lost": 0, "one lost": 1}
"""The sums, and how many members are lost in each."""
RESULTS = Path(__file__).parent / "results" / "secure_sums.json"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def of_all(work: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each one's result, and the spread of seconds without the list of all."""
    found = {name: timed(each) for name, each in work.items()}
    seconds = spread([seconds for seconds, _ in found.values()], 4)
    return {name: result for name, (_, result) in found.items()}, {
        key: seconds[key] for key in ("median", "least", "most")
    }


def size(packets: Mapping[str, bytes]) -> int:
    return sum(map(len, packets.values()))


def measured(count: int, values: int) -> dict[str, Any]:
    names = [f"member-{number:03}" for number in range(count)]
    threshold = -(-2 * count // 3)
    group, advertise = of_all(
        {name: lambda own=own: Member(own, CONTEXT, list(LABELS), agreement=True) for name, own in drawn(names).items()}
    )
    tally = Tally(CONTEXT, list(LABELS), threshold)
    words = np.random.default_rng(0).integers(0, 2**32, values, np.uint32)
    adverts = {name: member.advertise() for name, member in group.items()}
    server: dict[str, float] = {}
    server["advertise"], _ = timed(lambda: [tally.advertised(*each) for each in adverts.items()])
    shown = tally.adverts()
    sealed, share = of_all(
        {name: lambda member=member: member.share(shown, threshold) for name, member in group.items()}
    )
    server["share"], _ = timed(lambda: [tally.shared(*each) for each in sealed.items()])
    packets = {name: tally.packets_for(name) for name in names}
    record: dict[str, Any] = {
        "threshold": threshold,
        "member_seconds": {"advertise": advertise, "share": share},
        "server_seconds": {key: round(value, 4) for key, value in server.items()},
        "member_bytes": {
            "advertise": {"up": len(adverts[names[0]]), "down": 0},
            "share": {"up": size(sealed[names[0]]), "down": size(shown)},
        },
        "sums": {},
    }
    for label, lost in LABELS.items():
        there = names[lost:]
        record["sums"][label] = one_sum(label, {name: group[name] for name in there}, tally, words, packets)
        record["sums"][label]["right"] = bool(np.array_equal(tally.opened(label), np.uint32(len(there)) * words))
    return record


def one_sum(
    label: str, group: Mapping[str, Member], tally: Tally, words: np.ndarray, packets: Mapping[str, dict[str, bytes]]
) -> dict[str, Any]:
    hidden, adding, masking = {}, [], []
    for name, member in group.items():  # one after the other, so that the words of all are never in memory
        seconds, hidden = timed(lambda member=member, name=name: member.mask(label, words, packets[name]))
        masking.append(seconds)
        adding.append(timed(lambda name=name, hidden=hidden: tally.masked(label, name, hidden))[0])
    survivors = tally.survivors(label)
    signed, agree = of_all({name: lambda member=m: member.agree(label, survivors) for name, m in group.items()})
    for name, signature in signed.items():
        tally.agreed(label, name, signature)
    agreements = tally.agreements(label)
    answers, reveal = of_all(
        {name: lambda member=m: member.reveal(label, survivors, agreements) for name, m in group.items()}
    )
    taking, _ = timed(lambda: [tally.revealed(label, *each) for each in answers.items()])
    opening, _ = timed(lambda: tally.opened(label))
    mask = {key: value for key, value in spread(masking, 4).items() if key != "all"}
    first = survivors[0]
    named = len(json.dumps(survivors))
    return {
        "member_seconds": {"mask": mask, "agree": agree, "reveal": reveal},
        "server_seconds": {"mask": round(sum(adding), 4), "reveal": round(taking, 4), "opening": round(opening, 4)},
        "member_bytes": {
            "mask": {"up": hidden.nbytes, "down": size(packets[first])},
            "agree": {"up": len(signed[first]), "down": named},
            "reveal": {"up": len(answers[first]), "down": size(agreements)},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="8,100")
    parser.add_argument("--values", type=int, default=300_000)
    arguments = parser.parse_args()
    record = {
        "values": arguments.values,
        "groups": {count: measured(int(count), arguments.values) for count in arguments.members.split(",")},
        "commit": commit(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": 1, "load": os.getloadavg()[1]},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, record)
    print(json.dumps(record, indent=2))
    if not all(each["right"] for group in record["groups"].values() for each in group["sums"].values()):
        raise SystemExit("A sum is wrong.")


if __name__ == "__main__":
    main()

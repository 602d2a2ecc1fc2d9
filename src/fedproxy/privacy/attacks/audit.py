"""Attack a finished run, and note in RUN/attacks.json what came of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedproxy.artifacts import write_json
from fedproxy.attack_records import ATTACKS_FILE, read_attacks
from fedproxy.privacy.attacks import ATTACKS, Subject
from fedproxy.registry import build
from fedproxy.run_directory import environment


def audit(
    run: str | Path,
    attacks: Sequence[str] = (),
    *,
    options: Mapping[str, Mapping[str, object]] | None = None,
    on_progress: Callable[[str, float, str], None] | None = None,
) -> dict[str, Any]:
    """Attack what a finished run gives away: updates, proxy, adapter, tuned LLM.

    Each attack's figures are written to RUN/attacks.json once they are there; those of attacks that are not asked for
    stay in it. Nothing else of the run is changed.

    Args:
        run: The run directory.
        attacks: Names of attacks; all if none.
        options: Attack → its options by name; its defaults for what is left out.
        on_progress: Told the attack, the fraction of it that is done, and what is being done.

    Returns:
        What attacks.json holds.

    Raises:
        UsageError: there is no attack of that name, or an option is wrong.
        ArtifactError, ConfigError: the run or what it was made from cannot be used.
        ResourceError: memory or disk do not suffice.

    Example:
        `audit("runs/first", ["calibrated-loss"])["attacks"]["calibrated-loss"]["figures"][0]["value"]` → `0.61`
    """
    given = options or {}
    names = list(dict.fromkeys(attacks)) or list(ATTACKS)
    for name in given:
        ATTACKS.choose(name)
    chosen = [
        (row, build("attack", name, row.options, given.get(name, {})))
        for name, row in ((name, ATTACKS.choose(name)) for name in names)
    ]
    subject = Subject(Path(run))
    path = subject.path / ATTACKS_FILE
    record: dict[str, Any] = read_attacks(subject.path).model_dump()
    for row, settings in chosen:

        def tell(fraction: float, text: str, name: str = row.name) -> None:
            if on_progress is not None:
                on_progress(name, fraction, text)

        began = time.perf_counter()
        found = row.run(subject, settings, tell)
        record = read_attacks(subject.path).model_dump()  # another audit may have noted something meanwhile
        record["attacks"][row.name] = {
            "title": row.title,
            "paper": row.paper,
            "sees": row.sees,
            "options": asdict(settings),
            **asdict(found),
            "seconds": time.perf_counter() - began,
            "seed": subject.seed,
            "environment": environment(),
        }
        write_json(path, record)
        tell(1.0, "done")
    return record

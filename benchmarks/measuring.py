"""What several benchmarks measure and record."""

import statistics
import subprocess
from pathlib import Path
from typing import Any


def resident(field: str, process: int | str = "self") -> int:
    """VmRSS (now) or VmHWM (peak) of a process, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/{process}/status holds no {field}: this benchmark needs Linux.")


def commit() -> str | None:
    """The commit of this source, if it lies in a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def spread(values: list[float], digits: int) -> dict[str, Any]:
    """Median, extremes and all values, rounded."""
    rounded = [round(value, digits) for value in values]
    median = round(statistics.median(values), digits)
    return {"median": median, "least": min(rounded), "most": max(rounded), "all": rounded}

"""How much memory this process may still take, and how much it took at most."""

import contextlib
import resource
from pathlib import Path

_PROCESS = Path("/proc/self")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that the machine, the control group and the process's own limit leave."""
    free = [_bytes(Path("/proc/meminfo"), "MemAvailable")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _bytes(_PROCESS / "status", "VmSize"))
    for most, used in _GROUP_FILES:
        try:
            free.append(
                int((_CONTROL_GROUP / most).read_text("ascii")) - int((_CONTROL_GROUP / used).read_text("ascii"))
            )
        except (OSError, ValueError):
            continue
    return max(0, min(free))


def restart_peak() -> None:
    """Let `peak_memory` begin anew, where the kernel allows it; elsewhere it goes on from the start of the process."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", "ascii")


def peak_memory() -> int:
    """Most bytes of this process that were resident at once."""
    try:
        return _bytes(_PROCESS / "status", "VmHWM")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(path: Path, key: str) -> int:
    line = next(line for line in path.read_text("utf-8", "replace").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024

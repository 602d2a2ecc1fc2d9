import re
import resource
import subprocess
import sys
from pathlib import Path

from fedproxy.memory import available_memory, peak_memory, restart_peak

PEAK = """
from fedproxy.memory import peak_memory, restart_peak
held = bytearray(100 << 20)
high = peak_memory()
del held
restart_peak()
print(high, peak_memory())
"""
CODE = """
import resource
from fedproxy.memory import available_memory
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
print(available_memory())
"""


def test_it_is_some_and_no_more_than_the_machine_has() -> None:
    total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < available_memory() <= total
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_limit_of_the_process_counts() -> None:
    found = int(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True).stdout)
    assert 0 < found < 1 << 30


def test_the_peak_is_seen_and_begins_anew() -> None:
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True, text=True).stdout
    high, low = map(int, found.split())
    assert high > 100 << 20
    assert low < high - (90 << 20)


def test_where_the_kernel_tells_no_peak_the_whole_process_counts(monkeypatch) -> None:
    monkeypatch.setattr("fedproxy.memory._PROCESS", Path("/nowhere"))
    restart_peak()
    assert 0 < peak_memory() <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

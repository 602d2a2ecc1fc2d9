import re
import resource
import subprocess
import sys
from pathlib import Path

from fedproxy.memory import available_memory

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

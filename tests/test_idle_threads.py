import os
import subprocess
import sys

import pytest

SCRIPTS = {
    "command line": """
import os, sys
from fedproxy.cli import main
assert "torch" not in sys.modules
try:
    main(["--version-of-nothing"])
except SystemExit:
    pass
""",
    "Flower": """
import os, sys
import fedproxy.deployment.flower  # which Python imports before its module `app`
assert "torch" not in sys.modules
""",
}
SAY = "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


def chosen(script: str, **variables: str) -> list[str]:
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY as torch finds them, in a process that is started with `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script + SAY], env=kept | variables, check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-2:]


@pytest.mark.parametrize("start", SCRIPTS)
def test_idle_threads_sleep_soon_unless_the_user_chose(start: str) -> None:
    turns, policy = chosen(SCRIPTS[start])
    assert 0 < int(turns) < 300_000  # what GNU OpenMP does by itself
    assert policy == "None"


def test_what_the_user_chose_stays() -> None:
    assert chosen(SCRIPTS["command line"], OMP_WAIT_POLICY="active") == ["None", "active"]
    assert chosen(SCRIPTS["command line"], GOMP_SPINCOUNT="7") == ["7", "None"]

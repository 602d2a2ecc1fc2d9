"""Runs a command of Flower by its name, wherever its script lies: no PATH is searched, no first line of a script read.

$ python -P -m fedproxy.deployment.flower.command NAME ARGUMENT...
"""

import sys
from importlib.metadata import entry_points


def command(name: str, *arguments: str) -> list[str]:
    """The command line that runs Flower's command `name` in this Python."""
    return [sys.executable, "-P", "-m", "fedproxy.deployment.flower.command", name, *arguments]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    (found,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(found.load()())

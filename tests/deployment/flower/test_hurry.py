import json
import subprocess
import sys

from fedproxy.deployment.flower.hurry import FIRST_PAUSE, LONGEST_PAUSE, _default


def test_only_the_named_defaults_change():
    def positional(a, pause=1.0, cap=10.0, other=3):
        return a, pause, cap, other

    def keyword(a, *, pause=1.0, other=3):
        return a, pause, other

    for function in (positional, keyword):
        _default(function, pause=0.5, unknown=9.0)
    assert positional(0) == (0, 0.5, 10.0, 3)
    assert keyword(0) == (0, 0.5, 3)


HURRIED = """
import inspect, json
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from fedproxy.deployment.flower.hurry import hurry
found = []
for change in (lambda: None, hurry):
    change()
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        parameters = inspect.signature(function).parameters
        found.append([parameters[name].default for name in ("initial_backoff", "backoff_cap")])
print(json.dumps(found))
"""


def test_flowers_pulls_pause_briefly():
    """In a process of its own: what it changes holds for all that follows."""
    command = [sys.executable, "-W", "ignore", "-c", HURRIED]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(said.splitlines()[-1]) == [[1.0, 10.0]] * 2 + [[FIRST_PAUSE, LONGEST_PAUSE]] * 2

"""A SuperNode that asks for messages several times a second, and every two seconds for a server that is away.

Flower's own waits three seconds for the former, and up to twenty for the latter.

$ python -m fedproxy.deployment.flower.supernode PAUSE KEY ARGUMENT...
"""

import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedproxy.deployment.certificates import load_private
from fedproxy.deployment.flower.hurry import hurry

LONGEST_RETRY_SECONDS = 2


class Hurried:
    """The module `time`, whose `sleep` takes `pause` seconds at most."""

    def __init__(self, pause: float) -> None:
        self._pause = pause

    def sleep(self, seconds: float) -> None:
        """Sleep, but not for long."""
        time.sleep(min(seconds, self._pause))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main(arguments: list[str]) -> None:
    """Run `flower-supernode`.

    Args:
        arguments: The longest pause in seconds; the file of the key by which the server knows this client, which a
            SuperNode without TLS would draw anew; and the arguments of `flower-supernode`.
    """
    import flwr.supercore.retry.http_retry as retry
    import flwr.supernode.fleet_http_connection as connection
    import flwr.supernode.start_client_internal as loop

    hurry()
    private = load_private(Path(arguments[1]).read_bytes())
    vars(retry)["MAX_RETRY_DELAY"] = LONGEST_RETRY_SECONDS
    vars(loop)["time"] = Hurried(float(arguments[0]))
    vars(connection)["generate_key_pairs"] = lambda: (private, private.public_key())
    sys.argv = ["flower-supernode", *arguments[2:]]
    (command,) = entry_points(group="console_scripts", name="flower-supernode")
    command.load()()


if __name__ == "__main__":
    main(sys.argv[1:])

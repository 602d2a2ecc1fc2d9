"""Starts Flower's ClientApps by forking a process that has imported Flower already.

Flower starts `flwr-clientapp` from the PATH for each message, and importing Flower takes it more than a second. Here
the PATH holds a launcher of that name that hands its arguments to a process which has it imported; that process forks
and runs the ordinary `flwr-clientapp` in the child, with one difference: it does not install and load the app that the
server sends along, which could be any code, but always this package's own. Flower's other commands (a server can ask a
SuperNode for `flwr-agentapp`, which loads what it sends) are on that PATH as well, and do nothing.

$ python -m fedproxy.deployment.flower.clientapps SOCKET
"""

import importlib
import os
import signal
import socket
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedproxy.deployment.flower.hurry import hurry

NAME = "flwr-clientapp"
_ARGUMENT_BYTES = 1 << 16
_LAUNCHER = """#!{python} -IS
import socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    connection.sendall("\\0".join(sys.argv[1:]).encode())
"""
_REFUSAL = """#!/bin/sh
echo "a client of fedproxy runs no $(basename "$0")" >&2
exit 1
"""


def write_launchers(folder: Path, address: Path) -> None:
    """Write executables for Flower's commands into `folder`, to be the first on the PATH of a SuperNode.

    `flwr-clientapp` hands its arguments to the process at `address`; all others refuse.
    """
    commands = {command.name for command in entry_points(group="console_scripts") if command.name.startswith("flwr")}
    for name in commands | {NAME}:
        own = _LAUNCHER.format(python=sys.executable, address=str(address))
        (folder / name).write_text(own if name == NAME else _REFUSAL, encoding="utf-8")
        (folder / name).chmod(0o700)


def main(address: str) -> None:
    """Listen at the Unix socket `address` and start a ClientApp for each connection."""
    (command,) = entry_points(group="console_scripts", name=NAME)
    run = command.load()
    hurry()
    own = importlib.import_module("fedproxy.deployment.flower.app").client
    _replace("flwr.supernode.runtime.run_clientapp", "install_from_fab", lambda *_, **__: None)
    _replace("flwr.supernode.runtime.run_clientapp", "get_load_client_app_fn", lambda *_, **__: lambda *_, **__: own)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                received = b""
                while piece := connection.recv(_ARGUMENT_BYTES):
                    received += piece
            if os.fork() == 0:
                _become(run, received.decode().split("\0"))


def _replace(module: str, name: str, value: Any) -> None:
    """Give a name of a module another meaning; that it is there is a matter of safety."""
    names = vars(importlib.import_module(module))
    if name not in names:
        raise RuntimeError(f"{module} has no {name}: this release of Flower loads ClientApps in another way")
    names[name] = value


def _become(run: object, arguments: list[str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.argv = [NAME, *arguments]
    try:
        run()  # type: ignore[operator]
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main(sys.argv[1])

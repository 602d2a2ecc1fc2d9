"""A SuperNode of a data owner as a process: Flower's own command, which starts no program for what a server sends."""

import logging
import socket
import subprocess
import time
from pathlib import Path

from fedproxy.artifacts import write_secret
from fedproxy.deployment.flower import CLIENT_SETTINGS
from fedproxy.deployment.flower.command import command
from fedproxy.deployment.flower.ports import reserve_port
from fedproxy.deployment.flower.process import start, stop, tail
from fedproxy.deployment.flower.runtime import Runtime, isolated
from fedproxy.errors import FederationError

log = logging.getLogger(__name__)

LONG_ENOUGH_SECONDS = 60.0
"""A SuperNode that lived for so long ended for a reason of its own time, not because it cannot run here."""
PATIENCE_SECONDS = 150.0
"""After so long a time of short lives it is not started again."""
REVIVAL_SECONDS = 1.0


class SuperNode:
    """A SuperNode, from `start` to `close`.

    Args:
        folder: Where it keeps its log, its secret and its key.
        superlink: The server, or the relay to it: HOST:PORT, with "NAME:PASSWORD@" before it where no key tells who it
            is.
        ca: Certificate of the CA that vouches for that, PEM; none for plaintext.
        private: The key by which the server knows it, in OpenSSH's format.
    """

    def __init__(self, folder: Path, superlink: str, ca: bytes | None, private: bytes) -> None:
        self._folder = folder
        self.log = folder / "supernode.log"
        self._secret, alone = isolated(folder)
        secure = ["--insecure"]
        self._environment = {**CLIENT_SETTINGS, "FLWR_HOME": str(folder)}
        if ca is not None:
            (folder / "ca.crt").write_bytes(ca)
            key = folder / "key"
            write_secret(key, private)
            secure = ["--root-certificates", str(folder / "ca.crt"), "--auth-supernode-private-key", str(key)]
            # One certificate to read for every connection that is opened, where there would be the machine's hundreds.
            self._environment["SSL_CERT_FILE"] = str(folder / "ca.crt")
        self._command = command("flower-supernode", "--superlink", superlink, *alone, *secure)
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved: socket.socket | None = None
        self._runtime: Runtime | None = None
        self._began = self._well = time.monotonic()

    @property
    def runtime(self) -> Runtime:
        """Its Runtime API."""
        assert self._runtime is not None
        return self._runtime

    def start(self) -> None:
        """Start the process, at a port of its own."""
        self._leave()
        self._reserved = reserve_port()
        port = str(self._reserved.getsockname()[1])
        self._runtime = Runtime(f"127.0.0.1:{port}", self._secret)
        where = ["--host", "127.0.0.1", "--port", port]
        self._began = time.monotonic()
        self._process = start([*self._command, *where], self.log, self._environment, self._folder)

    @property
    def alive(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def revive(self) -> None:
        """Start it again if it ended, as it does when the server was started anew.

        Raises:
            FederationError: it ended soon after each of several starts.
        """
        lived = time.monotonic() - self._began
        if self.alive or lived < REVIVAL_SECONDS:
            return
        if lived > LONG_ENOUGH_SECONDS:
            self._well = time.monotonic()
        end = tail(self.log)
        if time.monotonic() - self._well > PATIENCE_SECONDS:
            raise FederationError(f"Flower's SuperNode ends again and again. The end of its log:\n{end}")
        log.warning("Flower's SuperNode ended. It is started again. The end of its log:\n%s", end)
        self.start()

    def _leave(self) -> None:
        for held in (self._runtime, self._reserved):
            if held is not None:
                held.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            stop(self._process)
            self._process = None
        self._leave()


class OtherSuperNode:
    """A SuperNode that somebody else operates, with `--isolation process`: it is asked for tasks, and no more.

    Args:
        address: HOST:PORT of its Runtime API.
        secret: What its `--superexec-auth-secret-file` holds; none if it was started without.
        ca: Certificate of the CA that vouches for its Runtime API, PEM; none for plaintext.
    """

    def __init__(self, address: str, secret: bytes | None, ca: bytes | None) -> None:
        self.runtime = Runtime(address, secret, ca)

    def revive(self) -> None:
        """Nothing: it is another's affair."""

    def close(self) -> None:
        """Close the connection."""
        self.runtime.close()

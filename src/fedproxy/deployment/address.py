"""Where a server listens and clients reach it."""

import socket
from dataclasses import dataclass

from fedproxy.errors import UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Address:
    """HOST:PORT."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> "Address":
        """Read "HOST:PORT"; an IPv6 address stands in brackets.

        Raises:
            UsageError: it is no such thing.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
            raise UsageError(f"{text!r} is no address: must be HOST:PORT, for example 127.0.0.1:9443.")
        return Address(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in LOOPBACK

    def check_free(self) -> None:
        """Check that one can listen there now.

        Raises:
            UsageError: one cannot.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
        except OSError as error:
            raise UsageError(f"cannot listen at {self} ({error.strerror or error}).") from error

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

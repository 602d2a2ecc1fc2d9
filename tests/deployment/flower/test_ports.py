"""A reserved port is nobody's but the server's that asks for it."""

import asyncio
import contextlib
import socket
import struct

import pytest

from fedproxy.deployment.flower.ports import reserve_port

IP_LOCAL_PORT_RANGE = 51
"""The ports that the kernel chooses from for this socket (ip(7), since Linux 6.3)."""


def choosing_from(port: int, *, reuse: bool = False) -> socket.socket:
    """A socket for which the kernel has but one port to choose."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    try:
        one.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", port << 16 | port))
    except OSError:
        one.close()
        pytest.skip("this Linux is older than 6.3")
    return one


def test_the_kernel_gives_it_to_no_other_socket() -> None:
    with contextlib.closing(reserve_port()) as reserved, socket.create_server(("127.0.0.1", 0)) as server:
        port = reserved.getsockname()[1]
        for reuse in (False, True):
            with choosing_from(port, reuse=reuse) as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", 0))
        with choosing_from(port) as outgoing, pytest.raises(OSError, match="assign"):
            outgoing.connect(server.getsockname())
    with choosing_from(port) as other:
        other.bind(("127.0.0.1", 0))
        assert other.getsockname()[1] == port


def test_thousands_of_other_sockets_get_other_ports() -> None:
    with contextlib.closing(reserve_port()) as reserved:
        port = reserved.getsockname()[1]
        for _ in range(20):
            with contextlib.ExitStack() as held:
                others = [held.enter_context(contextlib.closing(reserve_port())) for _ in range(400)]
                assert port not in {other.getsockname()[1] for other in others}


async def serve_once(port: int) -> bytes:
    """What one connection gets from a server that asyncio starts at the port, as uvicorn does."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", port):
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(greet, "127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        said = await reader.read()
        writer.close()
        await writer.wait_closed()
    return said


def test_it_refuses_connections_until_the_server_listens_there_and_again_afterwards() -> None:
    with contextlib.closing(reserve_port()) as reserved:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(reserved.getsockname())
            assert asyncio.run(serve_once(reserved.getsockname()[1])) == b"hello"

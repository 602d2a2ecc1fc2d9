"""A port of loopback for a server that another process will start, which nobody else gets in the meantime."""

import socket


def reserve_port() -> socket.socket:
    """Reserve a free port of loopback until the socket that is returned is closed; that never listens.

    Linux gives a port to which a socket is bound to no other socket of its own accord, neither to one bound to port 0
    nor to an outgoing connection. A server that asks for the very port gets it if it sets SO_REUSEADDR, as uvicorn
    does: both sockets set it, and this one does not listen (ip(7), socket(7)). Until then connections are refused.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved

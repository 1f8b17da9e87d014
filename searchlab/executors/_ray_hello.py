"""Whether what answers at an address is the head of a Ray cluster: one question by hand.

Ray itself asks for more than a minute, and may then end the process, where another service that
speaks HTTP/2 answers.
"""

from __future__ import annotations

import os
import socket
import time

from searchlab.errors import ConfigError

__all__ = ["REACH", "check_head"]

REACH = 3.0  # seconds for a connection to be made, and for an answer
_ALLOWED = "allowed: the address that `ray start --head` prints"
_SETTINGS, _HEADERS, _DATA = 4, 1, 0  # frames of HTTP/2
_FIRST = b"\x88"  # of headers that begin with :status 200
_UNKNOWN_METHOD = b"\x0bgrpc-status\x0212"


def check_head(where: tuple[str, int]) -> None:
    """Makes sure that something at an address speaks as the head of a cluster does.

    With `RAY_USE_TLS` only that something takes connections there.

    Raises:
        ConfigError: nothing, or something else, answers.
    """
    shown = ":".join(map(str, where))
    try:
        with socket.create_connection(where, REACH) as connection:
            tls = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
            fine = tls or _is_head(connection)
    except OSError as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"nothing answers at {shown} ({text}); {_ALLOWED}") from error
    if not fine:
        raise ConfigError(f"what answers at {shown} is no Ray cluster; {_ALLOWED}")


def _is_head(connection: socket.socket) -> bool:
    """Asks for the cluster's number; without its token a head refuses, and others know no such."""
    names = ("POST", "http", "/ray.rpc.NodeInfoGcsService/GetClusterId", "searchlab")
    pairs = zip((":method", ":scheme", ":path", ":authority"), names, strict=True)
    headers = [*pairs, ("te", "trailers"), ("content-type", "application/grpc")]
    question = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, 4, 1, b"".join(_header(*pair) for pair in headers))
        + _frame(_DATA, 1, 1, bytes(5))
    )
    until = time.monotonic() + REACH
    heard = b""
    try:
        connection.sendall(question)
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            piece = connection.recv(65536)
            heard += piece
            while len(heard) >= 9 and len(heard) >= 9 + (size := int.from_bytes(heard[:3], "big")):
                kind, content = heard[3], heard[9 : 9 + size]
                if kind == _HEADERS:
                    return content.startswith(_FIRST) and _UNKNOWN_METHOD not in content
                heard = heard[9 + size :]
            if not piece:
                break
    except OSError:  # silence, or it hangs up
        pass
    return False


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    place = bytes([kind, flags]) + stream.to_bytes(4, "big")
    return len(content).to_bytes(3, "big") + place + content


def _header(name: str, value: str) -> bytes:
    """A header that is spelled out, HPACK without indexing."""
    parts = (name.encode("ascii"), value.encode("ascii"))
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)

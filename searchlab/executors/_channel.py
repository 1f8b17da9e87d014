"""Messages between the driver and one worker: whole ones, however much arrives at once.

They are pickled: both ends are processes of one user and one run, joined by an unnamed pair of
sockets. Nothing that comes from a file or from another machine passes here.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

__all__ = ["TICKET", "DriverEnd", "WorkerEnd", "packed", "unpacked"]

TICKET = struct.Struct("=q")  # before every answer: what the worker goes on with

_LENGTH = struct.Struct("!Q")
_PIECE = 1 << 18


def packed(content: object) -> bytes:
    """A message that holds an object."""
    return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)


def unpacked(message: bytes) -> Any:
    """The object of a message."""
    return pickle.loads(message)


class WorkerEnd:
    """The blocking end that a worker holds."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)

    def send(self, message: bytes) -> None:
        """Sends all of a message."""
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes:
        """The next message. Raises EOFError when the driver is gone."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def _exactly(self, n: int) -> bytes:
        out = bytearray()
        while len(out) < n:
            piece = self._socket.recv(min(_PIECE, n - len(out)))
            if not piece:
                raise EOFError
            out += piece
        return bytes(out)


class DriverEnd:
    """The end that the driver holds; it never blocks, so that a stuck worker sticks nobody else.

    Attributes:
        closed: the other end is gone; what it had sent before was delivered.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._out = bytearray()
        self._in = bytearray()
        self.closed = False

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something left to do."""
        return bool(self._out)

    def send(self, message: bytes) -> None:
        """Sends what fits now and keeps the rest for `flush`."""
        self._out += _LENGTH.pack(len(message))
        self._out += message
        self.flush()

    def flush(self) -> None:
        """Goes on sending."""
        try:
            while self._out:
                sent = self._socket.send(memoryview(self._out)[:_PIECE])
                del self._out[:sent]
        except BlockingIOError:
            return
        except OSError:  # the worker is gone, which reading will tell
            self._out.clear()

    def read(self) -> list[bytes]:
        """All messages that are complete by now."""
        try:
            while piece := self._socket.recv(_PIECE):
                self._in += piece
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        out = []
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            end = _LENGTH.size + length
            if len(self._in) < end:
                break
            out.append(bytes(self._in[_LENGTH.size : end]))
            del self._in[:end]
        return out

    def close(self) -> None:
        """Closes this end."""
        self.closed = True
        self._socket.close()

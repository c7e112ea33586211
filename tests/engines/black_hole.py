"""A way to a server that can be made to swallow everything, as a network does that lost its route: nobody is told."""

from __future__ import annotations

import socket
import threading


class Way:
    """Listens on `at` (an address of loopback), on each of the ports, and passes bytes on to the same port of `to`."""

    def __init__(self, ports: list[int], at: str = "127.0.0.2", to: str = "127.0.0.1"):
        self._to = to
        self._open = threading.Event()
        self._open.set()
        self._listeners = [socket.create_server((at, port)) for port in ports]
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def swallow(self) -> None:
        """From now on nothing comes through; connections stay, and new ones are taken."""
        self._open.clear()

    def restore(self) -> None:
        self._open.set()

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._open.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near, listener.getsockname()[1]), daemon=True).start()

    def _join(self, near: socket.socket, port: int) -> None:
        self._open.wait()
        try:
            far = socket.create_connection((self._to, port))
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for a, b in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(1 << 20):
                self._open.wait()
                b.sendall(data)
        except OSError:
            pass
        for end in (a, b):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

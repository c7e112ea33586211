"""Redis through a client of our own that receives into the caller's buffer, and through redis-py with hiredis."""

import mmap
import os
import socket
import subprocess

import common
from common import BLOCK_BYTES, BLOCKS, WORKING_SET_BYTES


class Raw:
    """Speaks RESP over one blocking connection; a block is received where it belongs, sent from where it lies."""

    HEADER = b"$%d\r\n" % BLOCK_BYTES

    def __init__(self, port, memory):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.memory = memory
        self.small = memoryview(bytearray(64))

    def receive(self, into):
        while into:
            got = self.socket.recv_into(into)
            if got == 0:
                raise EOFError("redis closed the connection")
            into = into[got:]

    def expect(self, answer):
        into = self.small[: len(answer)]
        self.receive(into)
        if into != answer:
            raise RuntimeError(f"redis answers {bytes(into)!r}")

    def get(self, number):
        self.socket.sendall(b"*2\r\n$3\r\nGET\r\n$6\r\n%06d\r\n" % number)
        self.expect(self.HEADER)
        self.receive(self.memory[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        self.expect(b"\r\n")

    def put(self, number):
        self.socket.sendall(b"*3\r\n$3\r\nSET\r\n$6\r\n%06d\r\n" % number + self.HEADER)
        self.socket.sendall(self.memory[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        self.socket.sendall(b"\r\n")
        self.expect(b"+OK\r\n")


class Library:
    """redis-py: a get answers bytes of its own, a put takes bytes."""

    def __init__(self, port, memory):
        import redis

        self.redis = redis.Redis(host="127.0.0.1", port=port)
        self.blocks = [bytes(memory[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES]) for n in range(BLOCKS)]

    def get(self, number):
        if len(self.redis.get(b"%06d" % number)) != BLOCK_BYTES:
            raise RuntimeError("redis answers a short block")

    def put(self, number):
        self.redis.set(b"%06d" % number, self.blocks[number])


def start():
    """Starts Redis without persistence and fills it."""
    program, port = common.need_program("redis-server"), common.free_port()
    options = ("--save", "", "--appendonly", "no")
    server = common.start_server(program, "--bind", "127.0.0.1", "--port", port, *options)
    common.wait_for_port(port, server)
    # Whole pages, as every path has them.
    memory = memoryview(mmap.mmap(-1, WORKING_SET_BYTES))
    memory[:] = os.urandom(BLOCK_BYTES) * BLOCKS
    raw = Raw(port, memory)
    for number in range(BLOCKS):
        raw.put(number)
    paths = [
        (common.path("redis", "get"), common.one_by_one(raw.get)),
        (common.path("redis", "put"), common.one_by_one(raw.put)),
    ]
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    version = next((word[2:] for word in words if word.startswith("v=")), "unknown")
    try:
        library = Library(port, memory)
        paths.append((common.path("redis_py", "get"), common.one_by_one(library.get)))
        paths.append((common.path("redis_py", "put"), common.one_by_one(library.put)))
    except ImportError:
        # Its rows are left out; the raw client needs no library.
        pass
    return f"Redis {version}", paths


if __name__ == "__main__":
    common.run(start)

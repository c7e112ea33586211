"""A real kvkeepd for the tests: `python/tests/run.sh` says where it and the package are.

`server` is one that all tests of a module share, each with a namespace of its own (`ns`); `own` is a test's own, which it may kill.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest

import kvkeep

BLOCK = 64 * 1024
TOKENS = 16


def layout(block: int = BLOCK, groups: list[kvkeep.Group] | None = None, **more) -> kvkeep.Format:
    """A model with one group of blocks of this size, unless told otherwise."""
    groups = groups or [kvkeep.Group(TOKENS, block)]
    return kvkeep.Format("m", groups, dtype="bf16", layout="l", hash_algorithm="h", tokens_per_key=TOKENS, **more)


def chain(n: int) -> list[bytes]:
    """Keys that nobody else has."""
    return [os.urandom(32) for _ in range(n)]


def blocks(n: int, size: int = BLOCK) -> list[bytearray]:
    """Blocks that differ from each other in every page."""
    return [bytearray(os.urandom(size)) for _ in range(n)]


def collect(ns: kvkeep.Namespace, queue: int, n: int) -> list[kvkeep.Completion]:
    """The next `n` completions of a queue."""
    done: list[kvkeep.Completion] = []
    until = time.monotonic() + 60
    while len(done) < n:
        done += ns.wait(queue, 64, 5)
        assert time.monotonic() < until, f"{len(done)} of {n} completions came; {ns.describe()['text']}"
    return done


def eventually(what, within: float = 30):
    """Waits until `what()` is true."""
    until = time.monotonic() + within
    while not (answer := what()):
        assert time.monotonic() < until, f"it did not become so within {within} s"
        time.sleep(0.02)
    return answer


def example(heading: str) -> str:
    """The program under this heading of docs/python.md."""
    page = (Path(__file__).parents[2] / "docs/python.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


class Server:
    """A kvkeepd that can be killed, stopped and started again over the same data."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvk-"))
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.arena = Path(tempfile.mkdtemp(prefix="kvk-", dir=shm))
        self.socket = self.folder / "s"
        self.endpoint = f"unix:{self.socket}"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    os.environ["KVKEEP_KVKEEPD"],
                    *("--data-dir", self.folder / "data", "--unix-socket", self.socket, "--listen", "127.0.0.1:0"),
                    *("--arena-dir", self.arena, "--arena-bytes", "256MiB", "--nvme-bytes", "256MiB"),
                    *("--keep-free-bytes", "0"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        for line in self.process.stdout:
            if b" ready listen=" in line:
                self.ready = line.decode()
                return
        pytest.fail(f"kvkeepd did not start:\n{(self.folder / 'log').read_text()[-4000:]}")

    def stop(self) -> None:
        """Returns when each of its threads stands still."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        eventually(lambda: all(") T" in (task / "stat").read_text() for task in tasks.iterdir()))

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.arena, ignore_errors=True)

    def client(self, **more) -> kvkeep.Client:
        return kvkeep.Client(self.endpoint, **more)

    def namespace(self, format: kvkeep.Format | None = None, *, patience: float = 5.0, **more) -> kvkeep.Namespace:
        """A fresh one, connected. Patient, because the machine that runs tests may be busy: the tests of losses are not."""
        ns = self.client(patience=patience).namespace(uuid.uuid4().hex, format or layout(), "weights", **more)
        assert ns.ready(30), ns.describe()["text"]
        return ns


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.end()


@pytest.fixture
def own():
    server = Server()
    yield server
    server.end()


@pytest.fixture
def ns(server):
    with server.namespace(queues=2) as ns:
        yield ns

"""Fixtures of the engine tests. An engine takes half a minute to start: a module shares one, and says what it leaves behind."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import KVKEEPD, Engine, Server, prompt


def pytest_configure(config):
    if not KVKEEPD:
        raise pytest.UsageError("no kvkeepd: build it (make build), or name it with KVKEEP_KVKEEPD")


@pytest.fixture(scope="session")
def root():
    """A folder on disk (not tmpfs) for data and logs; it stays when a test failed or KVKEEP_TEST_KEEP is set."""
    folder = Path(tempfile.mkdtemp(prefix="kvkeep-engines-", dir=os.environ.get("KVKEEP_TEST_DIR", "/var/tmp")))
    print(f"\nlogs and data: {folder}")
    yield folder
    if not (os.environ.get("KVKEEP_TEST_KEEP") or _failed):
        shutil.rmtree(folder, ignore_errors=True)


_failed: list[str] = []


def pytest_runtest_logreport(report):
    if report.failed:
        _failed.append(report.nodeid)


@pytest.fixture(scope="module")
def folder(root, request):
    path = root / request.module.__name__
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder / "kvkeep").start()
    yield server
    server.close()


PROMPTS = {seed: 1024 for seed in range(1, 9)} | {11: 333, 12: 2048, 13: 700, 14: 1010, 15: 1010, 16: 1010}
"""Seeds of the prompts that are compared, and their tokens."""
NEW_TOKENS = 12


class Plain:
    """What models say without a store."""

    def __init__(self, root: Path):
        self._root, self._said = root, {}

    def tokens(self, model: str, seed: int) -> list[int]:
        if model not in self._said:
            engine = Engine(model, log=self._root / f"plain-{model}.log").start()
            try:
                self._said[model] = {
                    seed: engine.generate(prompt(seed, n), NEW_TOKENS)["tokens"] for seed, n in PROMPTS.items()
                }
            finally:
                engine.close()
        return self._said[model][seed]


@pytest.fixture(scope="session")
def plain(root):
    return Plain(root)

"""The loss of power, for a server that runs under `tests/powercut/shim.c`: after it was killed, everything that no flush covered is
taken back. The worst cut of those that the Rust tests play (`tests/src/powercut.rs`)."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
WRITE, TRUNCATE, SYNC, CREATE, UNLINK, RENAME, MKDIR, RMDIR, DIRSYNC, UNSUPPORTED = range(1, 11)


def shim(folder: Path) -> Path:
    """The compiled shim."""
    library = folder / "powercut.so"
    source = HERE.parent / "powercut" / "shim.c"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


def environment(watched: Path, log: Path) -> dict[str, str]:
    """For the server. The shim sees plain system calls only."""
    return {"KVKEEP_POWERCUT_DIR": str(watched), "KVKEEP_POWERCUT_LOG": str(log), "KVKEEP_NO_IO_URING": "true"}


def cut(watched: Path, log: Path) -> int:
    """Takes back what no flush covered, last change first; how many changes that were. The log begins anew."""
    records = list(read(log.read_bytes()))
    covered: dict[tuple[int, bool], int] = {}
    for _, kind, inode, covers, *_ in records:
        if kind in (SYNC, DIRSYNC):
            key = (inode, kind == DIRSYNC)
            covered[key] = max(covered.get(key, 0), covers)
    paths = {p.stat().st_ino: p for p in watched.rglob("*") if p.is_file()}
    taken = 0
    for number, kind, inode, offset, size, old_size, new_size, data in reversed(records):
        if kind in (SYNC, DIRSYNC):
            continue
        assert kind != UNSUPPORTED, f"the shim cannot undo {data!r}"
        if number <= covered.get((inode, kind not in (WRITE, TRUNCATE)), 0):
            continue
        taken += 1
        names = [Path(os.fsdecode(n)) for n in data.split(b"\0")] if kind not in (WRITE, TRUNCATE) else []
        if kind in (WRITE, TRUNCATE):
            if path := paths.get(inode):
                with path.open("r+b") as file:
                    if old_size < new_size or kind == TRUNCATE:
                        file.truncate(old_size)
                    end = min(offset + size, old_size)
                    before = data[: max(0, end - offset)]
                    file.seek(offset)
                    file.write(before + b"\0" * (max(0, end - offset) - len(before)))
        elif kind == CREATE:
            names[0].unlink(missing_ok=True)
        elif kind == UNLINK and names[1].is_absolute() and names[1].exists():
            os.link(names[1], names[0])
            paths[names[0].stat().st_ino] = names[0]
        elif kind == RENAME:
            os.rename(names[1], names[0])
            if names[2].is_absolute():
                os.link(names[2], names[1])
            paths |= {p.stat().st_ino: p for p in names[:2] if p.is_file()}
        elif kind == MKDIR:
            names[0].rmdir()
        elif kind == RMDIR:
            names[0].mkdir()
    log.unlink()
    return taken


def read(log: bytes):
    """(number, kind, inode, offset, bytes, old size, new size, data) of each whole record."""
    at = 0
    while at + 64 <= len(log):
        magic, kind, number, inode, offset, size, old_size, new_size, length = struct.unpack_from("<4sI7Q", log, at)
        assert magic == b"PCUT"
        if at + 64 + length > len(log):
            return
        yield number, kind, inode, offset, size, old_size, new_size, log[at + 64 : at + 64 + length]
        at += 64 + length

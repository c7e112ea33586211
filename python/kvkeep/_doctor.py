"""What is there, what is not, and what to do. `python -m kvkeep doctor [ENDPOINT]`."""

import os
import platform
import sys
from typing import TextIO

from . import _native, _programs

_GIB = 1 << 30


def _room(path: str) -> str:
    try:
        stat = os.statvfs(path)
    except OSError as e:
        return f"{path} is not there ({e.strerror}): a server keeps its DRAM tier in it"
    free, size = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    said = f"{free / _GIB:.1f} GiB free of {size / _GIB:.1f} GiB"
    if size <= 64 << 20:
        said += ": a container's default; start it with more (--shm-size), or name another folder (kvkeepd --arena-dir)"
    return said


def _program(name: str) -> str:
    found = _programs.find(name)
    if found is None:
        return f"not found: install the wheel that carries it, put it on the PATH, or set {_programs.VARIABLE}"
    return found if os.access(found, os.X_OK) else f"{found} cannot be run"


def _server(endpoint: str | None, timeout: float) -> tuple[list[tuple[str, str]], bool]:
    """What a server says, asked through a namespace of its own that holds nothing."""
    client = _native.Client(endpoint, name="kvkeep-doctor")
    said = [("endpoint", client.endpoint)]
    if client.endpoint.startswith("local:"):
        folder = client.endpoint.removeprefix("local:").split("?")[0]
        said.append(
            ("folder", f"{folder}: a server is started over it where none answers; its log is {folder}/kvkeepd.log")
        )
    layout = _native.Format(
        "doctor",
        [_native.Group(1, 1024)],
        dtype="none",
        layout="none",
        hash_algorithm="none",
        tokens_per_key=1,
    )
    with client.namespace("kvkeep-doctor", layout, "doctor") as ns:
        try:
            answers = ns.ready(timeout)
        except _native.Error as e:
            return [*said, ("server", f"it answers, and refuses us: {e}")], False
        state = ns.describe()
    if not answers:
        why = state["why"] or f"nothing within {timeout:g} s"
        said.append(("server", f"no answer: {why}"))
        said.append(("to do", "start kvkeepd, or use an endpoint local:FOLDER, which starts one by itself"))
        return said, False
    said.append(("server", state["server"]))
    if way := state["way"]:
        regions = "straight into regions" if way["regions"] else "through the socket: no regions"
        because = f" ({way['why']})" if way["why"] else ""
        said.append(("way", f"{way['wire']} to {way['to']}, {regions}{because}"))
    return said, True


def doctor(endpoint: str | None = None, *, timeout: float = 5.0, file: TextIO | None = None) -> bool:
    """Prints what is there and what to do; whether a server answers. `endpoint` None: `KVKEEP_ENDPOINT`, else the default one."""
    said = [
        ("kvkeep", f"{_native.__version__}, Python {platform.python_version()}, {_native.__file__}"),
        ("kvkeepd", _program("kvkeepd")),
        ("kvkeepctl", _program("kvkeepctl")),
        ("/dev/shm", _room("/dev/shm")),
    ]
    try:
        more, answers = _server(endpoint, timeout)
    except _native.Error as e:
        more, answers = [("endpoint", f"wrong: {e}")], False
    for name, what in said + more:
        print(f"{name:<10} {what}", file=file or sys.stdout)
    return answers

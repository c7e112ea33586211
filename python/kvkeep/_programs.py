"""The programs of a node that the package may carry: `kvkeepd`, and `kvkeepctl` to look at it."""

import os
import shutil
import sys
from pathlib import Path

VARIABLE = "KVKEEP_KVKEEPD"
"""Names the `kvkeepd` that `local:` endpoints start."""

_CARRIED = Path(__file__).parent / "bin"


def find(name: str) -> str | None:
    """`kvkeepd` or `kvkeepctl`: the one that the environment names, the one that the package carries, the first on the PATH."""
    named = os.environ.get(VARIABLE) if name == "kvkeepd" else None
    if named:
        return named
    carried = _CARRIED / name
    return str(carried) if os.access(carried, os.X_OK) else shutil.which(name)


def announce() -> None:
    """Has `local:` endpoints start the `kvkeepd` that the package carries, unless the environment names another."""
    carried = _CARRIED / "kvkeepd"
    if not os.environ.get(VARIABLE) and os.access(carried, os.X_OK):
        os.environ[VARIABLE] = str(carried)


def _run(name: str) -> None:
    program = find(name)
    if program is None:
        sys.exit(f"{name} was not found: this package does not carry it, and it is not on the PATH")
    os.execv(program, [name, *sys.argv[1:]])


def kvkeepd() -> None:
    """The script `kvkeepd`."""
    _run("kvkeepd")


def kvkeepctl() -> None:
    """The script `kvkeepctl`."""
    _run("kvkeepctl")

"""LMCache's memory as a region: by default it is a file in /dev/shm, which the server can be told of."""

from __future__ import annotations

import logging

import kvkeep

log = logging.getLogger("lmcache.kvkeep")


def region_at(address: int, size: int) -> kvkeep.Region | None:
    """The file behind memory of this process; None where there is none that can be shared."""
    try:
        path, offset = _file_at(address, size)
        return kvkeep.Region.open(path, offset, size, also_at=address) if path else None
    except (OSError, ValueError, kvkeep.Error) as e:
        log.warning("kvkeep: LMCache's memory is not shared with the server, its bytes go through the socket: %s", e)
        return None


def _file_at(address: int, size: int) -> tuple[str | None, int]:
    """Path, and where in it the memory begins; no path unless all of it is one mapping of a file on tmpfs."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, offset, _, _, *name = line.split(maxsplit=5)
            low, high = (int(x, 16) for x in span.split("-"))
            if low <= address < high:
                path = name[0].strip() if name else ""
                shared = rights.startswith("rw-s") and path.startswith("/dev/shm/") and not path.endswith(" (deleted)")
                if shared and address + size <= high:
                    return path, int(offset, 16) + address - low
                return None, 0
    return None, 0

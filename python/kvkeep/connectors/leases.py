"""Leases that lookups took, until what they hold was read. Engines give keys back, not leases."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence

import kvkeep

HELD_MAX = 4096
"""Leases held at a time; of one more, the oldest is given up."""


def look_up(
    namespace: kvkeep.Namespace, keys: Sequence[bytes], ttl: float, call: kvkeep.Call
) -> tuple[list[bool], kvkeep.Lease | None]:
    """Which positions are here with all their parts, one by one; these are leased, and on their way to DRAM."""
    found = namespace.match(keys, lease=ttl, promote=True, statuses=True, call=call)
    there = [status == kvkeep.HIT for status in found.statuses] or [False] * len(keys)
    behind = [
        key for key, is_there in zip(keys[found.boundary_positions :], there[found.boundary_positions :]) if is_there
    ]
    if not behind:
        return there, found.lease
    # The lease of a match ends at its boundary; this is the same one, made longer.
    lease, _ = namespace.lease(behind, ttl=ttl, call=call)
    return (there, lease) if lease else ([n < found.boundary_positions for n in range(len(keys))], found.lease)


class _Held:
    __slots__ = ("id", "until", "left")

    def __init__(self, id: int, until: float, keys: Sequence[Hashable]):
        self.id, self.until = id, until
        self.left: dict[Hashable, int] = {}
        for key in keys:
            self.left[key] = self.left.get(key, 0) + 1


class Leases:
    """Thread safe. Every method that gives leases up returns their ids, for `Namespace.release`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[Hashable, deque[_Held]] = {}
        self._by_age: dict[int, _Held] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._by_age)

    def hold(self, id: int, ttl: float, keys: Sequence[Hashable]) -> list[int]:
        """One more lease, over these keys; leases whose time is over are forgotten. Gives up the oldest beyond HELD_MAX."""
        with self._lock:
            given_up = self._forget(time.monotonic())
            held = self._by_age[id] = _Held(id, time.monotonic() + ttl, keys)
            for key in held.left:
                self._by_key.setdefault(key, deque()).append(held)
            return given_up

    def over(self, keys: Sequence[Hashable]) -> int | None:
        """The oldest lease over the first of these keys that has time left."""
        now = time.monotonic()
        with self._lock:
            held = next((h for h in self._by_key.get(keys[0], ()) if h.until > now), None) if keys else None
            return held.id if held else None

    def give_back(self, keys: Sequence[Hashable]) -> list[int]:
        """Each key once; the leases of which nothing is left."""
        done = []
        with self._lock:
            for key in keys:
                holders = self._by_key.get(key)
                if not holders:
                    continue
                held = holders[0]
                held.left[key] -= 1
                if held.left[key] == 0:
                    del held.left[key]
                    self._unlink(key, held)
                if not held.left:
                    self._by_age.pop(held.id, None)
                    done.append(held.id)
        return done

    def give_up(self) -> list[int]:
        """All of them."""
        with self._lock:
            ids = list(self._by_age)
            self._by_age.clear()
            self._by_key.clear()
            return ids

    def _forget(self, now: float) -> list[int]:
        given_up = []
        while self._by_age:
            oldest = next(iter(self._by_age.values()))
            full = len(self._by_age) >= HELD_MAX
            if oldest.until > now and not full:
                break
            del self._by_age[oldest.id]
            for key in oldest.left:
                self._unlink(key, oldest)
            given_up.append(oldest.id)
        return given_up

    def _unlink(self, key: Hashable, held: _Held) -> None:
        holders = self._by_key[key]
        holders.remove(held)
        if not holders:
            del self._by_key[key]

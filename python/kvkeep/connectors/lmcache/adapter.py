"""LMCache's interface of an L2: tasks that are submitted, end by themselves, and are told of by three event descriptors."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj

import kvkeep

from .. import versions
from ..leases import look_up
from .memory import region_at
from .spaces import Options, Space, Spaces, position_of, rank_of

log = logging.getLogger("lmcache.kvkeep")

_THREADS = {"store": 2, "lookup": 2, "load": 4}
"""Per kind of task, so that none waits for another kind. They wait for the store, not for the interpreter."""
_QUIET_SECONDS = 30.0
_SETTLE_WAIT = 1.0


class _Tasks:
    """Tasks of one kind: their threads, results and event descriptor. A task always ends, at worst with its failure."""

    def __init__(self, kind: str):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = ThreadPoolExecutor(_THREADS[kind], thread_name_prefix=f"kvkeep-{kind}")
        self._lock = threading.Lock()
        self._ended: dict[int, Any] = {}
        self._is_closed = False

    def submit(self, task: int, run: Callable[[], Any], failure: Callable[[Exception], Any]) -> int:
        def work() -> None:
            try:
                result = run()
            except Exception as e:
                result = failure(e)
            self._end(task, result)

        try:
            self._threads.submit(work)
        except RuntimeError as e:
            # It was closed.
            self._end(task, failure(e))
        return task

    def _end(self, task: int, result: Any) -> None:
        with self._lock:
            self._ended[task] = result
            if not self._is_closed:
                os.eventfd_write(self.fd, 1)

    def pop(self, task: int) -> Any:
        with self._lock:
            return self._ended.pop(task, None)

    def pop_all(self) -> dict[int, Any]:
        with self._lock:
            ended, self._ended = self._ended, {}
            return ended

    def finish(self) -> None:
        """Waits for the tasks under way; those that have not begun fail."""
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.fd)


class KVKeepAdapter(L2AdapterInterface):
    """Made by LMCache's own factory from `{"type": "plugin"}`; docs/engines/lmcache.md says how. Thread safe."""

    def __init__(self, adapter_params: dict[str, Any], l1_memory_desc: L1MemoryDesc | None = None):
        """Raises where the configuration is wrong or the release unknown; where only the store is missing, everything misses."""
        # The store evicts by itself, so LMCache is told of no capacity.
        super().__init__(max_capacity_bytes=0)
        self._options = Options.of(adapter_params or {})
        versions.check("lmcache", _version(), any_version=self._options.any_version)
        region = None
        if self._options.share_memory and l1_memory_desc is not None and l1_memory_desc.size > 0:
            region = region_at(l1_memory_desc.ptr, l1_memory_desc.size)
        self.is_shared = region is not None
        """The server fills and reads LMCache's memory itself."""
        client = kvkeep.Client(self._options.endpoint, name="lmcache", patience=self._options.patience_seconds)
        self._spaces = Spaces(client, self._options, [region] if region else [])
        self._stores, self._lookups, self._loads = _Tasks("store"), _Tasks("lookup"), _Tasks("load")
        self._numbers = itertools.count(1)
        self._draw = os.urandom(8)
        self._said: dict[str, float] = {}

    def get_store_event_fd(self) -> int:
        return self._stores.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fd

    def get_load_event_fd(self) -> int:
        return self._loads.fd

    # Store.

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        keys, objects = list(keys), list(objects)

        def failure(e: Exception) -> L2StoreResult:
            self._failed("store", e)
            return L2StoreResult(False, 0)

        return self._stores.submit(next(self._numbers), lambda: self._store(keys, objects), failure)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.pop_all()

    def _store(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2StoreResult:
        fresh = []
        spaces = [self._spaces.of_object(key, obj) for key, obj in zip(keys, objects, strict=True)]
        whole = None not in spaces
        for space, items in _grouped(keys, spaces):
            positions, parts, order = _positions(keys, items)
            places = [(objects[n].data_ptr, objects[n].get_size()) for n in order]
            stored = space.namespace.put_from(
                positions,
                places,
                parts=parts,
                unordered=True,
                cls=self._options.cls,
                call=self._call(self._options.save_seconds_max, keys[items[0]].cache_salt),
            )
            for n, outcome in zip(order, stored.outcomes):
                if outcome == kvkeep.STORED:
                    fresh.append(n)
                # What somebody else is storing at this moment is as good as stored.
                elif outcome not in (kvkeep.ALREADY_PRESENT, kvkeep.IN_PROGRESS):
                    whole = False
        sizes = [objects[n].get_size() for n in fresh]
        if fresh:
            self._notify_keys_stored([keys[n] for n in fresh], sizes)
        return L2StoreResult(whole, sum(sizes))

    # Lookup and lock: a lease.

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        keys = list(keys)

        def failure(e: Exception) -> Bitmap:
            self._failed("lookup", e)
            return Bitmap(len(keys))

        return self._lookups.submit(next(self._numbers), lambda: self._lookup(keys, group_layout_descs), failure)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.pop(task_id)

    def _lookup(self, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> Bitmap:
        found = Bitmap(len(keys))
        spaces = [self._spaces.of_lookup(key, layouts) for key in keys]
        for space, items in _grouped(keys, spaces):
            # A position is there when the objects of all ranks are: one question for all of them.
            positions = list(dict.fromkeys(position_of(keys[n]) for n in items))
            call = self._call(self._options.match_seconds_max, keys[items[0]].cache_salt)
            there, lease = look_up(space.namespace, positions, self._options.lease_seconds, call)
            here = {position for position, is_there in zip(positions, there) if is_there}
            locked = [n for n in items if position_of(keys[n]) in here]
            if lease is None or not locked:
                continue
            self._release(space, space.leases.hold(lease.id, lease.ttl, [keys[n] for n in locked]))
            for n in locked:
                found.set(n)
        return found

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """What cannot be unlocked now (a lost server) ends with its time."""
        try:
            by_kind: dict[Space, list[ObjectKey]] = {}
            for key in keys:
                for space in self._spaces.of_kind(key):
                    by_kind.setdefault(space, []).append(key)
            for space, locked in by_kind.items():
                self._release(space, space.leases.give_back(locked))
        except Exception as e:
            self._failed("unlock", e)

    # Load.

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        keys, objects = list(keys), list(objects)

        def failure(e: Exception) -> Bitmap:
            self._failed("load", e)
            return Bitmap(len(keys))

        return self._loads.submit(next(self._numbers), lambda: self._load(keys, objects), failure)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.pop(task_id)

    def _load(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> Bitmap:
        loaded = Bitmap(len(keys))
        done = []
        spaces = [self._spaces.of_object(key, obj) for key, obj in zip(keys, objects, strict=True)]
        for space, items in _grouped(keys, spaces):
            positions, parts, order = _positions(keys, items)
            got = space.namespace.get_into(
                positions,
                [(objects[n].data_ptr, objects[n].get_size()) for n in order],
                parts=parts,
                lease=space.leases.over([keys[items[0]]]),
                call=self._call(self._options.load_seconds_max, keys[items[0]].cache_salt),
            )
            self._settle(space, got)
            for n, status, length in zip(order, got.statuses, got.lengths):
                if status == kvkeep.HIT and self._fits(objects[n], length):
                    loaded.set(n)
                    done.append(keys[n])
        if done:
            self._notify_keys_accessed(done)
        return loaded

    def _settle(self, space: Space, got: kvkeep.Got) -> None:
        """LMCache gives memory that was not loaded to somebody else at once. A server that is stopped in the middle of a copy may
        go on with it at any time, so the task does not end before it cannot: it was continued, or is gone."""
        started = time.monotonic()
        while got.in_doubt and not space.namespace.settle(_SETTLE_WAIT):
            log.warning(
                "kvkeep: the server may still be writing what was given up %.0f s ago", time.monotonic() - started
            )

    def _fits(self, obj: MemoryObj, length: int) -> bool:
        if length == obj.get_size():
            return True
        # Serialized: an object may be shorter than the room that LMCache makes for it.
        if self._options.layout and 0 < length < obj.get_size():
            obj.set_used_size(length)
            return True
        return False

    # Eviction, which is the store's own business.

    def delete(self, keys: list[ObjectKey]) -> None:
        """Forgets objects in LMCache's accounts. The store is everybody's: it removes them where `allow_delete` says so."""
        try:
            gone, sizes = [], []
            for key in keys:
                for space in self._spaces.of_kind(key)[:1]:
                    if self._options.allow_delete:
                        space.namespace.remove([position_of(key)], call=self._call(self._options.match_seconds_max, ""))
                    gone.append(key)
                    sizes.append(space.object_bytes or 0)
            if gone:
                self._notify_keys_deleted(gone, sizes)
        except Exception as e:
            self._failed("delete", e)

    # The rest.

    def close(self) -> None:
        """Ends what is under way, releases what is locked. Tasks that are submitted later fail. Idempotent."""
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.finish()
        self._spaces.close()
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()

    def report_status(self) -> dict:
        """Healthy is an adapter whose calls end, and they do; whether the store is there is in `namespaces`."""
        namespaces = {space.namespace.name: space.namespace.describe() for space in self._spaces.all()}
        return {"is_healthy": True, "type": "KVKeepAdapter", "shared_memory": self.is_shared, "namespaces": namespaces}

    def leases_held(self) -> int:
        """Lookups of which something is still locked."""
        return sum(len(space.leases) for space in self._spaces.all())

    def _release(self, space: Space, leases: list[int]) -> None:
        if leases:
            space.namespace.release(leases)

    def _call(self, deadline: float, salt: str) -> kvkeep.Call:
        return kvkeep.Call(self._draw + next(self._numbers).to_bytes(8, "little"), deadline=deadline, label=salt)

    def _failed(self, what: str, e: Exception) -> None:
        now = time.monotonic()
        if now - self._said.get(what, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._said[what] = now
            log.warning("kvkeep: %s: %s (taken for a miss)", what, e, exc_info=not isinstance(e, kvkeep.Error))


def _grouped(keys: Sequence[ObjectKey], spaces: Sequence[Space | None]) -> Iterator[tuple[Space, list[int]]]:
    """Indices of keys that one call may name: of one namespace, and of one salt, which a call is labelled with."""
    groups: dict[tuple[Space, str], list[int]] = {}
    for n, (key, space) in enumerate(zip(keys, spaces, strict=True)):
        if space is not None:
            groups.setdefault((space, key.cache_salt), []).append(n)
    for (space, _), items in groups.items():
        yield space, items


def _positions(
    keys: Sequence[ObjectKey], items: list[int]
) -> tuple[list[bytes], list[list[tuple[int, int]]], list[int]]:
    """Positions, per position the parts that are meant, and the items in the order in which the store counts them."""
    by_position: dict[bytes, list[int]] = {}
    for n in items:
        by_position.setdefault(position_of(keys[n]), []).append(n)
    parts = [[(0, rank_of(keys[n])) for n in of_one] for of_one in by_position.values()]
    return list(by_position), parts, [n for of_one in by_position.values() for n in of_one]


def _version() -> str:
    return importlib.metadata.version("lmcache")

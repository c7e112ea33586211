"""KVKeep as LMCache's L2: made by LMCache's own factory, driven by hand and by LMCache's own storage manager, against a real `kvkeepd`.

tests/engines/run test_lmcache.py        one test: -k name
"""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from chunks import (  # noqa: F401 (fixtures)
    LAYOUTS,
    SHAPE,
    ended,
    eventually,
    load,
    lookup,
    made,
    memory,
    object_keys,
    own_server,
    plugin,
    same,
    server,
    store,
    stored,
)
from harness import wait_until
from kvkeep.connectors.lmcache import KVKeepAdapter
from kvkeep.connectors.versions import UnknownVersion
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.storage_manager import StorageManager

BOUND = 5.0
"""Seconds: far above what a lost server may cost, far below a hang."""


def test_chunks_come_back_as_they_were(made, server):
    adapter, keys = made(), object_keys(9)
    assert isinstance(adapter, KVKeepAdapter)
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    source = [memory(n) for n in range(8)]
    stored(adapter, keys[:8], source)
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "no leases of other tests")
    assert lookup(adapter, keys) == [True] * 8 + [False]
    wait_until(lambda: server.total("kvkeep_leases") == 1, 20, "the lookup is a lease")
    into = [memory() for _ in range(9)]
    assert load(adapter, keys, into) == [True] * 8 + [False]
    assert same(source, into[:8])
    adapter.submit_unlock(keys[:5])
    assert adapter.leases_held() == 1
    adapter.submit_unlock(keys[5:8])
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "unlocked is released")
    assert adapter.leases_held() == 0
    # Stored again: present, and nothing is written.
    again = store(adapter, keys[:8], source)
    assert again.is_successful() and again.bytes_transferred() == 0
    assert adapter.get_usage().bytes_by_cache_salt[""] == 8 * source[0].get_size()


def test_locks_count(made, server):
    adapter, keys = made(), object_keys(4)
    stored(adapter, keys, [memory(n) for n in range(4)])
    eventually(adapter, keys)
    assert lookup(adapter, keys) == lookup(adapter, keys) == [True] * 4
    adapter.submit_unlock(keys)
    assert adapter.leases_held() == 1
    adapter.submit_unlock(keys)
    adapter.submit_unlock(keys)
    assert adapter.leases_held() == 0
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "unlocked is released")


def test_locks_that_nobody_opens_run_out(made, server):
    adapter, keys = made(lease_seconds=1.0), object_keys(2)
    stored(adapter, keys, [memory(1), memory(2)])
    eventually(adapter, keys)
    assert lookup(adapter, keys) == [True, True]
    wait_until(lambda: server.total("kvkeep_leases") == 0, 30, "locks run out")
    assert load(adapter, keys, [memory(), memory()]) == [True, True], "a lock that is over is no reason to miss"
    adapter.submit_unlock(keys)


def test_a_chunk_is_there_when_all_ranks_have_stored_theirs(made):
    adapter = made()
    first = object_keys(3, 0, 2)
    second = object_keys(3, 1, 2, like=first)
    sources = [[memory(10 * rank + n) for n in range(3)] for rank in range(2)]
    stored(adapter, first, sources[0])
    assert lookup(adapter, first + second) == [False] * 6
    stored(adapter, second[:2], sources[1][:2])
    assert lookup(adapter, first + second) == [True, True, False] * 2
    into = [memory() for _ in range(4)]
    assert load(adapter, first[:2] + second[:2], into) == [True] * 4
    assert same(sources[0][:2] + sources[1][:2], into)
    adapter.submit_unlock(first[:2] + second[:2])
    assert adapter.leases_held() == 0


def test_holes_are_told_one_by_one(made):
    adapter, keys = made(), object_keys(6)
    here = [0, 1, 3, 5]
    stored(adapter, [keys[n] for n in here], [memory(n) for n in here])
    eventually(adapter, [keys[n] for n in here])
    assert lookup(adapter, keys) == [n in here for n in range(6)]
    into = [memory() for _ in range(6)]
    assert load(adapter, keys, into) == [n in here for n in range(6)]
    assert same([memory(n) for n in here], [into[n] for n in here])


def test_salts_models_and_groups_are_apart(made):
    adapter = made()
    plain = object_keys(1)
    stored(adapter, plain, [memory(1)])
    eventually(adapter, plain)
    for how in ({"cache_salt": "alice"}, {"cache_salt": "bob"}, {"model": "local/other"}, {"object_group_id": 1}):
        layouts = {how.get("object_group_id", 0): LAYOUTS[0]}
        keys = object_keys(1, like=plain, **how)
        assert lookup(adapter, keys, layouts) == [False]
        stored(adapter, keys, [memory(hash(str(how)) % 1000)])
        eventually(adapter, keys, layouts)
        into = [memory()]
        assert load(adapter, keys, into) == [True] and same(into, [memory(hash(str(how)) % 1000)])
    assert load(adapter, plain, into) == [True] and same(into, [memory(1)])
    assert set(adapter.get_usage().bytes_by_cache_salt) == {"", "alice", "bob"}


def test_other_shapes_and_types_are_misses(made):
    """One model, one hash, and bytes of the same length that mean something else."""
    adapter, keys = made(), object_keys(1)
    stored(adapter, keys, [memory(1)])
    eventually(adapter, keys)
    for shape, dtype in ((SHAPE, torch.float16), (torch.Size([2, 8, 128, 128]), torch.bfloat16)):
        other = {0: MemoryLayoutDesc(shapes=[shape], dtypes=[dtype])}
        assert lookup(adapter, keys, other) == [False]
        assert load(adapter, keys, [memory(None, shape, dtype)]) == [False]


def test_serialized_objects_need_a_name_for_their_bytes(made, caplog):
    flat = torch.Size([SHAPE.numel()])
    keys = object_keys(2)
    bare = made()
    assert not store(bare, keys, [memory(1, flat, torch.uint8)] * 2).is_successful()
    # An 8-bit float of one kind is not one of the other, and both are kept as bytes.
    assert not store(bare, keys, [memory(1, SHAPE, torch.uint8)] * 2).is_successful()
    named = made(layout="bf16, 256 tokens, fp8 v1")
    source = [memory(2, flat, torch.uint8), memory(3, flat, torch.uint8)]
    source[1].set_used_size(1000)
    stored(named, keys, source)
    eventually(named, keys)
    into = [memory(None, flat, torch.uint8) for _ in keys]
    assert load(named, keys, into) == [True, True]
    assert same(source, into), "the shorter one is as short as it was"
    assert lookup(made(layout="bf16, 256 tokens, fp8 v2"), keys) == [False, False]


def test_lmcaches_own_manager_stores_and_prefetches(server):
    """Through LMCache's storage manager, its controllers and its shared memory, which the server fills and reads itself."""
    name = f"lmcache_l1_pool_kvkeep_{os.getpid()}"
    manager = StorageManager(
        StorageManagerConfig(
            L1ManagerConfig(L1MemoryManagerConfig(64 << 20, False, shm_name=name)),
            EvictionConfig("LRU"),
            L2AdaptersConfig([plugin(server.endpoint)]),
        )
    )
    try:
        adapter = manager.l2_adapters()[0][1]
        assert isinstance(adapter, KVKeepAdapter) and adapter.is_shared
        rows = [object_keys(12, 0, 2)]
        rows.append(object_keys(12, 1, 2, like=rows[0]))
        content = {}
        for rank, keys in enumerate(rows):
            objects = manager.reserve_write(keys[:10], LAYOUTS[0])
            assert len(objects) == 10
            for n, (key, obj) in enumerate(objects.items()):
                obj.raw_data.random_(generator=torch.Generator().manual_seed(100 * rank + n))
                content[key] = bytes(obj.byte_array)
            manager.finish_write(list(objects))
        everything = rows[0][:10] + rows[1][:10]
        size = sum(len(one) for one in content.values())
        wait_until(lambda: adapter.get_usage().total_bytes_used == size, 30, "LMCache has stored everything")
        wait_until(lambda: manager.delete_l1_keys(everything)[1] == 0, 20, "LMCache's own copies are gone")
        for _ in range(2):
            spec = PrefetchTaskSpec([GroupedObjectKeys(keys, 0, LAYOUTS[0]) for keys in rows])
            handle = manager.submit_prefetch_task(spec)
            assert manager.wait_prefetch_status(handle, 30)
            result = manager.query_prefetch_status(handle)
            assert (result.l1_hit_count, result.l2_hit_count) == (0, 20)
            with manager.read_prefetched_results(everything) as objects:
                assert [bytes(obj.byte_array) for obj in objects] == [content[key] for key in everything]
            manager.finish_read_prefetched(everything)
            wait_until(lambda: adapter.leases_held() == 0, 20, "LMCache unlocks what it has loaded")
            wait_until(lambda: manager.delete_l1_keys(everything)[1] == 0, 20, "L1 is empty again")
    finally:
        manager.close()
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "no leases are left")


def test_many_tasks_at_once(made):
    adapter = made()
    keys, source = object_keys(64), [memory(n) for n in range(64)]
    stored(adapter, keys[:1], source[:1])
    tasks = {adapter.submit_store_task(keys[n : n + 4], source[n : n + 4]) for n in range(0, 64, 4)}
    results = {}
    while tasks - set(results):
        results |= ended(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)
    assert all(results[task].is_successful() for task in tasks)
    into = [memory() for _ in range(64)]
    loads = [adapter.submit_load_task(keys[n : n + 4], into[n : n + 4]) for n in range(0, 64, 4)]
    for task in loads:
        loaded = ended(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
        assert loaded.popcount() == 4
    assert same(source, into)


def test_a_killed_server_is_misses(own_server, made):
    adapter, keys = made(at=own_server), object_keys(4)
    source = [memory(n) for n in range(4)]
    stored(adapter, keys, source)
    eventually(adapter, keys)
    own_server.wait_quiet()
    assert lookup(adapter, keys) == [True] * 4
    own_server.kill()
    started = time.monotonic()
    assert load(adapter, keys, [memory() for _ in keys]) == [False] * 4
    adapter.submit_unlock(keys)
    assert lookup(adapter, keys) == [False] * 4
    assert not store(adapter, object_keys(2), source[:2]).is_successful()
    assert time.monotonic() - started < BOUND
    assert adapter.leases_held() == 0
    own_server.start()
    eventually(adapter, keys)
    into = [memory() for _ in keys]
    assert load(adapter, keys, into) == [True] * 4 and same(source, into)
    wait_until(lambda: own_server.total("kvkeep_leases") == 0, 20, "no leases are left")


def test_killed_in_the_middle_of_everything(own_server, made):
    """LMCache's two threads, a server that dies under them: nothing raised, nothing hangs, no wrong bytes."""
    adapter, keys = made(at=own_server), object_keys(32)
    source = [memory(n) for n in range(32)]
    stored(adapter, keys, source)
    over, wrong, hits = threading.Event(), [], []

    def prefetches():
        while not over.is_set():
            found = [key for key, there in zip(keys, lookup(adapter, keys)) if there]
            into = [memory() for _ in found]
            got = load(adapter, found, into) if found else []
            adapter.submit_unlock(found)
            hits.append(sum(got))
            by_key = dict(zip(keys, source))
            wrong.extend(key for key, ok, obj in zip(found, got, into) if ok and not same([by_key[key]], [obj]))

    def stores():
        while not over.is_set():
            store(adapter, object_keys(8), source[:8])

    threads = [threading.Thread(target=prefetches), threading.Thread(target=stores)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.3)
        own_server.kill()
        time.sleep(0.2)
        own_server.start()
    over.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong and any(hits)
    assert adapter.leases_held() == 0


def test_a_stopped_server_is_misses(own_server, made):
    adapter, keys = made(at=own_server), object_keys(2)
    stored(adapter, keys, [memory(1), memory(2)])
    own_server.pause()
    try:
        started = time.monotonic()
        assert load(adapter, keys, [memory(), memory()]) == [False, False]
        assert lookup(adapter, keys) == [False, False]
        assert time.monotonic() - started < BOUND
    finally:
        own_server.resume()
    eventually(adapter, keys)


def test_no_server_at_all(tmp_path):
    adapter = create_l2_adapter(plugin(f"unix:{tmp_path}/nobody.sock"))
    started = time.monotonic()
    keys = object_keys(2)
    assert not store(adapter, keys, [memory(1), memory(2)]).is_successful()
    assert lookup(adapter, keys) == [False, False]
    assert load(adapter, keys, [memory(), memory()]) == [False, False]
    adapter.submit_unlock(keys)
    adapter.delete(keys)
    assert adapter.report_status()["is_healthy"]
    adapter.close()
    adapter.close()
    assert time.monotonic() - started < BOUND
    task = adapter.submit_store_task(keys, [memory(1), memory(2)])
    assert not adapter.pop_completed_store_tasks()[task].is_successful(), "after its end tasks fail"


def test_delete_forgets_and_leaves_the_store_alone(made):
    adapter, keys = made(), object_keys(2)
    stored(adapter, keys, [memory(1), memory(2)])
    eventually(adapter, keys)
    adapter.delete(keys)
    assert adapter.get_usage().total_bytes_used == 0
    assert lookup(adapter, keys) == [True, True]
    adapter.submit_unlock(keys)
    allowed, more = made(allow_delete=True), object_keys(2)
    stored(allowed, more, [memory(3), memory(4)])
    eventually(allowed, more)
    allowed.delete(more)
    assert lookup(allowed, more) == [False, False]
    assert allowed.get_usage().total_bytes_used == 0


def test_other_weights_see_nothing(own_server, made):
    keys, source = object_keys(2), [memory(1), memory(2)]
    old = made(at=own_server)
    stored(old, keys, source)
    new = made(at=own_server, revision="weights 2")
    stored(new, object_keys(1), source[:1])
    assert lookup(new, keys) == [False, False]
    stored(new, keys, source)
    assert lookup(old, keys) == [False, False]
    assert load(old, keys, [memory(), memory()]) == [False, False]
    assert not store(old, object_keys(1), source[:1]).is_successful()


def test_without_known_weights_nothing_is_shared(made, caplog):
    adapter, keys = made(revision=None), object_keys(1)
    assert not store(adapter, keys, [memory(1)]).is_successful()
    assert lookup(adapter, keys) == [False]


def test_wrong_configurations_are_refused(server, monkeypatch):
    with pytest.raises(ValueError, match="no option leese"):
        create_l2_adapter(plugin(server.endpoint, leese=1))
    monkeypatch.setattr("kvkeep.connectors.lmcache.adapter._version", lambda: "0.9.1")
    with pytest.raises(UnknownVersion, match=r"supports lmcache 0\.5\.\*, this is 0\.9\.1"):
        create_l2_adapter(plugin(server.endpoint))
    create_l2_adapter(plugin(server.endpoint, any_version=True)).close()

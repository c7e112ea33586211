"""KVKeep behind SGLang's HiCache, and a server that is killed, stopped or not there: misses, and nothing else.

tests/engines/run test_sglang_losses.py        one test: -k name
"""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from harness import wait_until
from pools import (  # noqa: F401 (fixtures)
    PAGE,
    backend,
    fill,
    indices,
    made,
    mha_pool,
    own_server,
    page_keys,
    page_of,
    same,
    server,
)
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

BOUND = 5.0
"""Seconds: far above what a lost server may cost, far below a hang."""


@pytest.mark.parametrize("shm", [False, True], ids=["anonymous", "shm"])
def test_a_killed_server_is_misses(own_server, made, shm):
    pool = mha_pool("page_first", shm=shm)
    fill(pool, 13)
    store, keys = made(pool, at=own_server), page_keys(16)
    assert all(store.batch_set_v1(keys, indices(pool, range(16))))
    own_server.wait_quiet()
    assert store.batch_exists(keys) == 16
    own_server.kill()
    started = time.monotonic()
    for _ in range(3):
        assert store.batch_exists(keys) == 0
        assert store.batch_get_v1(keys, indices(pool, range(30, 46))) == [False] * 16
        assert store.batch_set_v1(page_keys(16), indices(pool, range(16))) == [False] * 16
        assert store.batch_exists_v2(keys).kv_hit_pages == 0
    assert time.monotonic() - started < BOUND
    own_server.start()
    wait_until(lambda: store.batch_exists(keys) == 16, 30, "hits again without a restart of the engine")
    assert all(store.batch_get_v1(keys, indices(pool, range(30, 46))))
    assert same(pool, range(16), pool, range(30, 46))


@pytest.mark.parametrize("shm", [False, True], ids=["anonymous", "shm"])
def test_killed_in_the_middle_of_everything(own_server, made, shm):
    """Threads as SGLang's, a server that dies under them: nothing raised, nothing hangs, no wrong bytes."""
    pool = mha_pool("page_first", pages=128, layers=8, shm=shm)
    fill(pool, 14)
    store, keys = made(pool, at=own_server), page_keys(32)
    assert all(store.batch_set_v1(keys, indices(pool, range(32))))
    expected = [page_of(pool, n) for n in range(32)]
    over, wrong, hits = threading.Event(), [], []

    def reads():
        while not over.is_set():
            count = store.batch_exists(keys)
            got = store.batch_get_v1(keys[:count], indices(pool, range(64, 64 + count))) if count else []
            hits.append(sum(got))
            wrong.extend(n for n, ok in enumerate(got) if ok and page_of(pool, 64 + n) != expected[n])

    def writes():
        while not over.is_set():
            store.batch_set_v1(page_keys(32), indices(pool, range(32)))

    threads = [threading.Thread(target=reads), threading.Thread(target=writes)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.3)
        own_server.kill()
        time.sleep(0.2)
        own_server.start()
    over.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong and any(hits)


def test_a_stopped_server_is_misses_and_the_gil_is_free(own_server, made):
    pool = mha_pool("page_first")
    fill(pool, 15)
    store, keys = made(pool, at=own_server), page_keys(16)
    assert all(store.batch_set_v1(keys, indices(pool, range(16))))
    own_server.pause()
    turns, over = [0], threading.Event()

    def turn():
        while not over.wait(0.001):
            turns[0] += 1

    other = threading.Thread(target=turn)
    other.start()
    try:
        started = time.monotonic()
        before = turns[0]
        assert store.batch_get_v1(keys, indices(pool, range(30, 46))) == [False] * 16
        assert turns[0] > before, "other threads run while a call waits"
        assert store.batch_exists(keys) == 0
        assert time.monotonic() - started < BOUND
    finally:
        over.set()
        other.join()
        own_server.resume()
    wait_until(lambda: store.batch_exists(keys) == 16, 30, "hits again")


def test_pages_that_were_given_back_are_not_written(own_server, made):
    """SGLang gives a page that was not got to somebody else at once: a server that is stopped in the middle of a copy and goes on
    later must not write over it."""
    pool = mha_pool("page_first", pages=128, layers=16, shm=True)
    fill(pool, 18)
    store, keys = made(pool, at=own_server), page_keys(64)
    assert all(store.batch_set_v1(keys, indices(pool, range(64))))
    sentinel = torch.full_like(pool.kv_buffer[:, :PAGE].view(torch.int16), 0x5A5A)
    rng, outcomes = random.Random(18), []

    def read():
        got = store.batch_get_v1(keys, indices(pool, range(64, 128)))
        outcomes.append(all(got))
        for page in (64 + n for n, ok in enumerate(got) if not ok):
            pool.kv_buffer[:, page * PAGE : (page + 1) * PAGE].view(torch.int16).copy_(sentinel)
            lost.append(page)

    for _ in range(12):
        wait_until(lambda: store.batch_exists(keys) == 64, 30, "hits")
        lost: list[int] = []
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(rng.random() * 0.02)
        own_server.pause()
        time.sleep(0.3)
        own_server.resume()
        reader.join(30)
        assert not reader.is_alive()
        time.sleep(0.2)
        for page in lost:
            assert torch.equal(pool.kv_buffer[:, page * PAGE : (page + 1) * PAGE].view(torch.int16), sentinel)
    assert len(outcomes) == 12


def test_no_server_at_all(tmp_path):
    pool = mha_pool("page_first")
    started = time.monotonic()
    store = backend(f"unix:{tmp_path}/nobody.sock", pool)
    keys = page_keys(4)
    assert store.batch_exists(keys) == 0
    assert store.batch_set_v1(keys, indices(pool, range(4))) == [False] * 4
    assert store.batch_get_v1(keys, indices(pool, range(4))) == [False] * 4
    assert time.monotonic() - started < BOUND
    store.close()
    assert store.batch_exists(keys) == 0, "after its end it misses"


def test_wrong_arguments_are_misses_on_the_engines_threads(made):
    pool = mha_pool("page_first")
    store, keys = made(pool), page_keys(4)
    assert store.batch_get_v1(keys, torch.arange(3)) == [False] * 4
    assert store.batch_set_v1(keys, None) == [False] * 4
    assert store.batch_get_v2([PoolTransfer(name=PoolName.MAMBA, host_indices=torch.arange(4), keys=keys)]) == {
        "mamba": [False] * 4
    }
    assert store.batch_exists([""]) == 0 and store.batch_exists([]) == 0

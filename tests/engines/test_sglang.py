"""KVKeep behind SGLang's HiCache: loaded by SGLang's own factory, over SGLang's own host pools, against a real `kvkeepd`.

tests/engines/run test_sglang.py        one test: -k name
"""

from __future__ import annotations

import hashlib
import queue
from types import SimpleNamespace

import kvkeep
import pytest
import torch
from harness import Server, wait_until
from kvkeep.connectors.sglang import KVKeepStorage
from kvkeep.connectors.versions import UnknownVersion
from pools import (  # noqa: F401 (fixtures)
    PAGE,
    backend,
    config,
    fill,
    indices,
    made,
    mamba_pool,
    mha_pool,
    mla_pool,
    own_server,
    page_keys,
    page_of,
    ready,
    same,
    server,
)
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.storage import StorageBackendFactory


@pytest.mark.parametrize("shm", [False, True], ids=["anonymous", "shm"])
@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_pages_come_back_as_they_were(made, layout, shm):
    pool = mha_pool(layout, shm=shm)
    fill(pool, 1)
    store = made(pool)
    assert store._pools["kv"].is_shared == shm
    keys = page_keys(32)
    assert store.batch_set_v1(keys, indices(pool, range(32))) == [True] * 32
    assert store.batch_exists(keys + page_keys(1)) == 32
    assert store.exists(keys[0]) and not store.exists("f" * 64)
    # Another engine, and pages in another order.
    other = mha_pool(layout, shm=shm)
    reader = made(other)
    assert reader.batch_exists(keys) == 32
    assert reader.batch_get_v1(keys, indices(other, range(63, 31, -1))) == [True] * 32
    assert same(pool, range(32), other, range(63, 31, -1))


def test_the_layouts_are_not_mixed_up(made):
    keys = page_keys(4)
    first, second = mha_pool("page_first"), mha_pool("layer_first")
    fill(first, 1)
    assert all(made(first).batch_set_v1(keys, indices(first, range(4))))
    store = made(second)
    assert store.batch_exists(keys) == 0
    assert store.batch_get_v1(keys, indices(second, range(4))) == [False] * 4


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_batches_of_128_pages(made, layout):
    pool = mha_pool(layout, pages=256)
    fill(pool, 2)
    store, keys = made(pool), page_keys(128)
    assert all(store.batch_set_v1(keys, indices(pool, range(128))))
    assert store.batch_exists(keys) == 128
    assert all(store.batch_get_v1(keys, indices(pool, range(128, 256))))
    assert same(pool, range(128), pool, range(128, 256))


def test_pages_that_do_not_lie_in_order(made):
    """Rows that begin anywhere: not what the engine's allocator does, but what the interface allows."""
    pool = mha_pool("page_first")
    fill(pool, 3)
    store, keys = made(pool), page_keys(2)
    odd = torch.arange(7, 7 + 2 * PAGE)
    assert store.batch_set_v1(keys, odd) == [True, True]
    assert store.batch_get_v1(keys, indices(pool, [40, 41])) == [True, True]
    expected = pool.kv_buffer[:, 7 : 7 + 2 * PAGE]
    assert torch.equal(pool.kv_buffer[:, 40 * PAGE : 42 * PAGE].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_mla_is_stored_once_for_all_ranks(made, layout):
    pool, other = mla_pool(layout), mla_pool(layout)
    fill(pool, 4)
    keys = page_keys(8)
    writer, reader = made(pool, mla=True, rank=0, ranks=2), made(other, mla=True, rank=1, ranks=2)
    assert all(writer.batch_set_v1(keys, indices(pool, range(8))))
    assert reader.batch_exists(keys) == 8
    assert all(reader.batch_get_v1(keys, indices(other, range(8, 16))))
    assert same(pool, range(8), other, range(8, 16))


def test_a_page_is_there_when_all_ranks_have_stored_it(made):
    pools = [mha_pool("page_first"), mha_pool("page_first")]
    ranks = [made(pool, rank=n, ranks=2) for n, pool in enumerate(pools)]
    for n, pool in enumerate(pools):
        fill(pool, 5 + n)
    keys = page_keys(8)
    assert all(ranks[0].batch_set_v1(keys, indices(pools[0], range(8))))
    assert [rank.batch_exists(keys) for rank in ranks] == [0, 0]
    assert all(ranks[1].batch_set_v1(keys[:5], indices(pools[1], range(5))))
    assert [rank.batch_exists(keys) for rank in ranks] == [5, 5]
    for rank, pool in zip(ranks, pools):
        assert rank.batch_get_v1(keys[:5], indices(pool, range(20, 25))) == [True] * 5
        assert same(pool, range(5), pool, range(20, 25))


def test_ranks_of_another_size_are_not_mixed_up(made):
    pool = mha_pool("page_first")
    fill(pool, 7)
    keys = page_keys(2)
    assert all(made(pool, rank=0, ranks=1).batch_set_v1(keys, indices(pool, range(2))))
    assert made(pool, rank=0, ranks=2).batch_exists(keys) == 0
    assert made(pool, rank=0, ranks=1, cp=2).batch_exists(keys) == 0
    assert made(pool, rank=0, ranks=1, stage=1, stages=2).batch_exists(keys) == 0


def test_a_miss_in_the_middle_ends_the_prefix(made):
    pool = mha_pool("page_first")
    fill(pool, 8)
    store, keys = made(pool), page_keys(20)
    here = [*range(10), *range(11, 20)]
    assert all(store.batch_set_v1([keys[n] for n in here], indices(pool, here)))
    assert store.batch_exists(keys) == 10
    got = store.batch_get_v1(keys, indices(pool, range(30, 50)))
    assert got == [n != 10 for n in range(20)]
    assert same(pool, here, pool, [30 + n for n in here])


def test_side_pools_and_their_hit_policies(made):
    kv, side, state, group = (
        mha_pool("page_first"),
        mla_pool("page_first"),
        mha_pool("page_first", layers=2),
        mla_pool("page_first"),
    )
    for n, pool in enumerate((kv, side, state, group)):
        fill(pool, 20 + n)
    store = made(kv)
    for name, pool in ((PoolName.INDEXER, side), (PoolName.SWA, state), (PoolName.DEEPSEEK_V4_C4, group)):
        store.register_mem_host_pool_v2(pool, name)
    ready(store)
    keys = page_keys(12)

    def put(name, pool, pages):
        names = [keys[n] for n in pages]
        done = store.batch_set_v2([PoolTransfer(name=name, host_indices=indices(pool, pages), keys=names)])
        assert done == {name: [True] * len(names)}

    assert all(store.batch_set_v1(keys[:10], indices(kv, range(10))))
    put(PoolName.INDEXER, side, range(8))
    # Windows of two pages end after 4, after 7 and after 8 pages.
    put(PoolName.SWA, state, [2, 3, 5, 6, 7])
    # Groups of two pages stand for four pages each; of the third one only half is there.
    put(PoolName.DEEPSEEK_V4_C4, group, [2, 3, 6, 7, 10])
    window = PoolTransfer(name=PoolName.SWA, keys=keys[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    blocks = PoolTransfer(
        name=PoolName.DEEPSEEK_V4_C4, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4, group_pages=2
    )
    found = store.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER), window, blocks])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (8, [4, 7, 8])
    assert found.extra_pool_hit_pages == {"kv": 10, "indexer": 8, "swa": 8, "deepseek_v4_c4": 8}
    # Without the window everything up to the indexer's end will do.
    found = store.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER)])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (8, list(range(1, 9)))
    # A pool that nobody registered has nothing, and so nothing can be restored.
    assert store.batch_exists_v2(keys, [PoolTransfer(name=PoolName.DRAFT)]).kv_hit_pages == 0
    got = store.batch_get_v2(
        [
            PoolTransfer(name=PoolName.INDEXER, host_indices=indices(side, range(20, 28)), keys=keys[:8]),
            PoolTransfer(name=PoolName.SWA, host_indices=indices(state, [20, 21]), keys=keys[6:8]),
            PoolTransfer(
                name=PoolName.DEEPSEEK_V4_C4,
                host_indices=indices(group, range(20, 24)),
                keys=[keys[n] for n in (2, 3, 6, 9)],
            ),
        ]
    )
    assert got == {"indexer": [True] * 8, "swa": [True] * 2, "deepseek_v4_c4": [True, True, True, False]}
    assert same(side, range(8), side, range(20, 28)) and same(state, [6, 7], state, [20, 21])
    assert same(group, [2, 3, 6], group, [20, 21, 22])


def chain(tokens, before=None, page_size=PAGE) -> list[str]:
    """Hashes of pages as SGLang makes them. Its own are made by C++ that is compiled at first use and needs OpenSSL's headers."""
    hashes = []
    for at in range(0, len(tokens) // page_size * page_size, page_size):
        digest = hashlib.sha256(bytes.fromhex(before) if before else b"")
        digest.update(b"".join(int(t).to_bytes(4, "little") for t in tokens[at : at + page_size]))
        hashes.append(before := digest.hexdigest())
    return hashes


@pytest.mark.parametrize("shm", [False, True], ids=["anonymous", "shm"])
def test_recurrent_states_are_split_over_ranks_even_with_mla(made, shm):
    """States of a layer lie in two allocations; the last one of a prefix is enough."""
    kvs, states, ranks = [], [], []
    keys = page_keys(6)
    for rank in range(2):
        kvs.append(mla_pool("page_first"))
        states.append(mamba_pool(shm=shm))
        ranks.append(made(kvs[rank], mla=True, rank=rank, ranks=2))
        ranks[rank].register_mem_host_pool_v2(states[rank], PoolName.MAMBA)
        assert ranks[rank].wait_ready(30)
        assert ranks[rank]._pools["mamba"].is_shared == shm
        fill(states[rank], 30 + rank)
    assert all(ranks[0].batch_set_v1(keys, indices(kvs[0], range(6))))
    last = PoolTransfer(name=PoolName.MAMBA, keys=keys[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    for rank in range(2):
        assert ranks[rank].batch_exists_v2(keys, [last]).kv_hit_pages == 0
        put = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([3, 4]), keys=[keys[1], keys[4]])
        assert ranks[rank].batch_set_v2([put]) == {"mamba": [True, True]}
    for rank in range(2):
        found = ranks[rank].batch_exists_v2(keys, [last])
        assert (found.kv_hit_pages, found.restorable_prefix_pages) == (5, [2, 5])
        get = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([20]), keys=[keys[4]])
        assert ranks[rank].batch_get_v2([get]) == {"mamba": [True]}
        for buffer in (states[rank].temporal_buffer, *states[rank].conv_buffer):
            assert torch.equal(buffer[20].view(torch.uint8), buffer[4].view(torch.uint8))


def test_the_engines_own_controller_backs_up_and_prefetches(made, monkeypatch):
    """What SGLang's threads run, batch by batch, over 300 pages of one prompt."""
    monkeypatch.setattr("sglang.srt.managers.cache_controller.get_storage_hash_str", chain)
    pool = mha_pool("page_first", pages=700, layers=1, heads=1, dim=32, shm=True)
    fill(pool, 9)
    store = made(pool)
    tokens, pages = list(range(300 * PAGE)), 300

    def controller(storage):
        it = object.__new__(HiCacheController)
        it.storage_backend, it.page_size, it.storage_host_pool = storage, PAGE, pool
        it.page_get_func, it.page_set_func = it._page_get_zero_copy, it._page_set_zero_copy
        it.prefetch_sync_queue = queue.Queue()
        return it

    def operation(**more):
        known = dict(
            request_id="r",
            token_ids=tokens,
            last_hash=None,
            prefix_keys=[],
            completed_tokens=0,
            is_terminated=lambda: False,
        )
        return SimpleNamespace(**known | more)

    engine = controller(store)
    hashes, hit = engine._storage_hit_query(operation())
    assert (hashes, hit) == ([], 0)
    op = operation()
    engine._storage_hit_query(op)
    backup = operation(hash_value=op.all_hash_values, host_indices=indices(pool, range(pages)))
    engine._page_backup(backup)
    assert backup.completed_tokens == pages * PAGE
    # The same prompt, 50 pages of which nobody has.
    longer = operation(token_ids=tokens + list(range(50 * PAGE)))
    hashes, hit = engine._storage_hit_query(longer)
    assert hit == pages * PAGE and hashes == op.all_hash_values
    prefetch = operation(hash_value=hashes, host_indices=indices(pool, range(400, 700)))
    assert engine._page_transfer(prefetch) == pages
    assert same(pool, range(pages), pool, range(400, 700))
    assert store.leases_held() == 0


def test_leases_end_with_the_get(made, server):
    pool = mha_pool("page_first")
    fill(pool, 10)
    store, keys = made(pool), page_keys(8)
    assert all(store.batch_set_v1(keys, indices(pool, range(8))))
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "no leases of other tests")
    assert store.batch_exists(keys) == 8 and store.batch_exists(keys[:4]) == 4
    wait_until(lambda: server.total("kvkeep_leases") == 2, 20, "two leases are held")
    assert all(store.batch_get_v1(keys[:4], indices(pool, range(20, 24))))
    assert all(store.batch_get_v1(keys[4:], indices(pool, range(24, 28))))
    assert all(store.batch_get_v1(keys[:4], indices(pool, range(20, 24))))
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "leases released")
    assert store.leases_held() == 0


def test_leases_of_gets_that_never_come_run_out(made, server):
    pool = mha_pool("page_first")
    fill(pool, 11)
    store, keys = made(pool, lease_seconds=1.0), page_keys(4)
    assert all(store.batch_set_v1(keys, indices(pool, range(4))))
    assert store.batch_exists(keys) == 4
    wait_until(lambda: server.total("kvkeep_leases") == 0, 30, "leases run out")
    assert all(store.batch_get_v1(keys, indices(pool, range(20, 24)))), "a lease that is over is no reason to miss"


def test_what_was_found_outlives_what_others_store(tmp_path, made):
    """Between exists and get a store that is full evicts others, not what was promised."""
    small = Server(tmp_path / "data", dram="64MiB", nvme="off", KVKEEP_NO_NVME="true").start()
    try:
        pool = mha_pool("page_first", pages=128, layers=8)
        fill(pool, 12)
        store, keys = made(pool, at=small), page_keys(8)
        assert all(store.batch_set_v1(keys, indices(pool, range(8))))
        assert store.batch_exists(keys) == 8
        others = [page_keys(16) for _ in range(16)]
        for one in others:
            store.batch_set_v1(one, indices(pool, range(16, 32)))
        assert sum(store.batch_exists(one) for one in others) < 16 * len(others), "the store had to evict"
        assert store.batch_get_v1(keys, indices(pool, range(40, 48))) == [True] * 8
        assert same(pool, range(8), pool, range(40, 48))
    finally:
        small.close()


def test_clear_leaves_the_store_alone(made):
    pool = mha_pool("page_first")
    fill(pool, 16)
    store, keys = made(pool), page_keys(4)
    assert all(store.batch_set_v1(keys, indices(pool, range(4))))
    store.clear()
    assert store.batch_exists(keys) == 4


def test_other_weights_see_nothing(own_server, made):
    pool = mha_pool("page_first")
    fill(pool, 17)
    keys = page_keys(4)
    old = made(pool, at=own_server)
    assert all(old.batch_set_v1(keys, indices(pool, range(4))))
    new = made(pool, at=own_server, revision="weights 2")
    assert new.batch_exists(keys) == 0
    assert all(new.batch_set_v1(keys, indices(pool, range(8, 12))))
    # The engine with the old weights goes on, and neither reads nor writes what is the others' now.
    assert old.batch_exists(keys) == 0
    assert old.batch_get_v1(keys, indices(pool, range(20, 24))) == [False] * 4
    assert old.batch_set_v1(keys, indices(pool, range(4))) == [False] * 4
    assert new.batch_exists(keys) == 4


def test_without_known_weights_nothing_is_shared(server, caplog):
    pool = mha_pool("page_first")
    store = backend(server.endpoint, pool, revision=None)
    keys = page_keys(2)
    assert store.batch_set_v1(keys, indices(pool, range(2))) == [False, False]
    assert store.batch_exists(keys) == 0
    assert "which weights" in caplog.text
    store.close()


def test_a_draft_model_has_weights_of_its_own(made):
    pool, draft = mha_pool("page_first"), mha_pool("page_first", layers=1)
    fill(draft, 19)
    keys = page_keys(2)

    def drafts(revision):
        store = made(pool, draft_revision=revision)
        store.register_mem_host_pool_v2(draft, PoolName.DRAFT)
        assert store.wait_ready(30)
        return store

    def transfer(*pages):
        return [PoolTransfer(name=PoolName.DRAFT, host_indices=indices(draft, pages), keys=keys)]

    assert drafts(None).batch_set_v2(transfer(1, 2)) == {"draft": [False, False]}, "nobody says which weights"
    store = drafts("draft 1")
    assert store.batch_set_v2(transfer(1, 2)) == {"draft": [True, True]}
    assert store.batch_get_v2(transfer(3, 4)) == {"draft": [True, True]} and same(draft, [1, 2], draft, [3, 4])
    assert drafts("draft 2").batch_get_v2(transfer(3, 4)) == {"draft": [False, False]}


def test_wrong_configurations_are_refused(server, monkeypatch):
    pool = mha_pool("page_first")
    for message, how in (("no option leese", {"leese": 1}), ("interface_v1", {"interface": 0})):
        with pytest.raises(ValueError, match=message):
            StorageBackendFactory.create_backend("dynamic", config(server.endpoint, **how), pool)
    monkeypatch.setattr("kvkeep.connectors.sglang.storage._version", lambda: "0.9.1")
    with pytest.raises(UnknownVersion, match=r"supports sglang 0\.5\.\*, this is 0\.9\.1"):
        KVKeepStorage(config(server.endpoint))
    KVKeepStorage(config(server.endpoint, any_version=True)).close()


def test_sessions_are_told(made, monkeypatch):
    """Where the engine names a session, the store's policy learns which pages are one conversation's."""
    pool = mha_pool("page_first")
    store, seen = made(pool), []
    info = kvkeep.RequestInfo
    monkeypatch.setattr(kvkeep, "RequestInfo", lambda **how: seen.append(how) or info(**how))
    extra = HiCacheStorageExtraInfo(prefix_keys=page_keys(3), extra_info={"session_id": "conversation 7"})
    assert store.batch_set_v1(page_keys(2), indices(pool, range(2)), extra) == [True, True]
    assert len(seen) == 1 and seen[0]["session"] > 0

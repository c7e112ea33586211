#!/usr/bin/env python3
"""Bytes through the thin connectors: 32 pages of 64 tokens each way, beside a plain copy of the same bytes in the same process.

Prints JSON: GB/s, the median of ROUNDS; microseconds of a lookup. In the environment of `tests/engines/run`:

    PYTHONPATH=... KVKEEP_KVKEEPD=... .../venv/bin/python tests/engines/throughput.py

Written once: what is read was just stored, and lies in the server's DRAM.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import kvkeep
import torch
from harness import Server

PAGES, ROUNDS = 32, 7
# A page of 64 tokens of 24 layers with 8 heads of 128: 6 MiB.
SHAPE = dict(layers=24, heads=8, dim=128)


def gbps(size: int, run) -> float:
    """GB/s of one run."""
    started = time.perf_counter()
    assert run()
    return size / (time.perf_counter() - started) / 1e9


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}


def sglang(server: Server) -> dict:
    import pools

    out = {}
    for layout in ("page_first", "layer_first"):
        for shm in (True, False):
            pool = pools.mha_pool(layout, pages=2 * PAGES, shm=shm, **SHAPE)
            pools.fill(pool, 1)
            store = pools.backend(server.endpoint, pool, patience_seconds=2.0)
            pools.ready(store)
            size = PAGES * store._pools["kv"].page_bytes
            first, second = pools.indices(pool, range(PAGES)), pools.indices(pool, range(PAGES, 2 * PAGES))
            half = pool.kv_buffer.view(-1).view(torch.uint8)[: size // 2]
            into = torch.empty_like(half)
            rounds = []
            for n in range(ROUNDS + 1):
                keys = [f"{layout}{shm}{n}{i}".encode().hex().rjust(64, "0")[-64:] for i in range(PAGES)]
                put = gbps(size, lambda: all(store.batch_set_v1(keys, first)))
                started = time.perf_counter()
                assert store.batch_exists(keys) == PAGES
                exists = time.perf_counter() - started
                get = gbps(size, lambda: all(store.batch_get_v1(keys, second)))
                copy = gbps(size // 2, lambda: into.copy_(half) is into)
                assert pools.page_of(pool, 3) == pools.page_of(pool, PAGES + 3)
                rounds.append({"put": put, "get": get, "copy": copy, "exists_us": exists * 1e6})
                # The server gives the memory to the next round: of this one nothing is read again.
                store._pools["kv"].namespace.remove([bytes.fromhex(key) for key in keys])
            out[f"{layout}, {'shared' if shm else 'socket'}"] = medians(rounds[1:])
            store.close()
    return out


def lmcache(server: Server) -> dict:
    import chunks
    from kvkeep.connectors.lmcache.spaces import position_of
    from lmcache.v1.distributed.api import MemoryLayoutDesc
    from lmcache.v1.distributed.config import L1MemoryManagerConfig
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.memory_manager.l1_memory_manager import L1MemoryManager

    # A chunk of 256 tokens of the same model: 24 MiB; 8 of them are 32 pages.
    desc = MemoryLayoutDesc(shapes=[torch.Size([2, 24, 256, 1024])], dtypes=[torch.bfloat16])
    out = {}
    for name in ("", "lmcache_l1_pool_kvkeep_throughput"):
        manager = L1MemoryManager(L1MemoryManagerConfig(512 << 20, False, shm_name=name))
        adapter = create_l2_adapter(chunks.plugin(server.endpoint, patience_seconds=2.0), manager.get_l1_memory_desc())
        assert adapter.is_shared == bool(name)
        source, into = manager.allocate(desc, 8)[1], manager.allocate(desc, 8)[1]
        for n, obj in enumerate(source):
            obj.raw_data.random_(generator=torch.Generator().manual_seed(n))
        size = sum(obj.get_size() for obj in source)
        chunks.stored(adapter, chunks.object_keys(1), source[:1])
        rounds = []
        for _ in range(ROUNDS + 1):
            keys = chunks.object_keys(8)
            put = gbps(size, lambda: chunks.store(adapter, keys, source).is_successful())
            started = time.perf_counter()
            assert all(chunks.lookup(adapter, keys, {0: desc}))
            exists = time.perf_counter() - started
            get = gbps(size, lambda: all(chunks.load(adapter, keys, into)))
            assert chunks.same(source, into)
            adapter.submit_unlock(keys)
            rounds.append({"put": put, "get": get, "exists_us": exists * 1e6})
            for space in adapter._spaces.all():
                space.namespace.remove([position_of(key) for key in keys])
        out["shared" if name else "socket"] = medians(rounds[1:])
        adapter.close()
        manager.free(source + into)
        manager.close()
    return out


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for engine in (sglang, lmcache):
        with tempfile.TemporaryDirectory() as folder:
            server = Server(Path(folder) / "data", dram="3GiB", nvme="off").start()
            try:
                figures[engine.__name__] = engine(server)
            finally:
                server.close()
    print(
        json.dumps({"kvkeep": kvkeep.__version__, "pages": PAGES, "page_bytes": 6 << 20, "gb_per_s": figures}, indent=1)
    )


if __name__ == "__main__":
    sys.exit(main())

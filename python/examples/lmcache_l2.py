#!/usr/bin/env python3
"""LMCache's own storage manager over KVKeep, without an engine and without a GPU: chunks are stored, dropped, and prefetched.

python lmcache_l2.py [ENDPOINT]        for example local:/tmp/kvkeep-example?dram=256MiB&nvme=1GiB
"""

import os
import sys
import time

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig, get_l2_adapter_config_class
from lmcache.v1.distributed.storage_manager import StorageManager

ENDPOINT = "local:/tmp/kvkeep-example?dram=256MiB&nvme=1GiB&idle=5"
CHUNKS = 8


def main() -> None:
    adapter = get_l2_adapter_config_class("plugin").from_dict(
        {
            "type": "plugin",
            "module_path": "kvkeep.connectors.lmcache",
            "class_name": "KVKeepAdapter",
            # Of a real model: "model_path" instead, a digest is made from it.
            "adapter_params": {"endpoint": sys.argv[1] if len(sys.argv) > 1 else ENDPOINT, "revision": "example"},
        }
    )
    memory = L1MemoryManagerConfig(64 << 20, use_lazy=False, shm_name=f"lmcache_l1_pool_example_{os.getpid()}")
    manager = StorageManager(
        StorageManagerConfig(L1ManagerConfig(memory), EvictionConfig("LRU"), L2AdaptersConfig([adapter]))
    )
    try:
        # Keys and values of 256 tokens: 2 MiB.
        layout = MemoryLayoutDesc(shapes=[torch.Size([2, 8, 256, 256])], dtypes=[torch.bfloat16])
        rank = ObjectKey.ComputeKVRank(world_size=1, global_rank=0, local_world_size=1, local_rank=0)
        keys = [ObjectKey(os.urandom(32), "example/model", rank) for _ in range(CHUNKS)]
        content = {}
        for key, obj in manager.reserve_write(keys, layout).items():
            obj.raw_data.random_()
            content[key] = bytes(obj.byte_array)
        manager.finish_write(keys)
        l2 = manager.l2_adapters()[0][1]
        until = time.monotonic() + 30
        while l2.get_usage().total_bytes_used < sum(map(len, content.values())) and time.monotonic() < until:
            time.sleep(0.01)
        print(
            f"stored {l2.get_usage().total_bytes_used >> 20} MiB; the server reads LMCache's memory itself: {l2.is_shared}"
        )
        while manager.delete_l1_keys(keys)[1]:
            time.sleep(0.01)
        started = time.perf_counter()
        handle = manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)]))
        manager.wait_prefetch_status(handle, 30)
        result = manager.query_prefetch_status(handle)
        took = time.perf_counter() - started
        with manager.read_prefetched_results(keys) as objects:
            same = objects is not None and all(bytes(o.byte_array) == content[k] for k, o in zip(keys, objects))
        manager.finish_read_prefetched(keys)
        print(f"prefetched {result.l2_hit_count} of {CHUNKS} chunks in {1e3 * took:.1f} ms; the same bytes: {same}")
    finally:
        manager.close()


if __name__ == "__main__":
    main()

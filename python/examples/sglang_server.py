#!/usr/bin/env python3
"""Starts SGLang with KVKeep as its storage.

    python sglang_server.py MODEL [ENDPOINT] [more arguments for sglang.launch_server ...]
    python sglang_server.py --check [ENDPOINT]        no model, no GPU: pages of a host pool go out and come back

ENDPOINT: for example local:/var/lib/kvkeep?dram=16GiB&nvme=200GiB
"""

import json
import os
import sys

ENDPOINT = "local:/tmp/kvkeep-example?dram=256MiB&nvme=1GiB&idle=5"


def extra_config(endpoint: str, **options) -> dict:
    return {
        "backend_name": "kvkeep",
        "module_path": "kvkeep.connectors.sglang",
        "class_name": "KVKeepStorage",
        "interface_v1": 1,
        "allocator": "shm",
        "hicache_storage_pass_prefix_keys": True,
        "kvkeep": {"endpoint": endpoint} | options,
    }


def serve(model: str, endpoint: str, more: list[str]) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--enable-hierarchical-cache"]
    command += [
        "--hicache-ratio",
        "1.1",
        "--hicache-mem-layout",
        "page_first",
        "--hicache-write-policy",
        "write_through",
    ]
    command += ["--hicache-storage-backend", "dynamic"]
    command += ["--hicache-storage-backend-extra-config", json.dumps(extra_config(endpoint)), *more]
    os.execv(command[0], command)


def check(endpoint: str) -> None:
    import torch
    from sglang.srt.mem_cache.device_pool_info import KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.pool_host import base, mha
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 1 << 30
    layers, heads, dim, page, pages = 8, 8, 128, 64, 16
    k, v = ([torch.zeros(page, heads, dim, dtype=torch.bfloat16) for _ in range(layers)] for _ in "kv")
    pointers = [torch.tensor([t.data_ptr() for t in ts], dtype=torch.uint64) for ts in (k, v)]
    known = {"k": tuple(k), "v": tuple(v), "k_data_ptrs": pointers[0], "v_data_ptrs": pointers[1]}
    buffers = KVBuffers(**{f: known.get(f) for f in KVBuffers.__struct_fields__})
    shape = dict(
        page_size=page, head_num=heads, head_dim=dim, v_head_dim=dim, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    how = dict(
        pin_memory=False,
        device="cpu",
        allocator_type="shm",
        device_capacity_tokens=page,
        start_layer=0,
        end_layer=layers,
    )
    pool = mha.MHATokenToKVPoolHost(MHABufferInfo(buffers=buffers, **shape), 2.0 * pages, 0, page, "page_first", **how)
    pool.kv_buffer.random_(-1000, 1000)
    rank = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False)
    config = HiCacheStorageConfig(
        **rank,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="example",
        extra_config=extra_config(endpoint, revision="example"),
    )
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    storage.register_mem_pool_host(pool)
    storage.on_host_pools_registered()
    storage.wait_ready(20)
    keys = [os.urandom(32).hex() for _ in range(pages)]
    stored = storage.batch_set_v1(keys, torch.arange(pages * page))
    found = storage.batch_exists(keys)
    got = storage.batch_get_v1(keys, torch.arange(pages * page, 2 * pages * page))
    first, second = pool.kv_buffer[:, : pages * page], pool.kv_buffer[:, pages * page : 2 * pages * page]
    same = torch.equal(first.view(torch.int16), second.view(torch.int16))
    print(f"{sum(stored)} of {pages} pages stored, {found} found, {sum(got)} got; the same bytes: {same}")
    storage.close()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    there = arguments[1] if len(arguments) > 1 else ENDPOINT
    if arguments[0] == "--check":
        check(there)
    else:
        serve(arguments[0], there, arguments[2:])

"""SGLang's HiCache over KVKeep: pages go between the host pool and the store.

    --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvkeep", "module_path": "kvkeep.connectors.sglang",
        "class_name": "KVKeepStorage", "interface_v1": 1, "allocator": "shm", "hicache_storage_pass_prefix_keys": true,
        "kvkeep": {"endpoint": "local:/var/lib/kvkeep?dram=16GiB&nvme=200GiB"}}'

* `storage`: SGLang's interface; nothing raises on the engine's threads.
* `pools`: a host pool, its namespace, and where its pages lie.
* `hits`: how far a prefix reaches under the hit policies of the interface's second version.

SGLang's order per request is exists, then (all ranks agree on the smallest answer) get. What exists found is leased until it was
got, or until the lease's time is over, so the two do not disagree. docs/engines/sglang.md has the options and the table of keys.
"""

from .storage import KVKeepStorage

__all__ = ["KVKeepStorage"]

"""LMCache over KVKeep: chunks go between LMCache's own memory (L1) and the store, which is its L2.

    --l2-adapter '{"type": "plugin", "module_path": "kvkeep.connectors.lmcache", "class_name": "KVKeepAdapter",
        "adapter_params": {"endpoint": "local:/var/lib/kvkeep?dram=16GiB&nvme=200GiB", "model_path": "/models/my-model"}}'

* `adapter`: LMCache's interface of an L2: tasks, three event descriptors, locks that are leases.
* `spaces`: which namespace, position and part a key of LMCache is.
* `memory`: LMCache's memory as a region, so that the server fills and reads it itself.

docs/engines/lmcache.md has the options and the table of keys.
"""

from .adapter import KVKeepAdapter

__all__ = ["KVKeepAdapter"]

"""Chunks for LMCache's L2 adapter on a machine without a GPU, and LMCache's side of its interface."""

from __future__ import annotations

import os
import select
import time

import pytest
import torch
from harness import Server, wait_until
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

SHAPE = torch.Size([2, 4, 256, 128])
"""Keys and values, layers, tokens of a chunk, width: 512 KiB."""
LAYOUTS = {0: MemoryLayoutDesc(shapes=[SHAPE], dtypes=[torch.bfloat16])}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("lmcache") / "data", dram="768MiB", nvme="2GiB").start()
    yield server
    server.close()


@pytest.fixture
def own_server(tmp_path):
    """One that a test may kill."""
    server = Server(tmp_path / "data", dram="256MiB", nvme="1GiB").start()
    yield server
    server.close()


def plugin(endpoint: str, **params):
    return get_l2_adapter_config_class("plugin").from_dict(
        {
            "type": "plugin",
            "module_path": "kvkeep.connectors.lmcache",
            "class_name": "KVKeepAdapter",
            "adapter_params": {"endpoint": endpoint, "revision": "weights 1"} | params,
        }
    )


@pytest.fixture
def made(server):
    """Makes adapters, and closes them."""
    all_made = []

    def make(*, at=None, **params):
        adapter = create_l2_adapter(plugin((at or server).endpoint, **params))
        all_made.append(adapter)
        return adapter

    yield make
    for adapter in all_made:
        adapter.close()


_next = iter(range(1, 1 << 40))


def object_keys(count: int, rank: int = 0, world: int = 1, *, like=None, **more) -> list[ObjectKey]:
    """Chunks that no other test has, or the same ones of another rank."""
    hashes = [key.chunk_hash for key in like] if like else [next(_next).to_bytes(32, "big") for _ in range(count)]
    model = more.pop("model", "local/small")
    return [ObjectKey(h, model, ObjectKey.ComputeKVRank(world, rank, world, rank), **more) for h in hashes]


def memory(seed: int | None = None, shape=SHAPE, dtype=torch.bfloat16) -> TensorMemoryObj:
    size = shape.numel() * dtype.itemsize
    raw = torch.zeros(size, dtype=torch.uint8)
    if seed is not None:
        raw.random_(generator=torch.Generator().manual_seed(seed))
    return TensorMemoryObj(raw, MemoryObjMetadata(shape, dtype, 0, size, 1, 0, MemoryFormat.KV_2LTD), None)


def ended(fd: int, query, seconds: float = 60.0):
    """As LMCache's controllers: wait for the descriptor, then ask."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    until = time.monotonic() + seconds
    while (result := query()) in (None, {}):
        assert time.monotonic() < until, "a task did not end"
        if poll.poll(1000):
            os.eventfd_read(fd)
    return result


def store(adapter, keys, objects):
    task = adapter.submit_store_task(keys, objects)
    return ended(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)[task]


def lookup(adapter, keys, layouts=LAYOUTS) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(keys, layouts)
    found = ended(adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task))
    assert adapter.query_lookup_and_lock_result(task) is None, "a result is told once"
    return [found.test(n) for n in range(len(keys))]


def load(adapter, keys, objects) -> list[bool]:
    task = adapter.submit_load_task(keys, objects)
    loaded = ended(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    return [loaded.test(n) for n in range(len(keys))]


def eventually(adapter, keys, layouts=LAYOUTS) -> None:
    """Until a lookup finds all of it: the first calls may come before the store does."""

    def found() -> bool:
        there = lookup(adapter, keys, layouts)
        adapter.submit_unlock([key for key, is_there in zip(keys, there) if is_there])
        return all(there)

    wait_until(found, 30, "everything is found")


def stored(adapter, keys, objects) -> None:
    wait_until(lambda: store(adapter, keys, objects).is_successful(), 30, "everything is stored")


def same(objects, others) -> bool:
    return all(bytes(a.byte_array) == bytes(b.byte_array) for a, b in zip(objects, others, strict=True))

"""LMCache's own remote tier, its `lm://` server, through the connector that its engine uses; CPU memory only.

Its server does not acknowledge a put: what a put row says is how fast bytes are handed over, not how fast they are kept.
"""

import asyncio
import importlib.metadata
import os
import sys

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
os.environ["LMCACHE_TRACK_USAGE"] = "false"

import common
from common import BLOCK_BYTES, BLOCKS

# Longest wait for one put, seconds.
PUT_WAIT = 20
# GB that the client's pool of CPU memory may take.
POOL_GB = 1.5


def block_metadata():
    """A shape of bfloat16 whose chunks are blocks: 2 * 256 * heads * 2 bytes."""
    import torch
    from lmcache.v1.metadata import LMCacheMetadata

    return LMCacheMetadata(
        model_name="bench",
        world_size=8,
        local_world_size=8,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(1, 2, 256, 1, BLOCK_BYTES // 1024),
    )


class Remote:
    """One connection of its remote backend."""

    def __init__(self, port):
        from lmcache.v1.check.utils import EventLoopManager, create_test_key
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.storage_backend import RemoteBackend
        from lmcache.v1.storage_backend.connector import InstrumentedRemoteConnector
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=POOL_GB,
            remote_url=f"lm://127.0.0.1:{port}",
            remote_serde="naive",
            chunk_size=256,
        )
        metadata = block_metadata()
        self.manager = EventLoopManager()
        self.manager.start()
        self.pool = LocalCPUBackend(config=config, metadata=metadata, dst_device="cpu")
        self.backend = RemoteBackend(
            config=config,
            metadata=metadata,
            loop=self.manager.get_loop(),
            local_cpu_backend=self.pool,
            dst_device="cpu",
        )
        connection = self.backend.connection
        if isinstance(connection, InstrumentedRemoteConnector):
            connection = connection.getWrappedConnector()
        self.connector = connection
        self.keys = [create_test_key("bench", f"block-{n}") for n in range(BLOCKS)]
        self.source = self.pool.allocate(connection.meta_shapes, connection.meta_dtypes, connection.meta_fmt)
        if len(self.source.byte_array) != BLOCK_BYTES:
            raise RuntimeError(f"its chunk has {len(self.source.byte_array)} bytes")

    def put(self, number):
        self.source.ref_count_up()
        put = self.connector.put(self.keys[number], self.source)
        asyncio.run_coroutine_threadsafe(put, self.manager.get_loop()).result(PUT_WAIT)

    def get(self, number):
        got = self.backend.get_blocking(self.keys[number])
        if got is None or len(got.byte_array) != BLOCK_BYTES:
            raise RuntimeError("lmcache answers no block")
        got.ref_count_down()


def start():
    """Starts the server and fills it."""
    import lmcache

    port = common.free_port()
    server = common.start_server(sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", port, "cpu")
    common.wait_for_port(port, server)
    remote = Remote(port)
    for number in range(BLOCKS):
        remote.put(number)
    return f"LMCache {importlib.metadata.version('lmcache')}", [
        (common.path("lmcache", "get"), common.one_by_one(remote.get)),
        (common.path("lmcache", "put"), common.one_by_one(remote.put)),
    ]


if __name__ == "__main__":
    common.run(start)

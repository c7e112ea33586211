"""Mooncake Store, driven through its Python binding by buffers of our own that it reads and writes in place.

    peer_mooncake.py agent     client -> stand-alone client process over shared memory; that process holds the store's memory
    peer_mooncake.py tcp       client without memory of its own -> a store node in another process over loopback TCP
    peer_mooncake.py node ...  that node; started by `tcp`
"""

import ctypes
import importlib.metadata
import mmap
import os
import sys
import time

import common
from common import BATCH, BLOCK_BYTES, BLOCKS, WORKING_SET_BYTES

SEGMENT_BYTES = 1 << 30
# Put once at the start, so that no measured put is the first to touch a page of the segment.
TOUCH_BYTES = 850 << 20
# Blocks put before they are taken away again; they and the blocks that are read fit into the segment.
PUT_BLOCKS = 384
LOCAL_BUFFER_BYTES = 64 << 20


def programs():
    """The folder of the package, where its programs are."""
    import mooncake

    return os.path.dirname(mooncake.__file__)


def start_master():
    """Starts a master; answers its address."""
    port = common.free_port()
    master = common.start_server(
        os.path.join(programs(), "mooncake_master"),
        "--rpc_address=127.0.0.1",
        f"--rpc_port={port}",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={common.free_port()}",
    )
    common.wait_for_port(port, master)
    return f"127.0.0.1:{port}"


def retried(what, function):
    """Calls until it answers 0: the other side may not be up yet."""
    ends = time.monotonic() + common.SERVER_WAIT
    while (code := function()) != 0:
        if time.monotonic() > ends:
            raise RuntimeError(f"{what} answers {code}")
        time.sleep(0.5)


def connect_agent(store):
    """Connects over shared memory; answers the address of our buffer, which must come from the library."""
    master, port = start_master(), common.free_port()
    agent = common.start_server(
        os.path.join(programs(), "mooncake_client"),
        f"--master_server_address={master}",
        "--host=127.0.0.1",
        "--protocol=tcp",
        f"--port={port}",
        f"--global_segment_size={SEGMENT_BYTES >> 20} MB",
        "--metadata_server=P2PHANDSHAKE",
    )
    common.wait_for_port(port, agent)
    pool = WORKING_SET_BYTES + LOCAL_BUFFER_BYTES
    retried("setup_dummy", lambda: store.setup_dummy(pool, LOCAL_BUFFER_BYTES, f"127.0.0.1:{port}"))
    address = store.alloc_from_mem_pool(WORKING_SET_BYTES)
    if not address:
        raise RuntimeError("alloc_from_mem_pool answers nothing")
    return address


def connect_tcp(store):
    """Connects over TCP; answers the address of our buffer and its owner."""
    master = start_master()
    common.start_server(sys.executable, __file__, "node", common.free_port(), master)
    setup = lambda: store.setup(
        f"127.0.0.1:{common.free_port()}", "P2PHANDSHAKE", 0, WORKING_SET_BYTES, "tcp", "", master
    )
    retried("setup", setup)
    buffer = mmap.mmap(-1, WORKING_SET_BYTES)
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)), buffer


class Paths:
    """Puts and gets, single and in batches, through one buffer that is larger than the caches."""

    def __init__(self, store, address):
        self.store = store
        self.address = address
        self.gets = [f"get-{n}" for n in range(BLOCKS)]
        self.puts = [f"put-{n}" for n in range(PUT_BLOCKS)]
        # Where the next put and the next get go on, so that no measurement begins with blocks that are in a cache.
        self.put_at = 0
        self.get_at = 0
        view = (ctypes.c_char * WORKING_SET_BYTES).from_address(address)
        filled = os.urandom(BLOCK_BYTES)
        for n in range(BLOCKS):
            ctypes.memmove(ctypes.addressof(view) + n * BLOCK_BYTES, filled, BLOCK_BYTES)
            # Each block is told apart from its neighbours.
            ctypes.memmove(ctypes.addressof(view) + n * BLOCK_BYTES, n.to_bytes(8, "little"), 8)

    def place(self, number):
        return self.address + number % BLOCKS * BLOCK_BYTES

    def fill(self):
        """Touches the segment and leaves the blocks that are read."""
        touch = [f"touch-{n}" for n in range(TOUCH_BYTES // BLOCK_BYTES)]
        ends = time.monotonic() + common.SERVER_WAIT
        for first in range(0, len(touch), 32):
            keys = touch[first : first + 32]
            # The store's memory may not be known to the master yet.
            while any(self.batch_put(keys, first)):
                if time.monotonic() > ends:
                    raise RuntimeError("the store takes no blocks")
                time.sleep(0.5)
        self.store.remove_all(True)
        for first in range(0, BLOCKS, 32):
            self.check_put(self.batch_put(self.gets[first : first + 32], first))
        self.check_bytes()

    def batch_put(self, keys, first):
        places = [self.place(first + n) for n in range(len(keys))]
        return self.store.batch_put_from(keys, places, [BLOCK_BYTES] * len(keys))

    def check_bytes(self):
        """What was put comes back, and where it was asked for."""
        code = self.store.get_into(self.gets[5], self.place(9), BLOCK_BYTES)
        same = ctypes.string_at(self.place(5), BLOCK_BYTES) == ctypes.string_at(self.place(9), BLOCK_BYTES)
        if code != BLOCK_BYTES or not same:
            raise RuntimeError(f"wrong bytes: get_into answers {code}")
        ctypes.memmove(self.place(9), (9).to_bytes(8, "little"), 8)

    @staticmethod
    def check_put(codes):
        if any(codes):
            raise RuntimeError(f"a put answers {codes}")

    def get(self, stretch):
        with stretch.counting_cpu():
            while stretch.going():
                n = self.get_at = (self.get_at + 1) % BLOCKS
                code = stretch.call(BLOCK_BYTES, self.store.get_into, self.gets[n], self.place(n), BLOCK_BYTES)
                if code != BLOCK_BYTES:
                    raise RuntimeError(f"get_into answers {code}")

    def get_batch(self, stretch):
        with stretch.counting_cpu():
            while stretch.going():
                first = self.get_at = (self.get_at // BATCH + 1) * BATCH % BLOCKS
                places = [self.place(first + n) for n in range(BATCH)]
                sizes = [BLOCK_BYTES] * BATCH
                keys = self.gets[first : first + BATCH]
                codes = stretch.call(BATCH * BLOCK_BYTES, self.store.batch_get_into, keys, places, sizes)
                if any(code != BLOCK_BYTES for code in codes):
                    raise RuntimeError(f"batch_get_into answers {codes}")

    def put(self, stretch):
        self.put_until_full(stretch, self.put_singly)

    def put_batch(self, stretch):
        self.put_until_full(stretch, self.put_in_batches)

    def put_until_full(self, stretch, some):
        """A key is put once: when all are there they are taken away, which is not timed."""
        while stretch.going():
            with stretch.counting_cpu():
                put = some(stretch)
            if any(self.store.batch_remove(self.puts[:put], True)):
                raise RuntimeError("batch_remove fails")

    def put_singly(self, stretch):
        put = 0
        while put < PUT_BLOCKS and stretch.going():
            self.put_at += 1
            args = (self.puts[put], self.place(self.put_at), BLOCK_BYTES)
            self.check_put([stretch.call(BLOCK_BYTES, self.store.put_from, *args)])
            put += 1
        return put

    def put_in_batches(self, stretch):
        put = 0
        while put < PUT_BLOCKS and stretch.going():
            self.put_at += BATCH
            places = [self.place(self.put_at + n) for n in range(BATCH)]
            args = (self.puts[put : put + BATCH], places, [BLOCK_BYTES] * BATCH)
            self.check_put(stretch.call(BATCH * BLOCK_BYTES, self.store.batch_put_from, *args))
            put += BATCH
        return put


def start(mode):
    """Starts servers, connects, fills."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    owner = None
    if mode == "agent":
        name, address = "mooncake_shm_agent", connect_agent(store)
    else:
        name = "mooncake_tcp"
        address, owner = connect_tcp(store)
    paths = Paths(store, address)
    # The buffer lives as long as its user.
    paths.owner = owner
    if store.register_buffer(address, WORKING_SET_BYTES) != 0 and mode == "tcp":
        raise RuntimeError("register_buffer fails")
    paths.fill()
    for package in ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"):
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
    return f"Mooncake {version}", [
        (common.path(name, "get", BATCH), paths.get_batch),
        (common.path(name, "get"), paths.get),
        (common.path(name, "put", BATCH), paths.put_batch),
        (common.path(name, "put"), paths.put),
    ]


def node(port, master):
    """Holds the store's memory until it is killed."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    setup = lambda: store.setup(
        f"127.0.0.1:{port}", "P2PHANDSHAKE", SEGMENT_BYTES, LOCAL_BUFFER_BYTES, "tcp", "", master
    )
    retried("setup", setup)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "node":
        node(sys.argv[2], sys.argv[3])
    else:
        common.run(lambda: start(sys.argv[1]))

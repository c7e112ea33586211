"""Gets and puts of a stock grpcio client, in GB/s: KVKeep against a bare service that lands and checksums the same bytes.

    grpc_bench.py KVKEEPD BARE [--pairs 5] [--seconds 3] [--in-flight 4] [--batch 4] [--json FILE]

Pairs, the order of the two drawn for each; medians. A put on KVKeep is a whole put (reserve, write, commit), on the bare
service only the write. The client's own cost (Python, one process, the GIL) is in both figures: what is compared is what
the servers add. Floor of a put of one block beside gRPC itself: one copy into the slot, one pass of crc32; of a get: one
pass of crc32.
"""

import argparse
import concurrent.futures
import json
import os
import random
import statistics
import threading
import time

import grpc

from kvkeep_stubs import blocks_pb2 as kv
from kvkeep_stubs import blocks_pb2_grpc, types_pb2

BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20
# Positions that are stored before the gets: more than a last-level cache holds.
SERVED_BLOCKS = 256
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.write_buffer_size", 4 << 20),
]


class Side:
    """One server, one connection."""

    def __init__(self, endpoint: str, is_store: bool):
        self.is_store = is_store
        self.stub = blocks_pb2_grpc.BlocksStub(grpc.insecure_channel(endpoint, OPTIONS))
        self.handle = types_pb2.Handle(namespace_id=1, revision=1)
        self.block = os.urandom(BLOCK_BYTES)
        self.keys = [os.urandom(32) for _ in range(SERVED_BLOCKS)]
        self.next_id = 0
        self.lock = threading.Lock()
        if is_store:
            self.stub.Hello(kv.HelloRequest(major=1, instance_id=os.urandom(16)))
            group = types_pb2.Group(all={}, tokens_per_block=16, shards=1, size={"exact": BLOCK_BYTES})
            model = types_pb2.Format(model="bench", dtype="bf16", layout="bench", hash_algorithm="random",
                                     tokens_per_key=16, topology={"canonical": True, "tp": 1, "pp": 1, "cp": 1},
                                     groups=[group])
            request = kv.RegisterNamespaceRequest(name="bench", format=model, revision_digest="w")
            self.handle = self.stub.RegisterNamespace(request).handle

    def fill(self) -> None:
        """Stores the blocks that are read."""
        if self.is_store:
            for first in range(0, SERVED_BLOCKS, 16):
                self.put(self.keys[first:first + 16])

    def get(self, keys: list[bytes]) -> int:
        """Reads whole blocks; answers the bytes."""
        items = [kv.GetItem(key=key) for key in keys]
        total = 0
        for reply in self.stub.Get(kv.GetRequest(handle=self.handle, items=items, chunk_bytes=CHUNK_BYTES)):
            if reply.status != types_pb2.PART_STATUS_HIT:
                raise SystemExit(f"item {reply.item}: status {reply.status}, reason {reply.reason}")
            total += len(reply.data)
        if total != len(keys) * BLOCK_BYTES:
            raise SystemExit(f"{total} bytes came back for {len(keys)} blocks")
        return total

    def put(self, keys: list[bytes]) -> int:
        """Stores blocks; answers the bytes."""
        if self.is_store:
            ids = self.reserve(keys)
            if not ids:
                return 0
        else:
            with self.lock:
                ids = list(range(self.next_id, self.next_id + len(keys)))
                self.next_id += len(keys)
        reply = self.stub.Write(kv.WriteRequest(reservation_id=i, offset=o, data=self.block[o:o + CHUNK_BYTES])
                                for i in ids for o in range(0, BLOCK_BYTES, CHUNK_BYTES))
        if any(r.HasField("error") for r in reply.results):
            raise SystemExit(f"write: {reply}")
        if self.is_store:
            done = self.stub.Commit(kv.CommitRequest(parts=[kv.CommitPart(reservation_id=i) for i in ids]))
            if any(r.HasField("error") for r in done.results):
                raise SystemExit(f"commit: {done}")
        return len(ids) * BLOCK_BYTES

    def reserve(self, keys: list[bytes]) -> list[int]:
        """Slots for those of some first keys that are not there; waits where there is no room yet."""
        positions = [kv.PutPosition(key=key, parts=[kv.PutPart(length=BLOCK_BYTES)]) for key in keys]
        while True:
            reply = self.stub.Reserve(kv.ReserveRequest(handle=self.handle, positions=positions, unordered=True))
            if reply.lease_id:
                self.stub.Release(kv.ReleaseRequest(lease_ids=[reply.lease_id]))
            if not any(a.HasField("refused") for a in reply.answers):
                return [a.slot.reservation_id for a in reply.answers if a.HasField("slot")]
            time.sleep(0.005)


def measure(side: Side, way: str, seconds: float, in_flight: int, batch: int) -> float:
    """GB/s over a window, with so many calls in flight."""
    end = time.monotonic() + seconds

    def work() -> int:
        total = 0
        while time.monotonic() < end:
            if way == "get":
                total += side.get(random.sample(side.keys, batch))
            else:
                total += side.put([os.urandom(32) for _ in range(batch)])
        return total

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(in_flight) as pool:
        total = sum(pool.map(lambda _: work(), range(in_flight)))
    return total / (time.monotonic() - start) / 1e9


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kvkeepd")
    arguments.add_argument("bare")
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--in-flight", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--json")
    a = arguments.parse_args()
    sides = {"kvkeep": Side(a.kvkeepd, True), "bare": Side(a.bare, False)}
    for side in sides.values():
        side.fill()
        for way in ("get", "put"):
            measure(side, way, 0.5, a.in_flight, a.batch)  # warm-up, not counted
    report = {"schema": "kvkeep.bench.python-grpc", "version": 1, "grpcio": grpc.__version__, "block_bytes": BLOCK_BYTES,
              "batch": a.batch, "in_flight": a.in_flight, "seconds": a.seconds, "discard_rule": "none"}
    for way in ("get", "put"):
        pairs = []
        for _ in range(a.pairs):
            order = random.sample(list(sides), 2)
            pair = {name: measure(sides[name], way, a.seconds, a.in_flight, a.batch) for name in order}
            pairs.append({**pair, "ratio": pair["kvkeep"] / pair["bare"], "first": order[0], "load": os.getloadavg()[0]})
            if way == "put":
                sides["kvkeep"].fill()  # puts may have evicted what gets read
        medians = {key: statistics.median(pair[key] for pair in pairs) for key in ("kvkeep", "bare", "ratio")}
        report[way] = {**{f"{key}_median": value for key, value in medians.items()}, "pairs": pairs}
        print(f"{way}: kvkeep {medians['kvkeep']:.2f} GB/s, bare {medians['bare']:.2f} GB/s, ratio {medians['ratio']:.3f} "
              f"(median of {a.pairs} pairs, {a.in_flight} in flight, {a.batch} x {BLOCK_BYTES >> 20} MiB, "
              f"load {pairs[-1]['load']:.1f})")
    if a.json:
        with open(a.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()

"""How an engine talks to KVKeep with nothing but stock gRPC, and a test that it works.

    client.py HOST:PORT
"""

import os
import sys

import grpc

from kvkeep_stubs import blocks_pb2 as kv
from kvkeep_stubs import blocks_pb2_grpc, types_pb2

BLOCK_BYTES = 1_572_864  # 16 tokens of a 7B model in bf16
CHUNK_BYTES = 1 << 20


def connect(endpoint: str) -> blocks_pb2_grpc.BlocksStub:
    """A connection of its own, and who is on it. Without the second option gRPC lets channels of one process share
    theirs, also with one that was dropped a moment ago, and a connection belongs to one instance."""
    channel = grpc.insecure_channel(
        endpoint, [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)])
    store = blocks_pb2_grpc.BlocksStub(channel)
    store.Hello(kv.HelloRequest(major=1, instance_id=os.urandom(16)))
    return store


def example(endpoint: str, keys: list[bytes], blocks: list[bytes]) -> tuple[int, list[bytes]]:
    """Stores a chain of blocks and takes it back: the 20 lines of the README."""
    store = connect(endpoint)
    group = types_pb2.Group(all={}, tokens_per_block=16, shards=1, size={"exact": BLOCK_BYTES})
    model = types_pb2.Format(model="my-7b", dtype="bf16", layout="NHD", hash_algorithm="sha256", tokens_per_key=16,
                             topology={"canonical": True, "tp": 1, "pp": 1, "cp": 1}, groups=[group])
    ns = store.RegisterNamespace(kv.RegisterNamespaceRequest(name="chat", format=model, revision_digest="weights-1"))

    # Put: say what there is, send what is missing, make it visible.
    positions = [kv.PutPosition(key=k, parts=[kv.PutPart(length=len(b))]) for k, b in zip(keys, blocks)]
    reply = store.Reserve(kv.ReserveRequest(handle=ns.handle, positions=positions, **{"class": types_pb2.CLASS_DURABLE}))
    slots = [(a.slot.reservation_id, b) for a, b in zip(reply.answers, blocks) if a.HasField("slot")]
    store.Write(kv.WriteRequest(reservation_id=r, offset=o, data=b[o:o + CHUNK_BYTES])
                for r, b in slots for o in range(0, len(b), CHUNK_BYTES))
    done = store.Commit(kv.CommitRequest(parts=[kv.CommitPart(reservation_id=r) for r, _ in slots]))
    assert not any(r.HasField("error") for r in done.results), done

    # Match and get: how much of the prompt is here, and its bytes.
    query = kv.MatchQuery(request_id=b"request-1", handle=ns.handle, keys=keys, lease={"ttl_ms": 10_000})
    found = store.Match(kv.MatchRequest(queries=[query])).results[0]
    items = [kv.GetItem(key=k) for k in keys[:found.boundary_positions]]
    got = [bytearray() for _ in items]
    for r in store.Get(kv.GetRequest(handle=ns.handle, items=items, lease_id=found.lease.lease_id)):
        got[r.item] += r.data
    store.Release(kv.ReleaseRequest(lease_ids=[found.lease.lease_id]))
    return found.boundary_tokens, [bytes(block) for block in got]


def main() -> None:
    endpoint = sys.argv[1]
    keys = [os.urandom(32) for _ in range(6)]
    blocks = [os.urandom(BLOCK_BYTES) for _ in keys]
    tokens, got = example(endpoint, keys, blocks)
    assert tokens == 16 * len(keys), f"{tokens} tokens of {16 * len(keys)} matched"
    assert got == blocks, "what came back is not what was put"
    # A second engine, another connection: nothing is sent again, everything is there.
    tokens, got = example(endpoint, keys, blocks)
    assert tokens == 16 * len(keys) and got == blocks
    # Engines of one process, at once: a connection each.
    engines = [connect(endpoint) for _ in range(3)]
    assert all(engine.Stats(kv.StatsRequest()) for engine in engines)
    # An unknown chain is a miss and no error.
    tokens, got = example(endpoint, [os.urandom(32)], [bytes(BLOCK_BYTES)])
    assert tokens == 16 and got == [bytes(BLOCK_BYTES)]

    # Errors are typed: the trailer `kvkeep-error-bin` holds an ErrorDetail.
    store = blocks_pb2_grpc.BlocksStub(grpc.insecure_channel(endpoint, [("grpc.use_local_subchannel_pool", 1)]))
    try:
        store.Stats(kv.StatsRequest())
        raise AssertionError("a call without hello was answered")
    except grpc.RpcError as e:
        trailer = dict(e.trailing_metadata())["kvkeep-error-bin"]
        assert types_pb2.ErrorDetail.FromString(trailer).kind == "hello_required", e
    print(f"stock grpcio {grpc.__version__}: {3 * len(keys) + 1} blocks of {BLOCK_BYTES} bytes put, matched and read back")


if __name__ == "__main__":
    main()

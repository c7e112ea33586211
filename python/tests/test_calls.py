"""Matches, leases and the other verbs that wait."""

import pytest
from conftest import BLOCK, TOKENS, blocks, chain, layout

import kvkeep


def test_a_match_says_how_much_is_here_and_why_not_more(ns):
    keys = chain(8)
    assert ns.match(keys).reason == "never_stored"
    assert ns.put_from(keys[:5], blocks(5)).outcomes == bytes([kvkeep.STORED]) * 5
    found = ns.match(keys, statuses=True)
    assert (found.boundary_positions, found.boundary_tokens, found.reason) == (5, 5 * TOKENS, "never_stored")
    assert found.statuses == bytes([kvkeep.HIT] * 5 + [kvkeep.MISS] * 3)
    assert [kvkeep.TIERS[tier] for tier in found.tiers[:5]] == ["dram"] * 5
    assert found.bytes == 5 * BLOCK and found.lease is None and found.error is None
    assert ns.match(b"".join(keys), key_len=32).boundary_positions == 5
    assert ns.match(memoryview(b"".join(keys[:5])), key_len=32).reason is None
    assert ns.put_from(keys[:5], blocks(5)).outcomes == bytes([kvkeep.ALREADY_PRESENT]) * 5


def test_a_verdict_is_given_where_the_format_declares_its_cost(server):
    with server.namespace(layout(prefill_us_per_token=1000, prefill_doubles_at_tokens=1 << 20)) as ns:
        keys = chain(4)
        assert ns.put_from(keys, blocks(4)).all_kept
        found = ns.match(keys)
        assert found.recompute_seconds == pytest.approx(4 * TOKENS * 1000 / 1e6, rel=0.01)
        assert found.verdict in (None, "load", "recompute") and (found.load_seconds or 0) >= 0


def test_leases_are_taken_renewed_and_released(ns):
    keys = chain(4)
    assert ns.put_from(keys, blocks(4)).all_kept
    call = kvkeep.Call(
        "request 1", info=kvkeep.RequestInfo("chat", input_tokens=64, session=7, hint=30.0, priority=1), label="team"
    )
    assert call.request_id == b"request 1"
    found = ns.match(keys, lease=30, call=call)
    assert found.lease.positions == 4 and 0 < found.lease.ttl <= 30 and found.lease_id == found.lease.id
    assert ns.match(keys, lease=30, call=call).lease_id == found.lease_id, "the same request, the same lease"
    assert ns.get_into(keys, blocks(4), lease=found.lease_id, call=call).all_hit
    assert ns.renew(found.lease_id, ttl=10, call=call).id == found.lease_id
    lease, statuses = ns.lease(keys[1:], ttl=5, call=kvkeep.Call(b"request 2"))
    assert lease.positions == 3 and statuses == bytes([kvkeep.HIT]) * 3
    ns.release(found.lease_id)
    ns.release([lease.id], requests=["request 2"])
    ns.release()
    while ns.renew(lease.id) is not None:  # released soon, and without waiting
        pass


def test_many_chains_in_one_call(ns):
    one, two = chain(3), chain(3)
    assert ns.put_from(one, blocks(3)).all_kept
    queries = [
        kvkeep.Query(one, lease=5, request_id="a"),
        kvkeep.Query(b"".join(two), key_len=32, statuses=True, promote=True),
        kvkeep.Query([b"x" * 129]),
    ]
    found = ns.match_many(queries)
    assert [f.boundary_positions for f in found] == [3, 0, 0]
    assert found[0].lease is not None and found[1].lease is None
    assert [f.error and f.error.kind for f in found] == [None, None, "invalid_argument"]


def test_the_other_verbs(ns):
    keys = chain(3)
    assert ns.put_from(keys, blocks(3), cls="durable", keep=True, ttl=3600, priority=1).all_kept
    assert ns.touch(keys) == 3 and ns.touch(chain(2)) == 0
    assert sum(ns.prefetch(keys)) == 3
    assert ns.remove(keys[2:]) in [(1, 0, 0), (0, 0, 1)]
    assert ns.match(keys).boundary_positions == 2
    said = ns.describe()
    assert said["standing"] == "ready" and said["way"]["wire"] == "socket" and said["way"]["regions"]
    assert said["way"]["mapped"], said["text"]
    assert said["namespace"] == ns.name and bytes.fromhex(said["instance"]) == ns.instance
    assert ns.counters()["lost"] == 0 and ns.settle()
    assert repr(ns).startswith("Namespace(")


def test_a_chain_goes_on_behind_its_parent(ns):
    keys = chain(6)
    assert ns.put_from(keys[:3], blocks(3)).all_kept
    more = ns.put_from(keys[3:], blocks(3), parent=keys[2], first_position=3, token_ids=[list(range(TOKENS))] * 3)
    assert more.all_kept and (more.copies, more.degraded) == (1, False)
    assert ns.match(keys).boundary_positions == 6
    assert ns.put_from(chain(2), blocks(2), unordered=True).all_kept


def test_weights_that_changed_are_misses(server):
    client, keys, format = server.client(patience=5.0), chain(2), layout()
    with client.namespace("swapped", format, "old") as ns:
        assert ns.ready(30) and ns.put_from(keys, blocks(2)).all_kept
        assert ns.advance_revision("new")
        assert ns.match(keys).boundary_positions == 0
    with client.namespace("swapped", format, "old") as stale:
        try:
            stale.ready(30)
            raise AssertionError("the store holds KV of other weights, and says so")
        except kvkeep.Error as e:
            assert e.kind == "stale_revision"
        assert stale.match(keys).reason == "unreachable"


def test_every_way_carries_the_same_bytes(server):
    keys, written = chain(3), blocks(3)
    format = layout()
    http = next(f"http://{word.removeprefix('listen=')}" for word in server.ready.split() if word.startswith("listen="))
    for n, (endpoint, way) in enumerate([(server.endpoint, "socket"), (http, "port"), (http, "grpc")]):
        client = kvkeep.Client(endpoint, way=way, patience=5.0)
        with client.namespace("ways", format, "weights") as ns:
            assert ns.ready(30), ns.describe()["text"]
            assert ns.describe()["way"]["wire"] == way
            region = kvkeep.Region(3 * BLOCK)
            assert ns.register_region(region) == (way == "socket")
            if n == 0:
                assert ns.put_from(keys, written).all_kept
            view = memoryview(region)
            assert ns.get_into(keys, [view[i * BLOCK : (i + 1) * BLOCK] for i in range(3)]).all_hit
            assert view == b"".join(written)
            mine = chain(1)
            assert ns.put_from(mine, [view[:BLOCK]]).all_kept
            back = bytearray(BLOCK)
            assert ns.get_into(mine, [back]).all_hit and back == written[0]

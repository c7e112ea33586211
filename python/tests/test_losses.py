"""A store must never be worse than no store: a server that is lost is misses, soon, and never an exception."""

import fcntl
import tempfile
import time

import pytest
from conftest import BLOCK, blocks, chain, collect, eventually, layout

import kvkeep

# What a busy machine may add to a wait of 100 ms.
SLACK = 5.0


def every_verb_misses(ns: kvkeep.Namespace, keys: list[bytes]) -> None:
    """Each verb once; none raises, none takes long."""
    n = len(keys)
    region = kvkeep.Region(n * BLOCK)
    places = [region.place(i * BLOCK, BLOCK) for i in range(n)]
    began = time.monotonic()
    assert ns.match(keys, lease=5, statuses=True).statuses == bytes([kvkeep.MISS]) * n
    assert ns.match(keys).reason in ("unreachable", "late")
    assert [m.boundary_positions for m in ns.match_many([kvkeep.Query(keys)] * 2)] == [0, 0]
    got = ns.get_into(keys, places)
    assert got.hits == 0 and got.reason in ("unreachable", "late")
    assert ns.get_into(keys, [bytearray(BLOCK) for _ in keys]).hits == 0
    stored = ns.put_from(chain(n), places)
    assert stored.kept == 0 and stored.error.kind in ("unreachable", "late")
    assert ns.lease(keys) == (None, bytes([kvkeep.MISS]) * n)
    assert ns.renew(1) is None and ns.touch(keys) == 0
    ns.release(1, requests=[b"r"])
    assert ns.submit_get(keys, places) is not None
    assert ns.submit_put(keys, places) is not None
    assert ns.submit_match(kvkeep.Query(keys)) is not None
    for done in collect(ns, 0, 3):
        assert done.kind != "wrong" and not done.cancelled
    assert not ns.register_region(region, timeout=0.05)
    ns.settle(0.01)
    took = time.monotonic() - began
    assert took < SLACK, f"{took} s; {ns.describe()['text']}"


def hits(ns: kvkeep.Namespace, keys: list[bytes], written: list[bytearray]) -> bool:
    places = [bytearray(BLOCK) for _ in keys]
    if not ns.get_into(keys, places).all_hit:
        return False
    assert places == written, "a hit is what was put"
    return True


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_server_that_is_lost_is_misses_and_hits_again_when_it_is_back(own, how):
    with own.namespace(patience=0.1) as ns:
        keys, written = chain(4), blocks(4)
        # The server has 100 ms to give a sign of life, and on a busy machine may need more than one go.
        eventually(lambda: ns.put_from(keys, written, cls="durable").all_kept)
        eventually(lambda: hits(ns, keys, written))
        if how == "killed":
            own.kill()
        else:
            own.stop()
        every_verb_misses(ns, keys)
        assert ns.describe()["standing"] == "lost" and ns.describe()["why"]
        with pytest.raises(kvkeep.Error) as error:
            ns.sessions.get("nobody", call=kvkeep.Call(deadline=0.2))
        assert error.value.kind in ("unreachable", "late") and not ns.ready(0.05)
        if how == "killed":
            own.start()
        else:
            own.go_on()
        eventually(lambda: hits(ns, keys, written))
        assert ns.counters()["lost"] > 0


def test_no_server_at_all_is_misses(tmp_path):
    client = kvkeep.Client(f"unix:{tmp_path}/s")
    with client.namespace("n", layout(), "w") as ns:
        every_verb_misses(ns, chain(2))
        assert not ns.ready(0.05) and "Unix socket" in ns.describe()["why"]


@pytest.mark.parametrize("fault", ["refused", "silent", "miss"])
def test_faults_are_played(server, fault):
    with server.namespace(patience=0.1) as ns:
        keys, written = chain(2), blocks(2)
        eventually(lambda: ns.put_from(keys, written).all_kept)
        ns.inject(fault)
        for _ in range(3):
            assert ns.match(keys).boundary_positions == 0
            assert ns.get_into(keys, blocks(2)).hits == 0
        ns.inject("none")
        eventually(lambda: hits(ns, keys, written))


def test_a_deadline_is_kept(server):
    with server.namespace() as ns:
        ns.inject("silent")  # with a patience of 5 s
        began = time.monotonic()
        brief = kvkeep.Call(deadline=0.05)
        assert ns.match(chain(1), call=brief).reason == "late"
        assert ns.get_into(chain(1), blocks(1), call=brief).reason == "late"
        assert ns.put_from(chain(1), blocks(1), call=brief).error.kind == "late"
        assert time.monotonic() - began < 0.15 + SLACK


def test_a_local_endpoint_needs_nothing_started():
    with tempfile.TemporaryDirectory(prefix="kvk-") as folder:
        client = kvkeep.Client(f"local:{folder}?dram=64MiB&nvme=64MiB&idle=1", patience=5.0)
        keys, written = chain(2), blocks(2)
        with client.namespace("n", layout(), "w") as first, client.namespace("n", layout(), "w") as second:
            assert first.ready(60), first.describe()["text"]
            assert first.put_from(keys, written).all_kept and hits(first, keys, written)
            assert second.ready(60) and hits(second, keys, written), "two namespaces, one server"
        # Nobody is connected any more: it ends, and gives the folder back.
        with open(f"{folder}/lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

"""Calls that do not wait: tickets, completions, event descriptors, and threads beside them."""

import os
import select
import signal
import threading

import pytest
from conftest import BLOCK, blocks, chain, collect, layout

import kvkeep


def readable(*descriptors: int, timeout: float = 0) -> list[int]:
    return select.select(descriptors, [], [], timeout)[0]


def test_completions_come_in_their_own_queue_and_wake_who_watches(ns):
    keys, written = chain(4), blocks(4)
    first, second = ns.event_fd(0), ns.event_fd(1)
    assert readable(first, second) == []
    put = ns.submit_put(keys, written, queue=1, call=kvkeep.Call("put"))
    poller = select.poll()
    poller.register(second, select.POLLIN)
    assert poller.poll(30_000) and readable(first, second) == [second]
    (done,) = ns.poll(1)
    assert (done.ticket, done.kind, done.request_id, done.cancelled) == (put, "put", b"put", False)
    assert done.stored.all_kept and done.got is None and done.matched is None and done.error is None
    assert readable(second) == []
    query = kvkeep.Query(keys, lease=10)
    match = ns.submit_match([query, kvkeep.Query(chain(1))], queue=0, call=kvkeep.Call("match"))
    assert readable(first, timeout=30) == [first]
    (done,) = ns.poll()
    assert done.ticket == match and [m.boundary_positions for m in done.matched] == [4, 0]
    places = [bytearray(BLOCK) for _ in keys]
    get = ns.submit_get(keys, places, queue=0, lease=done.matched[0].lease_id)
    assert readable(first, timeout=30) == [first]
    os.read(first, 8)  # a watcher may read it, and need not
    (done,) = ns.poll()
    assert done.ticket == get and done.got.all_hit and places == written
    assert ns.poll() == [] and ns.wait(timeout=0.01) == []


def test_a_busy_queue_says_so(server):
    with server.namespace(queues=2, in_flight_max=2) as ns:
        query = kvkeep.Query(chain(1))
        assert None not in [ns.submit_match(query) for _ in range(2)]
        assert ns.submit_match(query) is None, "until it is polled"
        assert ns.submit_match(query, queue=1) is not None
        collect(ns, 0, 2)
        assert ns.submit_match(query) is not None
        assert ns.counters()["busy_refused"] == 1


def test_a_call_is_taken_back(ns):
    keys = chain(2)
    ns.inject("silent")
    places = [bytearray(BLOCK) for _ in keys]
    one = ns.submit_get(keys, places, call=kvkeep.Call("one"))
    ns.submit_get(chain(1), [bytearray(BLOCK)], call=kvkeep.Call("two"))
    ns.submit_put(chain(1), blocks(1), call=kvkeep.Call("two"))
    assert ns.cancel(one) and not ns.cancel(one)
    assert ns.cancel_request("two") == 2
    for done in collect(ns, 0, 3):
        assert done.cancelled
        if done.kind == "get":
            assert done.got.hits == 0 and done.got.reason == "cancelled" and done.got.in_doubt == []
        else:
            assert done.stored.error.kind == "cancelled"
    ns.inject("none")


def test_tickets_of_nobody_are_errors(ns):
    for ticket in (0, 1, 2**64 - 1):
        with pytest.raises(kvkeep.Error, match="no such ticket"):
            ns.cancel(ticket)


def test_what_is_wrong_with_a_submitted_call_comes_with_its_completion(ns):
    ns.submit_get([b"k" * 129], [bytearray(BLOCK)])
    (done,) = collect(ns, 0, 1)
    assert done.kind == "wrong" and done.error.kind == "invalid_argument"
    assert isinstance(done.error, kvkeep.Error) and "128" in str(done.error)


def test_threads_use_one_namespace_and_a_thread_that_waits_stops_nobody(server):
    with server.namespace(layout(), queues=4) as ns:
        failures: list[BaseException] = []

        def work(queue: int) -> None:
            try:
                for _ in range(10):
                    keys, written = chain(4), blocks(4)
                    assert ns.put_from(keys, written).all_kept
                    places = [bytearray(BLOCK) for _ in keys]
                    assert ns.submit_get(keys, places, queue=queue) is not None
                    (done,) = collect(ns, queue, 1)
                    assert done.got.all_hit and places == written
                    assert ns.match(keys).boundary_positions == 4
            except BaseException as e:
                failures.append(e)

        threads = [threading.Thread(target=work, args=(queue,)) for queue in range(1, 4)]
        # Waits for what does not come: with the GIL in its hands nobody else would get on.
        ended = threading.Event()

        def waits() -> None:
            ns.wait(0, timeout=600)
            ended.set()

        waiting = threading.Thread(target=waits, daemon=True)
        waiting.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures, failures
        assert not ended.is_set() and not any(thread.is_alive() for thread in threads)
        assert ns.submit_match(kvkeep.Query(chain(1))) is not None
        assert ended.wait(60)


def test_a_wait_can_be_interrupted(ns):
    for waits in (
        lambda: ns.wait(timeout=600),
        lambda: kvkeep.Client("unix:/nowhere").namespace("n", ns.format, "w").ready(600),
    ):
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt):
            waits()

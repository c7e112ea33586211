"""What is stored and removed, as it happens: waited for, interrupted, ended."""

import threading
import time

import pytest
from conftest import BLOCK, TOKENS, Server, blocks, chain, eventually, example, layout
from test_forks import run

import kvkeep


def snapshot(events: kvkeep.Events) -> list[kvkeep.Event]:
    """What is here."""
    seen: list[kvkeep.Event] = []
    for batch in events:
        seen += batch.events
        if batch.snapshot_end:
            return seen
    raise AssertionError("the stream ended before its snapshot did")


def until(events: kvkeep.Events, what: str, keys: list[bytes]) -> list[kvkeep.Event]:
    """Events until each of these keys has one of this kind."""
    seen: list[kvkeep.Event] = []
    while not {e.key for e in seen if e.what == what} >= set(keys):
        batch = events.next_batch(20)
        assert batch is not None and not batch.gap, f"{events!r} after {seen}"
        seen += batch.events
    return seen


def test_a_watcher_is_told_what_is_here_and_then_every_change(ns):
    keys = chain(4)
    assert ns.put_from(keys[:2], blocks(2)).all_kept
    with ns.watch_events(snapshot=True) as events:
        here = snapshot(events)
        assert {(e.key, e.position, e.sequence, e.what) for e in here} == {
            (keys[0], 0, 0, "stored"), (keys[1], 1, 0, "stored")
        }  # fmt: skip
        assert {e.handle for e in here} == {ns.describe()["handle"]}
        ids = [list(range(TOKENS))] * 2
        assert ns.put_from(keys[2:], blocks(2), parent=keys[1], first_position=2, token_ids=ids).all_kept
        third, fourth = [e for e in until(events, "stored", keys[2:]) if e.what == "stored"]
        assert (third.key, third.parent_key, third.position, third.token_ids) == (keys[2], keys[1], 2, ids[0])
        assert (fourth.bytes, fourth.tier, fourth.groups) == (BLOCK, "dram", [0])
        assert 0 < third.sequence < fourth.sequence and "stored" in repr(third)
        ns.remove(keys[3:])
        assert until(events, "removed", keys[3:])[-1].sequence > fourth.sequence
        assert events.next_batch(0.01) is None and not events.ended
    assert events.ended and events.next_batch(5) is None and list(events) == [] and "ended" in repr(events)
    with ns.watch_events(after_sequence=third.sequence) as again:
        told = until(again, "stored", keys[3:])
        assert all(e.sequence > third.sequence for e in told), "who comes back misses nothing and hears nothing twice"


def test_the_example_of_the_documentation(ns, capsys):
    keys = chain(2)
    assert ns.put_from(keys, blocks(2)).all_kept
    said: dict = {"kvkeep": kvkeep, "ns": ns}

    def end():
        eventually(lambda: "last" in said)
        said["events"].close()

    thread = threading.Thread(target=end)
    thread.start()
    exec(example("Events"), said)  # noqa: S102
    thread.join()
    assert f"stored {keys[0].hex()} 0 dram" in capsys.readouterr().out


def test_other_namespaces_are_told_of_where_it_is_asked_for(server, ns):
    with ns.watch_events(all_namespaces=True) as all_of_them, ns.watch_events() as own:
        keys = chain(1)
        with server.namespace() as other:
            assert other.put_from(keys, blocks(1)).all_kept
            (stored,) = [e for e in until(all_of_them, "stored", keys) if e.key == keys[0]]
            assert stored.handle == other.describe()["handle"] != ns.describe()["handle"]
        mine = chain(1)
        assert ns.put_from(mine, blocks(1)).all_kept
        assert {e.key for e in until(own, "stored", mine)} == set(mine)


def test_a_gap_is_a_value_and_a_snapshot_mends_it(tmp_path, monkeypatch):
    config = tmp_path / "kvkeepd.toml"
    config.write_text("[limits]\nevents_max = 16\n")
    monkeypatch.setenv("KVKEEP_CONFIG", str(config))
    server = Server()
    try:
        with server.namespace(layout(1024)) as ns:
            keys = chain(100)
            assert ns.put_from(keys, blocks(100, 1024)).all_kept
            with ns.watch_events(after_sequence=1) as events:
                batch = events.next_batch(20)
                assert batch is not None and batch.gap and batch.events == () and batch.sequence > 16
                assert ", gap" in repr(batch)
            with ns.watch_events(snapshot=True) as events:
                assert {e.key for e in snapshot(events)} == set(keys)
    finally:
        server.end()


@pytest.mark.parametrize("how", ["close", "namespace"])
def test_a_waiting_thread_is_told_of_the_end(server, how):
    with server.namespace() as ns:
        events, ended = ns.watch_events(), []
        thread = threading.Thread(target=lambda: ended.append(list(events)))
        thread.start()
        time.sleep(0.3)  # so that it waits; it is right also where it does not yet
        events.close() if how == "close" else ns.close()
        thread.join(30)
        assert ended == [[]] and events.next_batch(30) is None and events.ended
        events.close()


def test_waiting_lets_other_threads_run(ns):
    with ns.watch_events() as events:
        done = threading.Event()
        thread = threading.Thread(target=lambda: [events.next_batch(600), done.set()])
        thread.start()
        keys = chain(1)
        assert ns.put_from(keys, blocks(1)).all_kept, "no GIL is held by who waits"
        assert done.wait(60)
        thread.join()


def test_a_batch_that_comes_when_nobody_waits_is_not_lost(ns):
    with ns.watch_events() as events:
        told: set[bytes] = set()
        all_keys = [chain(1) for _ in range(50)]
        for keys in all_keys:
            batch = events.next_batch(0)
            told |= {e.key for e in batch.events} if batch else set()
            assert ns.put_from(keys, blocks(1)).all_kept
        missing = [keys[0] for keys in all_keys if keys[0] not in told]
        until(events, "stored", missing)


def test_watchers_that_are_dropped_give_their_place_back(own):
    """A server has places for 64 of them."""
    with own.namespace() as ns:
        for n in range(150):
            events = ns.watch_events(call=kvkeep.Call(deadline=30))
            assert events.next_batch(0) is None
            if n % 2:
                events.close()
            del events


def test_a_lost_server_is_an_error_and_the_next_one_is_watched(own):
    with own.namespace() as ns:
        events = ns.watch_events()
        own.kill()
        with pytest.raises(kvkeep.Error) as error:
            list(events)
        assert error.value.kind == "unreachable" and error.value.retryable and events.ended and list(events) == []
        with pytest.raises(kvkeep.Error) as error:
            ns.watch_events(call=kvkeep.Call(deadline=0.2))
        assert error.value.kind in ("unreachable", "late")
        own.start()
        assert ns.ready(30)

        def watch():
            try:
                return ns.watch_events(snapshot=True)
            except kvkeep.Error as e:
                assert e.retryable
                return None

        snapshot(eventually(watch))


def test_signals_interrupt_a_wait(server):
    run(
        server,
        """
        ns = namespace()
        events = ns.watch_events()
        for wait in (lambda: next(events), lambda: events.next_batch(600)):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                wait()
                raise AssertionError("nothing was stored")
            except KeyboardInterrupt:
                pass
        keys = chain(1)
        assert ns.put_from(keys, blocks(1)).all_kept
        assert next(events).events[0].key == keys[0], "and it goes on after that"
        """,
    )


def test_a_forked_child_has_no_stream_of_its_parents(server):
    run(
        server,
        """
        ns = namespace()
        events, keys = ns.watch_events(), chain(2)
        waiter = threading.Thread(target=lambda: [next(events) for _ in range(1)])
        waiter.start()

        def child():
            assert events.ended and list(events) == [] and events.next_batch(60) is None
            events.close()
            assert ns.ready(30)
            with ns.watch_events(snapshot=True) as own:
                for batch in own:
                    if batch.snapshot_end:
                        break

        in_child(child)
        assert ns.put_from(keys, blocks(2)).all_kept
        waiter.join(60)
        assert not waiter.is_alive() and not events.ended
        """,
    )


def test_an_interpreter_ends_while_a_thread_waits_for_events(server):
    begin = """
        ns = namespace()
        events = ns.watch_events()
        threading.Thread(target=lambda: list(events), daemon=True).start()
        time.sleep(0.2)
        """
    run(server, begin)
    run(server, begin + "\n        sys.exit(3)", code=3)

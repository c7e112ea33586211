"""Children that are forked or spawned, and interpreters that end while calls are in flight. Each in processes of its own."""

import os
import subprocess
import sys
import textwrap
import uuid

PRELUDE = """
import os, select, signal, sys, threading, time
from conftest import BLOCK, blocks, chain, collect, layout
import kvkeep

def namespace(patience=5.0, queues=1, ready=True):
    client = kvkeep.Client(sys.argv[1], patience=patience)
    ns = client.namespace(sys.argv[2], layout(), "weights", queues=queues)
    assert not ready or ns.ready(30), ns.describe()["text"]
    return ns

def in_child(work):
    '''Runs it in a forked child; 0: it came to its end.'''
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException as e:
            print("in the child:", repr(e), flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
"""


def run(server, script: str, *, code: int = 0) -> str:
    """Runs a script in a process of its own; what it printed. It is given a namespace that no other test uses."""
    program = PRELUDE + textwrap.dedent(script)
    paths = [os.path.dirname(__file__), *sys.path]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, server.endpoint, uuid.uuid4().hex],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True,
        timeout=120,
    )
    out = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == code, f"it ended with {done.returncode}:\n{out}"
    return out


def test_a_forked_child_begins_anew_and_its_parent_goes_on(server):
    run(
        server,
        """
        ns = namespace()
        keys, written = chain(3), blocks(3)
        region = kvkeep.Region(3 * BLOCK)
        view = memoryview(region)
        places = [view[n * BLOCK : (n + 1) * BLOCK] for n in range(3)]
        assert ns.put_from(keys, written).all_kept and ns.get_into(keys, places).all_hit
        parents, parents_fd = ns.instance, ns.event_fd()
        ticket = ns.submit_get(keys, places)

        def child():
            assert ns.instance != parents and ns.event_fd() != parents_fd
            assert ns.counters()["forks"] == 1
            assert ns.poll() == [], "the parent's completion stays the parent's"
            try:
                ns.cancel(ticket)
                raise AssertionError("a ticket of the parent")
            except kvkeep.Error as e:
                assert "no such ticket" in str(e)
            back = [bytearray(BLOCK) for _ in keys]
            assert ns.ready(30) and ns.get_into(keys, back).all_hit and back == written
            assert ns.submit_get(keys, places) is not None
            assert collect(ns, 0, 1)[0].got.all_hit
            assert view.tobytes() == b"".join(written)
            in_child(lambda: ns.ready(30) and ns.match(keys).boundary_positions == 3 or 1 / 0)

        in_child(child)
        (done,) = collect(ns, 0, 1)
        assert done.ticket == ticket and done.got.all_hit and ns.instance == parents
        assert ns.match(keys).boundary_positions == 3 and ns.counters()["forks"] == 0
        """,
    )


def test_a_fork_in_the_middle_of_everything(server):
    """Other threads call without pause while children are forked, which call too."""
    run(
        server,
        """
        ns = namespace(queues=2)
        keys, written = chain(4), blocks(4)
        assert ns.put_from(keys, written).all_kept
        end, failures = threading.Event(), []

        def work(queue):
            try:
                while not end.is_set():
                    places = [bytearray(BLOCK) for _ in keys]
                    assert ns.get_into(keys, places).all_hit and places == written
                    assert ns.submit_get(keys, places, queue=queue) is not None
                    assert collect(ns, queue, 1)[0].got.all_hit
            except BaseException as e:
                failures.append(e)

        def child():
            places = [bytearray(BLOCK) for _ in keys]
            assert ns.ready(30) and ns.get_into(keys, places).all_hit and places == written

        threads = [threading.Thread(target=work, args=(queue,)) for queue in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            in_child(child)
        end.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        """,
    )


def test_a_child_that_does_not_use_it_does_not_keep_its_parent_alive(server):
    run(
        server,
        """
        import socket

        def to_the_server():
            found = 0
            for number in os.listdir("/proc/self/fd"):
                try:
                    with socket.socket(fileno=os.dup(int(number))) as copy:
                        found += copy.getpeername() == sys.argv[1].removeprefix("unix:")
                except OSError:
                    pass  # it is none, or not connected
            return found

        ns = namespace()
        assert ns.match(chain(1)).reason == "never_stored" and to_the_server() > 0
        in_child(lambda: to_the_server() == 0 or 1 / 0)
        assert ns.match(chain(1)).reason == "never_stored"
        """,
    )


def test_a_process_of_its_own_makes_its_own(server):
    run(
        server,
        """
        import subprocess, worker
        ns = namespace()
        keys = chain(2)
        assert ns.put_from(keys, blocks(2)).all_kept
        program = [sys.executable, worker.__file__, *sys.argv[1:3], b"".join(keys).hex()]
        assert subprocess.run(program, check=True, timeout=60, capture_output=True).stdout == b"2\\n"
        """,
    )


def test_workers_of_pools(server):
    """Forked and spawned by the standard library, while their parent goes on."""
    run(
        server,
        """
        import multiprocessing, worker
        ns = namespace()
        keys = chain(2)
        assert ns.put_from(keys, blocks(2)).all_kept
        for method in ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                found = [pool.apply_async(worker.matches, (*sys.argv[1:3], b"".join(keys))) for _ in range(4)]
                assert [f.get(60) for f in found] == [2] * 4, method
        assert ns.match(keys).boundary_positions == 2
        """,
    )


def test_an_interpreter_ends_with_calls_in_flight(server):
    """By reaching its end, by sys.exit in the middle, and with threads that wait for ever: it neither hangs nor crashes."""
    begin = """
        ns = namespace()
        keys, written = chain(4), blocks(4)
        assert ns.put_from(keys, written).all_kept
        ns.inject("silent")
        places = [bytearray(BLOCK) for _ in keys]
        region = kvkeep.Region(4 * BLOCK)
        for _ in range(8):
            assert ns.submit_get(keys, places) is not None
            assert ns.submit_get(keys, [region.place(n * BLOCK, BLOCK) for n in range(4)]) is not None
        """
    waits = """
        for _ in range(3):
            threading.Thread(target=lambda: ns.wait(0, timeout=600), daemon=True).start()
            threading.Thread(target=lambda: [ns.get_into(keys, places) for _ in range(1000)], daemon=True).start()
        time.sleep(0.2)
        """
    run(server, begin)
    run(server, begin + "\n        sys.exit(3)", code=3)
    run(server, begin + waits)
    run(server, begin + waits.replace("ns.wait(0, timeout=600)", "ns.match(keys)"))
    run(server, begin + "\n        del ns, places, region")


def test_a_namespace_may_die_in_a_cycle(server):
    run(
        server,
        """
        import gc
        ns = namespace()
        cycle = [ns]
        cycle.append(cycle)
        ns.submit_get(chain(1), [bytearray(BLOCK)])
        del ns, cycle
        gc.collect()
        threads = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
        assert "kvkeep-engine" not in threads, threads
        """,
    )

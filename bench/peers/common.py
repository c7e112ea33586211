"""What the peer programs of `kvkeep-bench peers` share: the line protocol, servers that end with us, measuring.

A program is started once and lives through all rounds. On its standard output it writes one JSON object a line:

    {"ready": true, "version": "...", "paths": [{"path", "way", "batch"}]}      it serves; or
    {"missing": "why"}                                                         it cannot, and ends
    {"bytes", "seconds", "cpu_seconds", "latencies_us"}                        the answer to `measure NUMBER SECONDS`
    {"error": "why"}                                                           that measurement failed

When its standard input ends, it kills the servers that it started and ends, whatever else it is doing: the bench may have
been killed without a word.
"""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

BLOCK_BYTES = 1 << 20
WORKING_SET_BYTES = 256 << 20
BLOCKS = WORKING_SET_BYTES // BLOCK_BYTES
BATCH = 64
# Longest wait for a server to answer, seconds.
SERVER_WAIT = 60
# Removing and topping up between two parts of a measurement is not timed, but it must end some time.
UNTIMED_WAIT = 30

_TICKS = os.sysconf("SC_CLK_TCK")
_servers = []
_ending = threading.Lock()


class Missing(Exception):
    """What this program needs is not installed."""


def free_port():
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(*command, env=None):
    """Starts a server; it is killed with this program. Its output goes to our standard error."""
    server = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        env={**os.environ, **(env or {})},
    )
    _servers.append(server)
    return server


def wait_for_port(port, server):
    """Returns when somebody listens on the port."""
    ends = time.monotonic() + SERVER_WAIT
    while time.monotonic() < ends:
        if server.poll() is not None:
            raise RuntimeError(f"{server.args[0]} ended with {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{server.args[0]} does not listen on port {port}")


def need_program(name):
    """The path of a program, or `Missing`."""
    found = shutil.which(name)
    if not found:
        raise Missing(f"no program {name}")
    return found


def _server_cpu(server):
    try:
        with open(f"/proc/{server.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _cpu_seconds():
    """Of this program and the servers that it started."""
    return time.process_time() + sum(map(_server_cpu, _servers))


class Stretch:
    """Collects calls until their times add up to the window; what happens between two calls is not counted."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.latencies = []
        self.spent = 0.0
        self.bytes = 0
        self.cpu = 0.0

    def going(self):
        """Is there time left? The first call is always made."""
        return self.spent < self.seconds or not self.latencies

    def call(self, size, function, *args):
        """Times one call that moves so many bytes; answers what the call answers."""
        began = time.perf_counter()
        answer = function(*args)
        took = time.perf_counter() - began
        self.latencies.append(round(took * 1e6, 1))
        self.spent += took
        self.bytes += size
        return answer

    def counting_cpu(self):
        """A block whose CPU time counts."""
        return _Cpu(self)

    def report(self):
        """As the bench reads it."""
        return {
            "bytes": self.bytes,
            "seconds": self.spent,
            "cpu_seconds": self.cpu,
            "latencies_us": self.latencies,
        }


class _Cpu:
    def __init__(self, stretch):
        self.stretch = stretch

    def __enter__(self):
        self.began = _cpu_seconds()

    def __exit__(self, *_):
        self.stretch.cpu += _cpu_seconds() - self.began


def _end(status):
    # Both the watcher of standard input and the main thread may come here; the first one ends the program.
    _ending.acquire()
    for server in _servers:
        server.kill()
    for server in _servers:
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            pass
    os._exit(status)


def run(start):
    """Runs a program: `start()` answers its version and its paths, a list of (description, function of Stretch)."""
    # What a library prints goes to standard error; only answers go where the bench reads.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines = queue.SimpleQueue()

    def watch():
        for line in sys.stdin:
            lines.put(line)
        _end(0)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _end(0))

    def say(answer):
        print(json.dumps(answer), file=out, flush=True)

    try:
        version, paths = start()
    except (Missing, ImportError) as why:
        say({"missing": str(why)})
        _end(0)
    except Exception as why:
        say({"missing": f"it does not start: {why!r}"})
        _end(0)
    say({"ready": True, "version": version, "paths": [description for description, _ in paths]})
    while True:
        words = lines.get().split()
        try:
            if len(words) != 3 or words[0] != "measure":
                raise ValueError(f"not a command: {words}")
            stretch = Stretch(float(words[2]))
            paths[int(words[1])][1](stretch)
            say(stretch.report())
        except Exception as why:
            say({"error": repr(why)})


def one_by_one(call):
    """A measurement that makes one call per block, in turn through the working set, going on where the last one ended."""
    at = 0

    def measure(stretch):
        nonlocal at
        with stretch.counting_cpu():
            while stretch.going():
                at = (at + 1) % BLOCKS
                stretch.call(BLOCK_BYTES, call, at)

    return measure


def path(name, way, batch=1):
    """Describes a path."""
    return {"path": name, "way": way, "batch": batch}

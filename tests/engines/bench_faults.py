"""A server that fails: what the engine feels of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from bench_speed import first_token, ms, pairwise, ratio
from black_hole import Way
from harness import BLOCK, Engine, Server, connector, free_port, wait_until

if TYPE_CHECKING:
    from bench import Bench

SLOW_BYTES_PER_S = 200_000_000
"""Of the disk in `slow_disk` and `holds`."""
PROBE = 4 * BLOCK + 1
"""Tokens of the prompt by which we see whether there are hits again: short, or a miss would take a second itself."""


def gone(bench: Bench) -> dict:
    """The server stopped, and killed."""
    server = bench.server
    return {
        "stopped": _lost(bench, bench.engine, server, server.pause, server.resume),
        "killed": _lost(bench, bench.engine, server, server.kill, server.start),
    }


def black_hole(bench: Bench) -> dict:
    """The server on the other side of a network that loses everything."""
    bench.rest()
    ports = [free_port(), free_port()]
    with (
        closing(Server(bench.folder / "behind", dram="2GiB", nvme="4GiB", ports=ports).start()) as server,
        closing(Way(ports)) as way,
        closing(bench.start("behind", connector(f"127.0.0.2:{ports[0]}"))) as engine,
    ):
        engine.warm_up()
        return _lost(bench, engine, server, way.swallow, way.restore)


def _lost(bench: Bench, engine: Engine, server: Server, off, on) -> dict:
    """What requests and the scheduler feel of a server that is gone, and when there are hits again."""
    tokens = bench.new(PROBE)
    engine.reset()
    engine.generate(tokens, 1)
    server.wait_quiet()
    engine.reset()
    assert first_token(engine, tokens)[1] > 0
    before = engine.metrics()
    off()
    times = []
    for _ in range(4):
        engine.reset()
        times.append(first_token(engine, bench.new(1024))[0])
    on()
    back = time.monotonic()
    asked = 0

    def hit() -> bool:
        nonlocal asked
        asked += 1
        engine.reset()
        return first_token(engine, tokens)[1] > 0

    wait_until(hit, 60, "hits again", every=0)
    seconds = time.monotonic() - back
    after = engine.metrics()
    steps, waits = (_between(before, after, f"vllm:kvkeep_{name}_seconds") for name in ("scheduler", "match"))
    out = {
        "ttft_ms": ms(times),
        "hits_again_within_s": round(seconds, 2),
        "prompts_asked_until_then": asked,
        "scheduler_steps": steps["count"],
        "scheduler_steps_over_5_ms": _count(after, "slow_steps") - _count(before, "slow_steps"),
        "scheduler_seconds_buckets": steps["buckets"],
        "lookup_seconds_buckets": waits["buckets"],
    }
    print(out, flush=True)
    return out


def slow_disk(bench: Bench) -> dict:
    """Everything on a disk of 200 MB/s: new prompts, which are saved to it, and old ones, which come from it."""
    bench.rest()
    rows = []
    with (
        closing(_slow_server(bench)) as server,
        closing(bench.start("slow", connector(server.endpoint))) as engine,
    ):
        engine.warm_up()
        for length in (1024, 2048, 4096):
            plain, new, old, cached = [], [], [], []
            prompts = []
            for n in range(3):
                prompts.append(bench.new(length))
                order = [(plain, bench.plain, bench.new(length)), (new, engine, prompts[-1])]
                for times, one, tokens in order if n % 2 else order[::-1]:
                    one.reset()
                    times.append(first_token(one, tokens)[0])
            server.wait_quiet(120)
            # DRAM is forgotten; the warm set of a restart is read back only where it is asked for.
            server.lose_power()
            server.start()
            engine.warm_up()
            for tokens in prompts:
                engine.reset()
                seconds, found = first_token(engine, tokens)
                old.append(seconds)
                cached.append(found)
            rows.append(
                {
                    "prompt_tokens": length,
                    "plain_ms": ms(plain),
                    "new_ms": ms(new),
                    "new_over_plain": pairwise(new, plain),
                    "new_over_plain_mean": ratio(statistics.mean(new), statistics.mean(plain)),
                    "old_ms": ms(old),
                    "old_over_plain_mean": ratio(statistics.mean(old), statistics.mean(plain)),
                    "restored_tokens": cached,
                }
            )
            print(rows[-1], flush=True)
    return {"disk_bytes_per_s": SLOW_BYTES_PER_S, "rows": rows}


def holds(bench: Bench) -> dict:
    """The worst case for the engine's own memory: saves as slow as that disk (class `durable`), and a KV pool that the two prompts of a
    round need half of."""
    bench.rest()
    small = {"num_gpu_blocks_override": 8192 // BLOCK, "max_model_len": 4096}
    with (
        closing(_slow_server(bench)) as server,
        closing(bench.start("holds", connector(server.endpoint, cls="durable"), **small)) as engine,
    ):
        engine.warm_up()
        before = engine.metrics()
        times = [engine.generate([bench.new(2048) for _ in range(2)], 1)["seconds"] for _ in range(16)]
        server.wait_quiet(120)
        after = engine.metrics()
    held = _between(before, after, "vllm:kvkeep_hold_seconds")
    out = {
        "prompts": 32,
        "seconds_of_two": ms(times),
        "holds": held["count"],
        "hold_seconds_buckets": held["buckets"],
        "hold_p99_at_most_s": _quantile(held["buckets"], 0.99),
        "saved_blocks": _count(after, "save_blocks") - _count(before, "save_blocks"),
        "abandoned_blocks": _count(after, "save_abandoned_blocks") - _count(before, "save_abandoned_blocks"),
    }
    print(out, flush=True)
    return out


def _slow_server(bench: Bench) -> Server:
    shim = bench.folder / "throttle.so"
    source = Path(__file__).with_name("throttle.c")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
    folder = bench.folder / f"slow-{time.monotonic_ns()}"
    environment = {"KVKEEP_NO_IO_URING": "true", "THROTTLE_BYTES_PER_S": str(SLOW_BYTES_PER_S)}
    return Server(folder, dram="2GiB", nvme="4GiB", preload=str(shim), **environment).start()


def _count(metrics: dict, name: str) -> int:
    return int(metrics.get(f"vllm:kvkeep_{name}", 0))


def _between(before: dict, after: dict, name: str) -> dict:
    """Of a histogram: how many samples, and the cumulative buckets, since `before`."""
    a, b = (m.get(name, {"count": 0, "buckets": {}}) for m in (before, after))
    return {
        "count": int(b["count"] - a["count"]),
        "buckets": {bound: n - a["buckets"].get(bound, 0) for bound, n in b["buckets"].items()},
    }


def _quantile(buckets: dict, q: float) -> float | None:
    """The least bound that so many lie under."""
    total = max(buckets.values(), default=0)
    return next((float(bound) for bound, n in buckets.items() if total and n >= q * total), None)

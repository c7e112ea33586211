"""Gets of 64 blocks of 1 MiB into a region, and matches of 4,096 keys, through Python and through Rust, in pairs.

    PROFILE=release python/tests/run.sh bench [--pairs 41] [--window-ms 100] [--json FILE]

The Rust side is the program that `cargo build --release -p kvkeep-client --example engine_speed` makes. A node is started with the
`kvkeepd` that KVKEEP_KVKEEPD names. The order of each pair is drawn; medians of all windows, the best ones, and their ratios.
Floor of a get: one copy by the server from its arena into the region.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time

import kvkeep

BLOCK, BLOCKS, KEYS = 1 << 20, 64, 4096
LAYOUT = kvkeep.Format(
    "bench",
    [kvkeep.Group(16, BLOCK)],
    dtype="bf16",
    layout="bench",
    hash_algorithm="counter",
    tokens_per_key=16,
)
JOINED = b"".join(b"%032d" % n for n in range(KEYS))


class Python:
    """This package."""

    def __init__(self, ns: kvkeep.Namespace, window: float):
        self.ns, self.window = ns, window
        self.region = kvkeep.Region(BLOCKS * BLOCK)
        self.geometry = kvkeep.Geometry([(self.region.place(0, BLOCK), BLOCK)], BLOCKS)
        self.ids = list(range(BLOCKS))
        assert ns.register_region(self.region)

    def get(self) -> float:
        """GB/s of one window."""
        keys, rounds, began = JOINED[: 32 * BLOCKS], 0, time.perf_counter()
        while time.perf_counter() - began < self.window:
            assert self.ns.get_into(keys, self.geometry, self.ids, key_len=32).all_hit
            rounds += 1
        return rounds * BLOCKS * BLOCK / (time.perf_counter() - began) / 1e9

    def match(self) -> tuple[float, float]:
        """p50 and p99 of one window, ms."""
        took, began = [], time.perf_counter()
        while time.perf_counter() - began < self.window:
            one = time.perf_counter()
            found = self.ns.match(JOINED, key_len=32)
            took.append((time.perf_counter() - one) * 1e3)
            assert found.boundary_positions == BLOCKS
        took.sort()
        return took[len(took) // 2], took[min(len(took) * 99 // 100, len(took) - 1)]


class Rust:
    """The Rust client, in a process of its own."""

    def __init__(self, program: str, endpoint: str, window: float):
        command = [program, endpoint, "bench", str(int(window * 1e3))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, what: str) -> list[float]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return [float(n) for n in self.process.stdout.readline().split()]

    def get(self) -> float:
        """GB/s of one window."""
        return self._ask("get")[0]

    def match(self) -> tuple[float, float]:
        """p50 and p99 of one window, ms."""
        p50, p99 = self._ask("match")
        return p50, p99


def main() -> None:
    """Puts the blocks, measures, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine_speed")
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--window-ms", type=int, default=100)
    parser.add_argument("--json")
    said = parser.parse_args()
    window = said.window_ms / 1e3
    with tempfile.TemporaryDirectory(prefix="kvk-") as folder:
        endpoint = f"local:{folder}?dram=512MiB&nvme=64MiB&idle=5"
        client = kvkeep.Client(endpoint, patience=5.0)
        with client.namespace("bench", LAYOUT, "weights") as ns:
            assert ns.ready(60), ns.describe()["text"]
            blocks = [os.urandom(BLOCK) for _ in range(BLOCKS)]
            assert ns.put_from(JOINED[: 32 * BLOCKS], blocks, key_len=32).all_kept
            sides = {"python": Python(ns, window), "rust": Rust(said.engine_speed, endpoint, window)}
            found: dict[str, dict[str, list]] = {name: {"get": [], "match": []} for name in sides}
            for side in sides.values():  # warm
                side.get(), side.match()
            for _ in range(said.pairs):
                for name in random.sample(sorted(sides), 2):
                    found[name]["get"].append(sides[name].get())
                    found[name]["match"].append(sides[name].match())
            sides["rust"].process.stdin.close()
            sides["rust"].process.wait()
    median = statistics.median
    report = {"pairs": said.pairs, "load_average": os.getloadavg()[0]}
    # Best windows are those that other programs disturbed least.
    for kind, gets in (("median", median), ("best", max)):
        rates = {name: gets(f["get"]) for name, f in found.items()}
        report[f"get_gb_per_s_{kind}"] = {name: round(rate, 2) for name, rate in rates.items()}
        report[f"get_python_over_rust_{kind}"] = round(rates["python"] / rates["rust"], 3)
    for kind, matches in (("median", median), ("best", min)):
        report[f"match_4096_ms_{kind}"] = {
            name: {p: round(matches(m[i] for m in f["match"]), 3) for i, p in enumerate(("p50", "p99"))}
            for name, f in found.items()
        }
    text = json.dumps(report, indent=2)
    print(text)
    if said.json:
        with open(said.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()

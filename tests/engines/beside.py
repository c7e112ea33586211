"""KVKeep beside what vLLM and LMCache have of their own: the same requests, the same bytes of DRAM and disk, an engine each.

    tests/engines/run bench beside                          all subjects, four pieces of the trace, then with ample disk (45 minutes)
    KVKEEP_BESIDE=kvkeep,native tests/engines/run bench beside      some, the first 30 requests of the first piece

The requests are those of coding agents (../shared/traces/agentic_coding.jsonl.zst, beside the repository), 1/16 as long: a block of the
trace is a block of the engine. Without the trace they are made up, of the same shape. What leaves a store that is too small is much a
matter of chance in a piece of 100 requests, hence four of them, two hours apart. vLLM's `fs` tier cannot be
given a bound, so there is a second comparison in which nothing has to leave the disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import BLOCK, VOCABULARY, Engine, Server, connector, wait_until

TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "agentic_coding.jsonl.zst"
HOURS, BEFORE, LONGEST, REQUESTS = (1, 3, 5, 7), 0, 131_072, 100
"""Of the trace: when the pieces begin, and one that is only learned from; the longest prompt that a session may have; how many requests
a piece has."""
TRACE_BLOCK = 512
SHARED_BLOCKS = 24
"""Blocks at the beginning that all sessions share, the prompt of the system and its tools: the trace hides that they do."""
RAW = Path(__file__).resolve().parents[2] / "target" / "engines"
"""What each request and the server's counters said, to look for reasons."""
MODEL, KV_BYTES_PER_TOKEN = "small", 8192
ENGINE_BLOCKS = 576
"""Of the engine's own KV: two of the longest prompts."""
AT_ONCE = 2
DRAM_SHARE, DISK_SHARE, AMPLE_DISK_SHARE = 1 / 3, 1 / 2, 5 / 4
"""Of all different blocks of the requests."""
MIB = 1 << 20


@dataclass(frozen=True)
class Workload:
    source: str
    requests: list[dict]
    sessions: int
    unique_blocks: int
    disk_share: float = DISK_SHARE

    @property
    def dram_bytes(self) -> int:
        return self._part(DRAM_SHARE)

    @property
    def disk_bytes(self) -> int:
        return self._part(self.disk_share)

    def _part(self, share: float) -> int:
        return int(share * self.unique_blocks * BLOCK * KV_BYTES_PER_TOKEN) // (2 * MIB) * 2 * MIB

    def describe(self) -> dict:
        lengths = sorted(len(r["prompt"]) for r in self.requests)
        return {
            "source": self.source,
            "requests": len(self.requests),
            "sessions": self.sessions,
            "prompt_tokens": sum(lengths),
            "prompt_tokens_median": lengths[len(lengths) // 2],
            "prompt_tokens_max": lengths[-1],
            "generated_tokens": sum(r["max_tokens"] for r in self.requests),
            "unique_bytes": self.unique_blocks * BLOCK * KV_BYTES_PER_TOKEN,
            "engine_bytes": ENGINE_BLOCKS * BLOCK * KV_BYTES_PER_TOKEN,
            "dram_bytes": self.dram_bytes,
            "disk_bytes": self.disk_bytes,
            "at_once": AT_ONCE,
        }


def workloads(hours: tuple[int, ...]) -> list[Workload]:
    if TRACE.exists():
        return [
            _workload(f"agentic_coding, hour {hour}", rows) for hour, rows in zip(hours, _of_trace(hours), strict=True)
        ]
    print(f"engines: beside: no {TRACE}: the requests are made up", file=sys.stderr, flush=True)
    return [_workload(f"made up, seed {seed}", _made_up(seed)) for seed in hours]


def _workload(source: str, rows: list[dict]) -> Workload:
    requests = []
    for row in rows:
        tokens = [token for position, block in enumerate(row["blocks"]) for token in _tokens(position, block)]
        # Of a prompt of whole blocks some compute the last block again, some the last token, which rounds otherwise.
        length = row["length"] - (row["length"] % BLOCK == 0)
        requests.append({"prompt": tokens[:length], "max_tokens": row["generated"], "session": row["session"]})
    different = {
        b if n >= SHARED_BLOCKS else n - SHARED_BLOCKS for row in rows for n, b in enumerate(row["blocks"][:-1])
    }
    return Workload(source, requests, len({r["session"] for r in requests}), len(different))


def _tokens(position: int, block: int) -> list[int]:
    rng = random.Random(f"shared {position}" if position < SHARED_BLOCKS else f"block {block}")
    return [rng.randrange(16, VOCABULARY - 16) for _ in range(BLOCK)]


def _of_trace(hours: tuple[int, ...]) -> list[list[dict]]:
    text = subprocess.run(["zstd", "-dc", TRACE], capture_output=True, check=True, text=True).stdout
    all_rows = [json.loads(line) for line in text.splitlines()]
    longest: dict[int, int] = {}
    for row in all_rows:
        longest[row["session"]] = max(longest.get(row["session"], 0), row["input_length"])
    rows = [row for row in all_rows if longest[row["session"]] <= LONGEST]
    pieces = ([row for row in rows if row["timestamp"] >= hour * 3_600_000][:REQUESTS] for hour in hours)
    return [[_scaled(row) for row in piece] for piece in pieces]


def _scaled(row: dict) -> dict:
    scale = TRACE_BLOCK // BLOCK
    return {
        "session": row["session"],
        "blocks": row["hash_ids"],
        "length": row["input_length"] // scale,
        "generated": min(32, max(16, row["output_length"] // scale)),
    }


def _made_up(seed: int) -> list[dict]:
    """Sessions that grow by a few blocks a turn and come in bursts; now and then the end of a context is written anew."""
    rng, fresh, rows = random.Random(seed), iter(range(1, 1 << 30)), []
    contexts = [[next(fresh) for _ in range(rng.randrange(60, 160))] for _ in range(20)]
    while len(rows) < REQUESTS:
        session = rng.randrange(len(contexts))
        for _ in range(rng.randrange(1, 7)):
            blocks = contexts[session]
            if rng.random() < 0.1:
                del blocks[-rng.randrange(1, 12) :]
            blocks += [next(fresh) for _ in range(rng.randrange(1, 8))]
            if len(blocks) > LONGEST // TRACE_BLOCK:
                break
            length = len(blocks) * BLOCK - rng.randrange(1, BLOCK)
            rows.append(
                {"session": session, "blocks": list(blocks), "length": length, "generated": rng.randrange(16, 33)}
            )
    return rows[:REQUESTS]


# Subjects.


@dataclass
class Subject:
    """What an engine is started with, and where it keeps its files."""

    what: str
    kv: dict | None
    folder: Path
    environment: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    server: Server | None = None
    learned: Path | None = None
    """Where its policy's snapshot goes at the end."""


def kvkeep(w: Workload, folder: Path, **environment: str) -> Subject:
    server = Server(folder / "kvkeep", dram=str(w.dram_bytes), nvme=str(w.disk_bytes), **environment).start()
    return Subject("KVKeep: its connector and a kvkeepd", connector(server.endpoint), folder, server=server)


def kvkeep_lru(w: Workload, folder: Path) -> Subject:
    """With the simpler policy: what the learned one is worth in a run so short that it has hardly learned anything."""
    subject = kvkeep(w, folder, KVKEEP_POLICY="lru")
    subject.what += ' with `policy = "lru"`'
    return subject


def kvkeep_learned(w: Workload, folder: Path) -> Subject:
    """As a node that has run for a while: it begins empty, with what the policy learned in the pieces before."""
    learned, data = folder.parent / "learned-policy", folder / "kvkeep"
    if learned.exists():
        data.mkdir()
        shutil.copy(learned, data / "policy")
    subject = kvkeep(w, folder)
    subject.what += " whose policy learned from earlier pieces"
    subject.learned = learned
    return subject


def native(w: Workload, folder: Path) -> Subject:
    tiers = {
        "spec_name": "CpuOffloadingSpec",
        "spec_module_path": "cpu_offload",
        "cpu_bytes_to_use": w.dram_bytes,
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder / "files")}],
    }
    kv = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": tiers}
    return Subject("vLLM's OffloadingConnector: CPU and `fs` tiers (a)", kv, folder)


def lmcache(w: Workload, folder: Path, chunk: int = 256) -> Subject:
    kv = {
        "kv_connector": "LMCacheConnectorV1",
        "kv_connector_module_path": "cpu_lmcache",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    environment = {
        "LMCACHE_CHUNK_SIZE": str(chunk),
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(w.dram_bytes / 2**30),
        "LMCACHE_LOCAL_DISK": f"file://{folder}/files/",
        "LMCACHE_MAX_LOCAL_DISK_SIZE": str(w.disk_bytes / 2**30),
        # Else the page cache holds its files, too: DRAM that the others do not have.
        "LMCACHE_EXTRA_CONFIG": json.dumps({"use_odirect": True}),
        "LMCACHE_TRACK_USAGE": "false",
    }
    what = f"LMCache's LMCacheConnectorV1: CPU and disk, chunks of {chunk} tokens (b)"
    return Subject(what, kv, folder, environment, {"disable_hybrid_kv_cache_manager": True})


def lmcache_fine(w: Workload, folder: Path) -> Subject:
    return lmcache(w, folder, BLOCK)


def none(w: Workload, folder: Path) -> Subject:
    return Subject("no store", None, folder)


SUBJECTS = {
    "kvkeep": kvkeep,
    "kvkeep_learned": kvkeep_learned,
    "kvkeep_lru": kvkeep_lru,
    "native": native,
    "lmcache": lmcache,
    "lmcache_fine": lmcache_fine,
    "none": none,
}
TIGHT_ONLY = {"kvkeep_learned", "kvkeep_lru"}
"""Where nothing has to leave, a policy decides nothing of the disk."""


# Measuring.


def measure(w: Workload, name: str, root: Path) -> dict:
    """One engine, from its start to its end."""
    folder = root / name
    folder.mkdir()
    subject = SUBJECTS[name](w, folder)
    (folder / "files").mkdir()
    engine = Engine(
        MODEL,
        subject.kv,
        log=root / f"{name}.log",
        environment=subject.environment,
        num_gpu_blocks_override=ENGINE_BLOCKS,
        max_model_len=LONGEST // (TRACE_BLOCK // BLOCK) + 64,
        max_num_batched_tokens=512,
        **subject.settings,
    )
    try:
        engine.start()
        if subject.server:
            engine.warm_up()
        else:
            engine.generate(w.requests[0]["prompt"][-200:], 8)
        engine.reset()
        before, load = _written(engine, subject), os.getloadavg()[0]
        processes = {"engine": engine} | ({"kvkeepd": subject.server} if subject.server else {})
        used = {name: -process.cpu_seconds() for name, process in processes.items()}
        said = engine.replay(w.requests, AT_ONCE)
        used = {name: round(used[name] + process.cpu_seconds(), 1) for name, process in processes.items()}
        written = _settled(engine, subject) - before
        result = {
            "what": subject.what,
            "seconds": round(said["seconds"], 1),
            "prompt_tokens": sum(len(r["prompt"]) for r in w.requests),
            "outputs": said["outputs"],
            "disk_bytes_written": written,
            "disk_bytes_used": sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()),
            "cpu_seconds": used,
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        }
        if subject.server:
            result["counters"] = _counters(engine, subject.server)
        if subject.learned:
            subject.server.stop()
            shutil.copy(subject.server.folder / "policy", subject.learned)
        return result
    finally:
        engine.close()
        if subject.server:
            subject.server.close()
        shutil.rmtree(folder, ignore_errors=True)


def _figures(runs: list[dict]) -> dict:
    """Of all requests of these runs; bytes and seconds of them together, but for what was on disk: at most."""
    outputs = [o for run in runs for o in run["outputs"]]
    first = [o["first_token_seconds"] for o in outputs]
    between = [s for o in outputs for s in o["between_seconds"]]
    return {
        "hit_share": round(sum(o["cached"] for o in outputs) / sum(run["prompt_tokens"] for run in runs), 4),
        "ttft_ms": {"p50": _ms(first, 50), "p95": _ms(first, 95), "mean": round(1e3 * statistics.mean(first), 1)},
        "between_tokens_ms": {"p50": _ms(between, 50), "p99": _ms(between, 99)},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "disk_bytes_written": sum(run["disk_bytes_written"] for run in runs),
        "disk_bytes_used": max(run["disk_bytes_used"] for run in runs),
        "cpu_seconds": round(sum(sum(run["cpu_seconds"].values()) for run in runs), 1),
    }


def _ms(seconds: list[float], percent: int) -> float:
    return round(1e3 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1], 1)


def _written(engine: Engine, subject: Subject) -> int:
    return engine.disk_bytes_written() + (subject.server.disk_bytes_written() if subject.server else 0)


def _settled(engine: Engine, subject: Subject) -> int:
    """Bytes written to disk when nothing has been for a second and a half."""
    seen = []

    def still() -> bool:
        seen.append(_written(engine, subject))
        return len(seen) > 3 and seen[-1] - seen[-4] < MIB

    wait_until(still, 60, "nothing is written any more", every=0.5)
    return seen[-1]


def _counters(engine: Engine, server: Server) -> dict:
    """Why hits were missed and where time went."""
    said = {k: v for k, v in engine.metrics().items() if k.startswith("vllm:kvkeep_")}
    out = {k: {"count": v["count"], "sum": round(v["sum"], 4)} if isinstance(v, dict) else v for k, v in said.items()}
    status = server.status()["counters"]
    return out | {k: v for k, v in status.items() if v and isinstance(v, (int, float))}


def _compare(title: str, pieces: list[Workload], names: list[str], root: Path) -> dict:
    """Each subject with each piece; the order of the subjects turns round from piece to piece."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for n, w in enumerate(pieces):
        print(f"{title}: {w.describe()}", flush=True)
        for name in reversed(names) if n % 2 else names:
            runs[name].append(measure(w, name, root))
            print(name, _figures(runs[name][-1:]), flush=True)
    RAW.mkdir(parents=True, exist_ok=True)
    (RAW / f"beside-{title}.json").write_text(json.dumps(runs))
    return {"pieces": [w.describe() for w in pieces], "subjects": _summary(runs)}


def _summary(runs: dict[str, list[dict]]) -> dict:
    names = list(runs)
    reference = runs["none" if "none" in runs else names[0]]
    subjects = {}
    for name, of in runs.items():
        same = [
            a["tokens"] == b["tokens"]
            for run, other in zip(of, reference, strict=True)
            for a, b in zip(run["outputs"], other["outputs"], strict=True)
        ]
        subjects[name] = {
            "what": of[0]["what"],
            "tokens_identical_share": round(sum(same) / len(same), 4),
            "all": _figures(of),
            "runs": [_figures([run]) | {"load_average": run["load_average"]} for run in of],
        }
    return subjects


def beside(root: Path) -> dict:
    pieces, asked = workloads(HOURS), os.environ.get("KVKEEP_BESIDE", "")
    if asked:
        some = replace(pieces[0], requests=pieces[0].requests[:30])
        _compare("some", [some], asked.split(","), root)
        sys.exit(f"engines: beside: only some of it: nothing is written but {RAW}/beside-some.json")
    measure(workloads((BEFORE,))[0], "kvkeep_learned", root)
    ample = replace(pieces[-1], disk_share=AMPLE_DISK_SHARE)
    return {
        "model": MODEL,
        "tight": _compare("tight", pieces, list(SUBJECTS), root),
        "ample": _compare("ample", [ample, ample], [n for n in SUBJECTS if n not in TIGHT_ONLY], root),
    }

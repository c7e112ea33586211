"""How fast: time to first token restored and computed, with nothing found, and decoding beside saves and loads."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import Bench
    from harness import Engine

REPETITIONS = 5


def first_token(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Seconds until the first token, and how many tokens came out of a cache."""
    said = engine.generate(tokens, 1)
    return said["seconds"], said["cached"]


def ms(seconds: list[float]) -> list[float]:
    return [round(s * 1e3, 1) for s in seconds]


def ratio(a: float, b: float) -> float:
    return round(a / b, 4)


def ttft(bench: Bench) -> dict:
    """Time to first token, restored and cold."""
    rows, engine = [], bench.engine
    for length in (1024, 2048, 4096):
        cold, restored, cached = [], [], 0
        before = engine.metrics()
        for _ in range(REPETITIONS):
            tokens = bench.new(length)
            engine.reset()
            cold.append(first_token(engine, tokens)[0])
            bench.server.wait_quiet()
            engine.reset()
            seconds, cached = first_token(engine, tokens)
            restored.append(seconds)
        tokens = bench.new(length)
        engine.reset()
        said = engine.generate(tokens, 12)["tokens"]
        bench.server.wait_quiet()
        engine.reset()
        again = engine.generate(tokens, 12)
        ours = _ours(engine, before)
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


def _ours(engine: Engine, before: dict) -> dict:
    """Mean time of a load and of a lookup since."""
    after, out = engine.metrics(), {}
    for name in ("load", "match"):
        a, b = (m.get(f"vllm:kvkeep_{name}_seconds", {"count": 0, "sum": 0.0}) for m in (before, after))
        n = b["count"] - a["count"]
        out[f"{name}_ms"] = round(1e3 * (b["sum"] - a["sum"]) / n, 2) if n else 0.0
    return out


def never_worse(bench: Bench) -> dict:
    """Prompts that nobody has seen: with the store nothing is found and everything saved."""
    pairs, length = 20, 1024
    first: dict[str, list[float]] = {"plain": [], "store": []}
    for order in in_turn(bench, pairs):
        for name, engine in order:
            engine.reset()
            first[name].append(first_token(engine, bench.new(length))[0])
            bench.server.wait_quiet()
    rates: dict[str, list[float]] = {"plain": [], "store": []}
    for order in in_turn(bench, pairs):
        for name, engine in order:
            engine.reset()
            batch = [bench.new(512) for _ in range(4)]
            rates[name].append(4 * (512 + 32) / engine.generate(batch, 32)["seconds"])
            bench.server.wait_quiet()
    return {
        "pairs": pairs,
        "prompt_tokens": length,
        "ttft_ms": {name: ms(values) for name, values in first.items()},
        "ttft_store_over_plain": ratio(statistics.median(first["store"]), statistics.median(first["plain"])),
        "ttft_store_over_plain_mean": ratio(statistics.mean(first["store"]), statistics.mean(first["plain"])),
        "ttft_median_of_pairs": pairwise(first["store"], first["plain"]),
        "tokens_per_s": {name: [round(v) for v in values] for name, values in rates.items()},
        "throughput_store_over_plain": ratio(statistics.median(rates["store"]), statistics.median(rates["plain"])),
        "throughput_median_of_pairs": pairwise(rates["store"], rates["plain"]),
    }


def decode(bench: Bench) -> dict:
    """Decoding while what is decoded is saved; and while others' prompts are restored, beside an engine that has these itself."""
    pairs, length = 30, 96
    saving: dict[str, list[float]] = {"plain": [], "store": []}
    for order in in_turn(bench, pairs):
        for name, engine in order:
            engine.reset()
            said = engine.generate([bench.new(256) for _ in range(4)], length)
            saving[name].append(statistics.mean(o["decode_seconds"] for o in said["outputs"]) / (length - 1))
            bench.server.wait_quiet()
    # Twelve prompts, half a gigabyte, come back while the first one is decoded. Of each one token is left to compute.
    others = [bench.new(1025) for _ in range(12)]
    for engine in (bench.plain, bench.engine):
        engine.reset()
        engine.generate(others, 1)
        bench.server.wait_quiet()
    restoring: dict[str, list[float]] = {"plain": [], "store": []}
    restored = 0
    for order in in_turn(bench, pairs):
        for name, engine in order:
            own = bench.new(256)
            if name == "store":
                engine.reset()
            said = engine.generate([own, *others], [length, *[1] * len(others)])["outputs"]
            restoring[name].append(said[0]["decode_seconds"] / (length - 1))
            assert all(o["cached"] == 1024 for o in said[1:]), [o["cached"] for o in said]
            restored = sum(o["cached"] for o in said[1:])
            bench.server.wait_quiet()
    return {
        "pairs": pairs,
        "saving_ms_per_token": {name: ms(values) for name, values in saving.items()},
        "saving_store_over_plain": pairwise(saving["store"], saving["plain"]),
        "restored_tokens": restored,
        "restoring_ms_per_token": {name: ms(values) for name, values in restoring.items()},
        "restoring_store_over_plain": pairwise(restoring["store"], restoring["plain"]),
    }


def in_turn(bench: Bench, pairs: int):
    """Both engines, the other one first each time."""
    both = [("plain", bench.plain), ("store", bench.engine)]
    for n in range(pairs):
        yield both if n % 2 else both[::-1]


def pairwise(a: list[float], b: list[float]) -> float:
    """The median of the ratios of what was measured one after the other: what slows both down leaves it alone."""
    return ratio(statistics.median(x / y for x, y in zip(a, b, strict=True)), 1)

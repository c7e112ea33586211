"""What the store is for: conversations that come back, and documents that are asked about."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from bench_speed import first_token, ms, pairwise, ratio

if TYPE_CHECKING:
    from bench import Bench


PAUSE = 1.0
"""Seconds before what is measured: an engine that has just answered keeps the cores busy for a while."""


CONVERSATIONS = 5


def turns(bench: Bench) -> dict:
    """Conversations of ten turns; between two of them the engine's cache is dropped. Beside it an engine that keeps all of it (no
    store can be faster than that, and none may say other tokens), and one that drops it as well and has no store."""
    talks = [_conversation(bench) for _ in range(CONVERSATIONS)]
    rows = []
    for of_turn in zip(*talks, strict=True):
        without = []
        for row in of_turn[:2]:
            bench.plain.reset()
            time.sleep(PAUSE)
            without.append(first_token(bench.plain, row["prompt"])[0])
        rows.append(
            {
                "turn": len(rows) + 1,
                "prompt_tokens": len(of_turn[0]["prompt"]),
                "restored_tokens": min(row["restored_tokens"] for row in of_turn),
                "ttft_ms": round(1e3 * statistics.median(row["seconds"] for row in of_turn)),
                "ttft_kept_ms": round(1e3 * statistics.median(row["kept_seconds"] for row in of_turn)),
                "ttft_without_ms": round(1e3 * statistics.median(without)),
                "store_over_kept": pairwise(*([row[key] for row in of_turn] for key in ("seconds", "kept_seconds"))),
                "tokens_identical": all(row["tokens_identical"] for row in of_turn),
            }
        )
        print(rows[-1], flush=True)

    def last_over_second(key: str) -> list[float]:
        return [ratio(talk[9][key], talk[1][key]) for talk in talks]

    return {
        "conversations": CONVERSATIONS,
        "rows": rows,
        "tokens_identical": all(row["tokens_identical"] for row in rows),
        "turn_10_over_turn_2": ratio(rows[9]["ttft_ms"], rows[1]["ttft_ms"]),
        "turn_10_over_turn_2_each": last_over_second("seconds"),
        "turn_10_over_turn_2_kept": ratio(rows[9]["ttft_kept_ms"], rows[1]["ttft_kept_ms"]),
        "turn_10_over_turn_2_kept_each": last_over_second("kept_seconds"),
        "store_over_kept": statistics.median(row["store_over_kept"] for row in rows[1:]),
    }


def _conversation(bench: Bench) -> list[dict]:
    rows, history, said = [], bench.new(512), {}
    bench.plain.reset()
    for _ in range(10):
        history = history + bench.new(160)
        bench.engine.reset()
        time.sleep(PAUSE)
        seconds, cached = first_token(bench.engine, history)
        time.sleep(PAUSE)
        kept, _ = first_token(bench.plain, history)
        for name, engine in (("store", bench.engine), ("kept", bench.plain)):
            said[name] = engine.generate(history, 64)["tokens"]
        rows.append(
            {
                "prompt": history,
                "restored_tokens": cached,
                "seconds": seconds,
                "kept_seconds": kept,
                "tokens_identical": said["store"] == said["kept"],
            }
        )
        history = history + said["kept"]
        bench.server.wait_quiet()
    return rows


def documents(bench: Bench) -> dict:
    """One document of 8k tokens and twenty questions; between two of them the engine's cache is dropped."""
    document, question = bench.new(8192), 64
    cold, asked, cached = [], [], 0
    for _ in range(3):
        bench.plain.reset()
        cold.append(first_token(bench.plain, document + bench.new(question))[0])
    bench.engine.reset()
    first = first_token(bench.engine, document + bench.new(question))[0]
    bench.server.wait_quiet()
    for _ in range(20):
        bench.engine.reset()
        seconds, cached = first_token(bench.engine, document + bench.new(question))
        asked.append(seconds)
        bench.server.wait_quiet()
    print({"cold": ms(cold), "first": ms([first]), "asked": ms(asked)}, flush=True)
    # Four sessions at once, each with its own document of 4k.
    documents = [bench.new(4096) for _ in range(4)]
    for own in documents:
        bench.engine.reset()
        bench.engine.generate(own, 1)
        bench.server.wait_quiet()
    without, with_store = [], []
    for _ in range(3):
        batch = [own + bench.new(question) for own in documents]
        bench.plain.reset()
        without.append(bench.plain.generate(batch, 32)["seconds"])
        bench.engine.reset()
        with_store.append(bench.engine.generate(batch, 32)["seconds"])
        bench.server.wait_quiet()
    return {
        "document_tokens": 8192,
        "questions": 20,
        "cold_ms": ms(cold),
        "first_ms": ms([first]),
        "asked_ms": ms(asked),
        "restored_tokens": cached,
        "mean_ttft_over_cold": ratio(statistics.mean(asked), statistics.mean(cold)),
        "mean_ttft_with_the_first_over_cold": ratio(statistics.mean([first, *asked]), statistics.mean(cold)),
        "four_sessions_ms": {"plain": ms(without), "store": ms(with_store)},
        "four_sessions_throughput_over_plain": pairwise(without, with_store),
    }

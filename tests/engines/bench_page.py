"""Makes docs/benchmarks-engines.md out of docs/benchmarks-engines.json."""

from __future__ import annotations

import statistics
from pathlib import Path

BARS = {1024: 1 / 10, 2048: 1 / 16, 4096: 1 / 28}
"""Tokens of a prompt to what restored over cold may be at most: what plain files on tmpfs reached."""


def write(result: dict, page: Path) -> None:
    """Only what was measured appears."""
    m, v, model = result["machine"], result["versions"], result["model"]
    lines = [
        "# Engines: figures",
        "",
        "Made by `tests/engines/run bench` from [benchmarks-engines.json](benchmarks-engines.json); do not edit.",
        "",
        f"vLLM {v['vllm']} on the CPU, torch {v['torch']}, kvkeep {v['kvkeep']}; {m['cpus']} CPUs ({m['cpu']}), {m['memory_gib']} GiB,",
        f"no GPU. Model: {model['parameters_millions']} million random parameters, {model['kv_bytes_per_token'] // 1024} KiB of KV per token,",
        f"blocks of {model['tokens_per_block']} tokens. A mechanism proved on a CPU: on a GPU computing is faster, and so is memory. Ratios within",
        "one table can be compared, times between tables cannot: the machine is shared (load averages are in the JSON).",
    ]
    for part, table in (
        ("ttft", _ttft),
        ("never_worse", _never_worse),
        ("gone", _gone),
        ("turns", _turns),
        ("documents", _documents),
    ):
        if part in result:
            lines += ["", *table(result[part])]
    page.write_text("\n".join(lines) + "\n")


def _ttft(r: dict) -> list[str]:
    lines = [
        "## Time to first token, restored and computed",
        "",
        "The same prompt twice; between, the engine's cache was dropped. Medians. *Load* is from the start of a request's load to its end,",
        "*lookup* from its question to the answer: the part of its time that is ours.",
        "",
        "| prompt | restored tokens | computed ms | restored ms | restored / computed | bar | load ms | lookup ms | our share | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in r["rows"]:
        lines.append(
            f"| {row['prompt_tokens']} | {row['restored_tokens']} | {_median(row['cold_ms'])} | {_median(row['restored_ms'])} "
            f"| {row['ttft_restored_over_cold']:.3f} | {BARS[row['prompt_tokens']]:.3f} | {row['load_ms']} | {row['lookup_ms']} "
            f"| {100 * row['share_of_restored_in_our_code']:.0f} % | {'yes' if row['tokens_identical'] else 'NO'} |"
        )
    return lines


def _never_worse(r: dict) -> list[str]:
    return [
        "## Nothing is found",
        "",
        f"{r['pairs']} interleaved pairs of prompts of {r['prompt_tokens']} tokens that nobody has seen; with the store all of them are saved.",
        "",
        "| | without | with the store | ratio |",
        "|---|---|---|---|",
        f"| time to first token, median ms | {_median(r['ttft_ms']['plain'])} | {_median(r['ttft_ms']['store'])} | {r['ttft_store_over_plain']:.3f} |",
        f"| the same, mean ms | {statistics.mean(r['ttft_ms']['plain']):.0f} | {statistics.mean(r['ttft_ms']['store']):.0f} "
        f"| {r['ttft_store_over_plain_mean']:.3f} |",
        f"| tokens/s, 4 at once | {_median(r['tokens_per_s']['plain'])} | {_median(r['tokens_per_s']['store'])} "
        f"| {r['throughput_store_over_plain']:.3f} |",
    ]


def _gone(r: dict) -> list[str]:
    lines = [
        "## The server is gone",
        "",
        "| kvkeepd | time to first token of 4 new prompts, ms | hits again within | steps of the scheduler | of them over 5 ms in our code |",
        "|---|---|---|---|---|",
    ]
    for how in ("stopped", "killed"):
        x = r[how]
        times = ", ".join(f"{t:.0f}" for t in x["ttft_ms"])
        lines.append(
            f"| {how} | {times} | {x['hits_again_within_s']} s | {x['scheduler_steps']:.0f} | {x['scheduler_steps_over_5_ms']:.0f} |"
        )
    return lines


def _turns(r: dict) -> list[str]:
    lines = [
        "## A conversation of ten turns",
        "",
        "160 new tokens and 64 generated a turn; between two turns the engine's cache was dropped. Turn 10 over turn 2: "
        f"{r['turn_10_over_turn_2']:.2f} (bar 1.3).",
        "",
        "| turn | prompt | restored tokens | with the store ms | without ms |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {x['turn']} | {x['prompt_tokens']} | {x['restored_tokens']} | {x['ttft_ms']} | {x['ttft_without_ms']} |"
        for x in r["rows"]
    ]


def _documents(r: dict) -> list[str]:
    four = r["four_sessions_seconds"]
    return [
        "## Questions about a document",
        "",
        f"A document of {r['document_tokens']} tokens, {r['questions']} questions; between two of them the engine's cache was dropped.",
        "",
        "| | computed | with the store | ratio |",
        "|---|---|---|---|",
        f"| time to first token, mean ms | {statistics.mean(r['cold_ms']):.0f} | {statistics.mean(r['asked_ms']):.0f} | {r['mean_ttft_over_cold']:.3f} |",
        f"| 4 sessions at once (4k documents, 32 tokens each), s | {four['plain']} | {four['store']} "
        f"| throughput x {r['four_sessions_throughput_over_plain']:.2f} |",
    ]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}"

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
        ("decode", _decode),
        ("turns", _turns),
        ("documents", _documents),
        ("gone", _gone),
        ("black_hole", _black_hole),
        ("slow_disk", _slow_disk),
        ("holds", _holds),
        ("beside", _beside),
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
        f"{r['pairs']} interleaved pairs of prompts of {r['prompt_tokens']} tokens that nobody has seen; with the store all of them are",
        "saved. Bar: 2 %.",
        "",
        "| | without | with the store | ratio | median of the pairs' ratios |",
        "|---|---|---|---|---|",
        f"| time to first token, median ms | {_median(r['ttft_ms']['plain'])} | {_median(r['ttft_ms']['store'])} "
        f"| {r['ttft_store_over_plain']:.3f} | {r['ttft_median_of_pairs']:.3f} |",
        f"| the same, mean ms | {_mean(r['ttft_ms']['plain'])} | {_mean(r['ttft_ms']['store'])} | {r['ttft_store_over_plain_mean']:.3f} | |",
        f"| tokens/s, 4 at once | {_median(r['tokens_per_s']['plain'])} | {_median(r['tokens_per_s']['store'])} "
        f"| {r['throughput_store_over_plain']:.3f} | {r['throughput_median_of_pairs']:.3f} |",
    ]


def _decode(r: dict) -> list[str]:
    lines = [
        "## Decoding",
        "",
        f"{r['pairs']} interleaved pairs, milliseconds a token. *Saving*: four prompts are decoded at once, and each block is saved when it is",
        f"full. *Restoring*: one is decoded while {r['restored_tokens']} tokens of twelve other prompts come back, which the engine without a",
        "store has itself. Ratio: median of the pairs' ratios.",
        "",
        "| | without | with the store | ratio | bar |",
        "|---|---|---|---|---|",
    ]
    for what, bar in (("saving", 1.02), ("restoring", 1.03)):
        x = r[f"{what}_ms_per_token"]
        lines.append(
            f"| {what} | {statistics.median(x['plain']):.1f} | {statistics.median(x['store']):.1f} "
            f"| {r[f'{what}_store_over_plain']:.3f} | {bar} |"
        )
    return lines


_LOST_HEAD = [
    "| kvkeepd | time to first token of 4 new prompts, ms | hits again within (bar 2 s) | steps of the scheduler "
    "| of them over 5 ms in our code | lookups over 100 ms |",
    "|---|---|---|---|---|---|",
]


def _lost(how: str, x: dict) -> str:
    times = ", ".join(f"{t:.0f}" for t in x["ttft_ms"])
    waits = x["lookup_seconds_buckets"]
    late = max(waits.values(), default=0) - waits.get("0.1", 0)
    return (
        f"| {how} | {times} | {x['hits_again_within_s']} s | {x['scheduler_steps']:.0f} "
        f"| {x['scheduler_steps_over_5_ms']:.0f} | {late:.0f} |"
    )


def _gone(r: dict) -> list[str]:
    return ["## The server is gone", "", *_LOST_HEAD, *(_lost(how, r[how]) for how in ("stopped", "killed"))]


def _black_hole(r: dict) -> list[str]:
    return [
        "## The network swallows everything",
        "",
        "The server is reached over TCP; from one moment on nothing comes through, and nobody is told.",
        "",
        *_LOST_HEAD,
        _lost("black hole", r),
    ]


def _slow_disk(r: dict) -> list[str]:
    lines = [
        "## A slow disk",
        "",
        f"NVMe reads and writes {r['disk_bytes_per_s'] // 10**6} MB/s together. *New*: nobody has seen the prompt, and it is saved; *old*: after the loss of",
        "DRAM it is read from there. Means of 3. Bar: 1.05 times without a store.",
        "",
        "| prompt | without ms | new ms | new / without | old ms | restored tokens | old / without |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {x['prompt_tokens']} | {_mean(x['plain_ms'])} | {_mean(x['new_ms'])} | {x['new_over_plain_mean']:.3f} | {_mean(x['old_ms'])} "
        f"| {min(x['restored_tokens'])} | {x['old_over_plain_mean']:.3f} |"
        for x in r["rows"]
    ]


def _holds(r: dict) -> list[str]:
    p99 = r["hold_p99_at_most_s"]
    return [
        "## Blocks that the engine wants back",
        "",
        f"The worst case: class `durable` on a disk of 200 MB/s, and an engine with room for 8k tokens that computes {r['prompts']} prompts of 2k,",
        f"two at once. {r['holds']} steps needed blocks whose save was under way; 99 % of them waited at most "
        f"{'nothing' if p99 is None else f'{1e3 * p99:.0f} ms'} (bar 100 ms).",
        f"{r['saved_blocks']} blocks were saved, of {r['abandoned_blocks']} the save was taken back.",
    ]


def _turns(r: dict) -> list[str]:
    tokens = 640 * r["conversations"]
    lines = [
        "## Conversations of ten turns",
        "",
        f"160 new tokens and 64 generated a turn; medians of {r['conversations']} conversations. Between two turns the engine's cache was dropped. Beside it",
        "an engine whose cache was kept, which no store can beat: what a turn costs then is the computing of its own tokens over a longer",
        "context, and this grows; and an engine without a store whose cache was dropped (two conversations).",
        f"Turn 10 over turn 2: {r['turn_10_over_turn_2']:.2f} (bar 1.3; of each conversation {_list(r['turn_10_over_turn_2_each'])}), with a cache that was kept "
        f"{r['turn_10_over_turn_2_kept']:.2f} ({_list(r['turn_10_over_turn_2_kept_each'])});",
        f"the store over it: {r['store_over_kept']:.2f}. {'The same' if r['tokens_identical'] else 'OTHER'} tokens from both, {tokens} of them.",
        "",
        "| turn | prompt | restored tokens | with the store ms | cache kept ms | store / kept | without ms |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {x['turn']} | {x['prompt_tokens']} | {x['restored_tokens']} | {x['ttft_ms']} | {x['ttft_kept_ms']} | {x['store_over_kept']:.2f} "
        f"| {x['ttft_without_ms']} |"
        for x in r["rows"]
    ]


def _documents(r: dict) -> list[str]:
    four = r["four_sessions_ms"]
    return [
        "## Questions about a document",
        "",
        f"A document of {r['document_tokens']} tokens, {r['questions']} questions after a first one ({_mean(r['first_ms'])} ms); between two of them the",
        "engine's cache was dropped. Bars: 0.20, and 1.30 times the throughput.",
        "",
        "| | computed | with the store | ratio |",
        "|---|---|---|---|",
        f"| time to first token, mean ms | {_mean(r['cold_ms'])} | {_mean(r['asked_ms'])} | {r['mean_ttft_over_cold']:.3f} "
        f"(with the first question {r['mean_ttft_with_the_first_over_cold']:.3f}) |",
        f"| 4 sessions at once (4k documents, 32 tokens each), median ms | {_median(four['plain'])} | {_median(four['store'])} "
        f"| throughput x {r['four_sessions_throughput_over_plain']:.2f} |",
    ]


def _beside(r: dict) -> list[str]:
    mib, tight, ample = 1 << 20, r["tight"], r["ample"]
    pieces = tight["pieces"]

    def between(key: str, unit: int = 1) -> str:
        least, most = (f(w[key] for w in pieces) // unit for f in (min, max))
        return str(least) if least == most else f"{least} to {most}"

    w = pieces[-1]
    source = "made up, as of coding agents" if w["source"].startswith("made up") else "of coding agents, 1/16 as long"
    disk = ample["pieces"][0]["disk_bytes"] // mib
    return [
        "## Beside what vLLM and LMCache have of their own",
        "",
        f"{len(pieces)} pieces of {w['requests']} requests {source} ({'; '.join(w['source'] for w in pieces)}); {between('sessions')} sessions",
        f"that share a beginning of 768 tokens; prompts of {between('prompt_tokens_median')} tokens in the median and "
        f"{between('prompt_tokens_max')} at most, 16 to 32",
        f"generated, {w['at_once']} at once, one of a session at a time. Different KV: {between('unique_bytes', mib)} MiB; the engine's own: "
        f"{between('engine_bytes', mib)} MiB; of each store:",
        f"{between('dram_bytes', mib)} MiB of DRAM, {between('disk_bytes', mib)} MiB of disk. Model `{r['model']}` (8 KiB of KV per token), prefill in steps of 512",
        "tokens. Each subject begins each piece with an engine and a store that are empty; the order of the subjects turns round from piece",
        "to piece. Percentiles and means are those of all requests; hits also of each piece. *Learned*: with nothing stored, but with what the",
        "policy learned in the pieces before, of which there was one more in front.",
        "",
        *_subjects(tight),
        "",
        f"The last piece once more, twice, with {disk} MiB of disk: nothing has to leave.",
        "",
        *_subjects(ample),
        "",
        "KVKeep's index and raft log preallocate 78 MiB, whatever is stored: on disk, not of its blocks.",
        "(a) The `fs` tier has no bound and removes nothing: in the first table it may use more disk than the others, which favours it. vLLM",
        "refuses to copy a CPU's KV; the copy is ours ([cpu_offload.py](../tests/engines/cpu_offload.py)).",
        "(b) LMCache's in-process connector has no copy for a CPU, either; it is ours ([cpu_lmcache.py](../tests/engines/cpu_lmcache.py)). O_DIRECT, as",
        "the others: else the page cache would be DRAM of its own. 256 tokens are its default, 32 the block of the others.",
        "*Same tokens*: share of requests that say what they say without a store. Where a prompt is found up to another place, its",
        "rest is computed in other steps, which round otherwise, and a model of random weights may then say another token.",
        "*Between tokens*: a request that is computed while another one decodes makes it wait; that is most of the p99.",
    ]


def _subjects(r: dict) -> list[str]:
    mib = 1 << 20
    lines = [
        "| | token hits | of each piece % | TTFT p50 ms | p95 ms | mean ms | between tokens p50 ms | p99 ms | written to disk MiB | on disk at most MiB | CPU s | whole s | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for subject in r["subjects"].values():
        x, ttft, gaps = (subject["all"], subject["all"]["ttft_ms"], subject["all"]["between_tokens_ms"])
        cells = [
            f"{100 * x['hit_share']:.1f} %",
            " / ".join(f"{100 * run['hit_share']:.1f}" for run in subject["runs"]),
            *(f"{ttft[k]:.0f}" for k in ("p50", "p95", "mean")),
            f"{gaps['p50']:.1f}",
            f"{gaps['p99']:.0f}",
            f"{x['disk_bytes_written'] / mib:.0f}",
            f"{x['disk_bytes_used'] / mib:.0f}",
            f"{x['cpu_seconds']:.0f}",
            f"{x['seconds']:.0f}",
            f"{100 * subject['tokens_identical_share']:.0f} %",
        ]
        lines.append(f"| {subject['what']} | {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.0f}"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}"

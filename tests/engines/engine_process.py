"""A vLLM engine in a process of its own, driven by lines of JSON: one command a line on standard input, one answer a line on the
descriptor that KVKEEP_TEST_ANSWERS names. `harness.Engine` is the other end."""

import json
import os
import sys
import time
from collections import deque
from itertools import pairwise


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(int(os.environ.pop("KVKEEP_TEST_ANSWERS")), "w")
    started = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig

    for name, kind in (("kv_transfer_config", KVTransferConfig), ("kv_events_config", KVEventsConfig)):
        if name in settings:
            settings[name] = kind(**settings[name])
    llm = LLM(**settings)
    say(answers, {"ready": True, "start_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            say(answers, COMMANDS[command.pop("do")](llm, SamplingParams, **command))
        except Exception as e:  # noqa: BLE001: whatever it is, the test has to see it
            say(answers, {"error": f"{type(e).__name__}: {e}"})


def generate(llm, params_of, prompts, max_tokens, kv_transfer_params=None, logprobs=None):
    """All prompts at once. Per prompt: tokens, how many of it came out of a cache, seconds until its first token and its last.
    `max_tokens`: of each prompt, or of all."""
    extra = {"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None

    def up_to(n):
        return params_of(temperature=0.0, max_tokens=n, ignore_eos=True, extra_args=extra, logprobs=logprobs)

    params = [up_to(n) for n in max_tokens] if isinstance(max_tokens, list) else up_to(max_tokens)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    out = []
    for o in outputs:
        m = o.metrics
        out.append(
            {
                "tokens": list(o.outputs[0].token_ids),
                "cached": o.num_cached_tokens,
                "first_token_seconds": m.first_token_latency if m else None,
                "decode_seconds": m.last_token_ts - m.first_token_ts if m else None,
            }
        )
    return {"seconds": seconds, "outputs": out}


def replay(llm, params_of, requests, at_once):
    """In their order, so many at once, one of a session at a time. Per request: tokens, how many of the prompt came out of a cache,
    seconds until its first token, and between two tokens."""
    engine, waiting, running, out = llm.llm_engine, deque(enumerate(requests)), {}, [None] * len(requests)
    started = time.perf_counter()
    while waiting or running:
        while (
            waiting
            and len(running) < at_once
            and waiting[0][1]["session"] not in {r["session"] for r in running.values()}
        ):
            n, request = waiting.popleft()
            running[str(n)] = {"session": request["session"], "begun": time.perf_counter(), "at": []}
            params = params_of(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
            engine.add_request(str(n), {"prompt_token_ids": request["prompt"]}, params)
        for o in engine.step():
            now, state, tokens = time.perf_counter(), running[o.request_id], list(o.outputs[0].token_ids)
            state["at"] += [now] * (len(tokens) - len(state["at"]))
            if o.finished:
                at = running.pop(o.request_id)["at"]
                out[int(o.request_id)] = {
                    "tokens": tokens,
                    "cached": o.num_cached_tokens,
                    "first_token_seconds": at[0] - state["begun"],
                    "between_seconds": [b - a for a, b in pairwise(at)],
                }
    return {"seconds": time.perf_counter() - started, "outputs": out}


def reset(llm, params_of, connector=False):
    """Drops the engine's own cache; with `connector`, tells the connector as well."""
    return {"done": llm.reset_prefix_cache(reset_connector=connector)}


def metrics(llm, params_of, prefix="vllm:"):
    """Counters by name, histograms as {"count", "sum", "buckets"}."""
    out = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(prefix):
            if hasattr(metric, "value"):
                out[metric.name] = metric.value
            elif hasattr(metric, "buckets"):
                out[metric.name] = {"count": metric.count, "sum": metric.sum, "buckets": metric.buckets}
    return out


def processes(llm, params_of):
    """This process and all below it."""
    import psutil

    me = psutil.Process()
    return {"pids": [me.pid] + [p.pid for p in me.children(recursive=True)]}


COMMANDS = {"generate": generate, "replay": replay, "reset": reset, "metrics": metrics, "processes": processes}


def say(answers, what) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

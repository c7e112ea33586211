#!/usr/bin/env python3
"""A conversation with a small model of random weights: each turn restores what the turns before it have saved.

    python transformers_prefix.py [ENDPOINT]        for example local:/tmp/kvkeep-example?dram=256MiB&nvme=1GiB

Nothing is downloaded, nothing need be started. Run it twice: the second run restores from its first turn on.
"""

import sys
import time

import torch
from kvkeep.connectors.transformers import PrefixStore
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ENDPOINT = "local:/tmp/kvkeep-example?dram=256MiB&nvme=1GiB&idle=5"
TURNS, TOKENS = 4, 256


def first_token(model, ids: torch.Tensor, cache) -> tuple[int, object, float]:
    """The token, the cache after it, and how long it took."""
    started = time.perf_counter()
    with torch.no_grad():
        out = model(ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True)
    return int(out.logits[0, -1].argmax()), out.past_key_values, time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    conversation = torch.randint(10, 4000, (1, TURNS * TOKENS))
    with PrefixStore(model, sys.argv[1] if len(sys.argv) > 1 else ENDPOINT) as store:
        store.namespace.ready(20)
        for turn in range(1, TURNS + 1):
            ids = conversation[:, : turn * TOKENS]
            _, _, without = first_token(model, ids, DynamicCache(config=config))
            started = time.perf_counter()
            cache, tokens = store.restore(ids, session="example")
            restoring = time.perf_counter() - started
            token, cache, computing = first_token(model, ids, cache)
            saved = store.save(ids, cache, session="example")
            print(
                f"turn {turn}: {ids.shape[1]} tokens, {tokens} restored, first token {token} after "
                f"{1e3 * (restoring + computing):.0f} ms ({1e3 * without:.0f} ms without the store), {saved} are stored now"
            )


if __name__ == "__main__":
    main()

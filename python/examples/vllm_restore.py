"""A prompt is computed, vLLM's own cache is dropped, and the prompt is restored from the store.

    python vllm_restore.py MODEL [FOLDER]

MODEL: a folder or a name that vLLM takes. FOLDER: where the private store lives (default ./kvkeep-data); nothing need run before.
"""

import sys
import time

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main() -> None:
    model, folder = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "kvkeep-data"
    llm = LLM(
        model,
        enable_prefix_caching=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVKeepConnector",
            kv_connector_module_path="kvkeep.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"endpoint": f"local:{folder}?dram=1GiB&nvme=4GiB"},
        ),
    )
    prompt = "The store remembers what was said before. " * 100
    # Optional: which conversation this is, so that the store can list, pin and delete it as one thing.
    params = SamplingParams(
        temperature=0, max_tokens=16, extra_args={"kv_transfer_params": {"kvkeep": {"session": "example"}}}
    )
    for what in ("computed", "restored"):
        started = time.perf_counter()
        said = llm.generate(prompt, params, use_tqdm=False)[0]
        seconds = time.perf_counter() - started
        print(
            f"{what}: {seconds:.2f} s, {said.num_cached_tokens} of {len(said.prompt_token_ids)} tokens out of a cache",
            flush=True,
        )
        time.sleep(1)  # the last blocks are on their way
        llm.reset_prefix_cache()


if __name__ == "__main__":
    main()

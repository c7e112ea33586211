"""The store below vLLM's own host tier, and the connector beside it."""

from conftest import NEW_TOKENS, PROMPTS
from harness import BLOCK, Engine, connector, prompt

LENGTH = PROMPTS[14]


def offloading(server, host_bytes: int = 256 << 20, **tier) -> dict:
    below = {"type": "KVKeepTier", "module_path": "kvkeep.connectors.vllm_tier", "endpoint": server.endpoint} | tier
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuOffloadingSpec",
            "spec_module_path": "cpu_offload",
            "cpu_bytes_to_use": host_bytes,
            "secondary_tiers": [below] if server else [],
        },
    }


def test_an_engine_that_was_killed_finds_its_blocks_below_the_host_tier(server, folder, plain):
    first = Engine("small", offloading(server), log=folder / "first.log").start()
    try:
        for seed in (14, 15):
            found = first.generate(prompt(seed, LENGTH), NEW_TOKENS)
            assert (found["cached"], found["tokens"]) == (0, plain.tokens("small", seed))
        # vLLM hands stores on with the next requests.
        first.generate(prompt(90, 8), 4)
        server.wait_quiet()
        assert server.status()["positions"] >= 2 * (LENGTH // BLOCK)
    finally:
        first.kill()
    second = Engine("small", offloading(server), log=folder / "second.log").start()
    try:
        for seed in (14, 15):
            found = second.generate(prompt(seed, LENGTH), NEW_TOKENS)
            assert found["tokens"] == plain.tokens("small", seed)
            assert found["cached"] >= (LENGTH - 1) // BLOCK * BLOCK
        server.kill()
        for seed in (14, 16):
            second.reset(connector=True)
            assert second.generate(prompt(seed, LENGTH), NEW_TOKENS)["tokens"] == plain.tokens("small", seed)
        server.start()
    finally:
        second.close()


def test_two_connectors_work_together(server, folder, plain):
    """KVKeep beside vLLM's host tier: the first that has a prompt loads it, both save."""
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [
                connector(server.endpoint, namespace="two connectors"),
                offloading(server, namespace="two connectors, the tier"),
            ]
        },
    }
    engine = Engine("small", both, log=folder / "both.log").start()
    try:
        engine.warm_up()
        loads = engine.kvkeep("loads")
        for seed in (15, 16):
            expected = plain.tokens("small", seed)
            first = engine.generate(prompt(seed, LENGTH), NEW_TOKENS)
            assert (first["cached"], first["tokens"]) == (0, expected)
            engine.generate(prompt(91, 8), 4)
            server.wait_quiet()
            engine.reset()
            again = engine.generate(prompt(seed, LENGTH), NEW_TOKENS)
            assert (again["cached"], again["tokens"]) == ((LENGTH - 1) // BLOCK * BLOCK, expected)
        assert engine.kvkeep("loads") - loads == 2
        # KVKeep keeps to itself after a reset; the other connector has the prompts still, or computes them.
        engine.reset(connector=True)
        for seed in (15, 16):
            assert engine.generate(prompt(seed, LENGTH), NEW_TOKENS)["tokens"] == plain.tokens("small", seed)
        assert engine.kvkeep("errors") == 0
    finally:
        engine.close()


def test_prompts_that_end_with_a_block_are_continued_as_from_the_host_tier(server, folder):
    """Of such a prompt vLLM loads every token and computes the last one again, with other rounding than in a whole prompt: a model
    of random weights may then say another token. What comes from below must be what vLLM's own host tier gives."""
    seeds, length = range(1, 9), 32 * BLOCK
    alone = offloading(server)
    alone["kv_connector_extra_config"]["secondary_tiers"] = []

    def said(configuration: dict, name: str, kill: bool) -> list[list[int]]:
        engine = Engine("small", configuration, log=folder / name).start()
        try:
            tokens = [engine.generate(prompt(seed, length), NEW_TOKENS) for seed in seeds]
            engine.generate(prompt(92, 8), 4)
            if not kill:
                engine.reset()
                tokens = [engine.generate(prompt(seed, length), NEW_TOKENS) for seed in seeds]
                assert all(found["cached"] >= length - 1 for found in tokens)
            return [found["tokens"] for found in tokens]
        finally:
            if kill:
                server.wait_quiet()
                engine.kill()
            else:
                engine.close()

    from_host = said(alone, "host.log", kill=False)
    below = offloading(server, namespace="prompts that end with a block")
    said(below, "below-first.log", kill=True)
    engine = Engine("small", below, log=folder / "below.log").start()
    try:
        for seed, expected in zip(seeds, from_host, strict=True):
            found = engine.generate(prompt(seed, length), NEW_TOKENS)
            assert found["cached"] >= length - 1
            assert found["tokens"] == expected
    finally:
        engine.close()

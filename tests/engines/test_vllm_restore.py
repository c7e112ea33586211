"""vLLM with the store as its only external cache, and the store in all its states: one engine, never started again."""

import time
from pathlib import Path

import powercut
import pytest
from conftest import NEW_TOKENS, PROMPTS
from harness import BLOCK, Engine, Server, connector, free_port, prompt, wait_until

LENGTH = PROMPTS[1]
RESTORED = (LENGTH - 1) // BLOCK * BLOCK
"""Tokens that come out of the store: whole blocks, and at least one token is computed."""


@pytest.fixture(scope="module")
def server(folder):
    """Under the power-cut shim."""
    data, log = folder / "kvkeep", folder / "undo.log"
    data.mkdir()
    server = Server(data, preload=str(powercut.shim(folder)), **powercut.environment(data, log)).start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def events_at():
    return free_port()


@pytest.fixture(scope="module")
def engine(server, folder, events_at):
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{events_at}"}
    engine = Engine("small", connector(server.endpoint), log=folder / "engine.log", kv_events_config=events).start()
    engine.warm_up()
    yield engine
    engine.close()


def ask(engine, seed: int) -> dict:
    """With a cache of its own that is empty."""
    engine.reset()
    return engine.generate(prompt(seed, PROMPTS[seed]), NEW_TOKENS)


def saved(engine, server) -> None:
    """Everything that was computed is in the store, and on NVMe."""
    server.wait_quiet()


def test_a_prompt_is_restored_after_the_engines_cache_was_dropped(engine, server, plain):
    first = ask(engine, 1)
    assert (first["cached"], first["tokens"]) == (0, plain.tokens("small", 1))
    saved(engine, server)
    loads, blocks = engine.kvkeep("loads"), engine.kvkeep("load_blocks")
    again = ask(engine, 1)
    assert (again["cached"], again["tokens"]) == (RESTORED, plain.tokens("small", 1))
    assert (engine.kvkeep("loads") - loads, engine.kvkeep("load_blocks") - blocks) == (1, RESTORED // BLOCK)


def test_what_is_saved_is_told_as_events(engine, server, events_at):
    import msgspec
    import zmq

    listening = zmq.Context.instance().socket(zmq.SUB)
    listening.connect(f"tcp://127.0.0.1:{events_at}")
    listening.setsockopt(zmq.SUBSCRIBE, b"")
    time.sleep(0.5)
    tokens = prompt(51, 4 * BLOCK)
    engine.generate(tokens, 1)
    server.wait_quiet()
    engine.metrics()
    stored = []
    while listening.poll(500):
        _, events, *_ = msgspec.msgpack.decode(listening.recv_multipart()[-1])
        stored += [e for e in events if e["type"] == "BlockStored" and e["medium"] == "STORAGE"]
    listening.close()
    assert [t for e in stored for t in e["token_ids"]] == tokens
    assert sum(len(e["block_hashes"]) for e in stored) == 4 and stored[0]["parent_block_hash"] is None


def test_what_was_generated_is_restored_with_the_prompt(engine, server):
    start = prompt(21, 200)
    said = engine.generate(start, 60)["tokens"]
    saved(engine, server)
    engine.reset()
    # The last token was said, not computed with.
    computed = 200 + 60 - 1
    follow = engine.generate(start + said + prompt(22, 40), NEW_TOKENS)
    assert follow["cached"] == computed // BLOCK * BLOCK


def test_the_cache_of_the_engine_comes_first(engine, server, plain):
    engine.reset()
    half = prompt(1, LENGTH)[: LENGTH // 2]
    engine.generate(half, 1)
    loaded = engine.kvkeep("load_blocks")
    again = engine.generate(prompt(1, LENGTH), NEW_TOKENS)
    assert (again["cached"], again["tokens"]) == (RESTORED, plain.tokens("small", 1))
    assert engine.kvkeep("load_blocks") - loaded == (RESTORED - LENGTH // 2) // BLOCK


def test_several_at_once_say_what_each_says_alone(engine, server, plain):
    seeds = [2, 3, 4, 11, 13]
    prompts = [prompt(s, PROMPTS[s]) for s in seeds]
    expected = [plain.tokens("small", s) for s in seeds]
    engine.reset()
    assert [o["tokens"] for o in engine.generate(prompts, NEW_TOKENS)["outputs"]] == expected
    saved(engine, server)
    engine.reset()
    again = engine.generate(prompts, NEW_TOKENS)["outputs"]
    assert [o["tokens"] for o in again] == expected
    assert [o["cached"] for o in again] == [(PROMPTS[s] - 1) // BLOCK * BLOCK for s in seeds]


def test_a_conversation_is_a_session_of_the_store(engine, server):
    first = prompt(41, 300)
    turn = {"kvkeep": {"session": "conversation-41", "kind": "chat"}}
    engine.reset()
    said = engine.generate(first, 20, kv_transfer_params=turn)["tokens"]

    def session() -> dict | None:
        found = server.ctl("session", "list")["sessions"]
        return next((s for s in found if s["session_id"] == "conversation-41"), None)

    wait_until(
        lambda: session() and session()["positions"] == (300 + 19) // BLOCK, 10, "its first turn is in the session"
    )
    second = first + said + prompt(42, 100)
    engine.generate(second, 20, kv_transfer_params=turn)
    wait_until(lambda: session()["positions"] == (420 + 19) // BLOCK, 10, "its second turn is in the session")
    # An answer that was edited: it goes another way from there on.
    engine.generate(first + prompt(43, 60), 1, kv_transfer_params=turn)
    wait_until(lambda: session()["positions"] == 360 // BLOCK, 10, "the session follows")


def test_resetting_the_connector_affects_this_engine_and_not_the_store(engine, server, plain, folder):
    positions = server.status()["positions"]
    engine.reset(connector=True)
    assert server.status()["positions"] == positions
    # It may have other weights now, so it neither reads what was there nor adds to it.
    other = engine.generate(prompt(1, LENGTH), NEW_TOKENS)
    assert (other["cached"], other["tokens"]) == (0, plain.tokens("small", 1))
    saved(engine, server)
    assert ask(engine, 1)["cached"] == RESTORED, "it keeps what it computed since"


def test_a_server_that_is_killed_is_misses_and_hits_again_when_it_is_back(engine, server, plain):
    ask(engine, 5)
    saved(engine, server)
    server.kill()
    gone = ask(engine, 5)
    assert (gone["cached"], gone["tokens"]) == (0, plain.tokens("small", 5))
    server.start()
    wait_until(lambda: ask(engine, 5)["cached"] == RESTORED, 30, "hits after the server's return")
    assert ask(engine, 5)["tokens"] == plain.tokens("small", 5)


def test_a_server_that_is_stopped_is_misses_and_hits_again_when_it_goes_on(engine, server, plain):
    server.pause()
    try:
        started = time.monotonic()
        gone = ask(engine, 5)
        print(f"stopped: {time.monotonic() - started:.3f} s")
        assert (gone["cached"], gone["tokens"]) == (0, plain.tokens("small", 5))
        new = ask(engine, 6)
        assert new["tokens"] == plain.tokens("small", 6)
    finally:
        server.resume()
    wait_until(lambda: ask(engine, 5)["cached"] == RESTORED, 30, "hits after the server goes on")


def test_a_power_cut_loses_nothing_that_was_flushed_and_never_gives_other_tokens(engine, server, plain):
    ask(engine, 7)
    saved(engine, server)
    # A clean stop flushes; what comes behind it may be lost.
    server.stop()
    log = Path(server.environment["KVKEEP_POWERCUT_LOG"])
    log.unlink(missing_ok=True)
    server.start()
    wait_until(lambda: ask(engine, 7)["cached"] == RESTORED, 30, "hits after a restart")
    ask(engine, 8)
    time.sleep(0.3)
    server.lose_power()
    taken = powercut.cut(server.folder, log)
    print(f"power cut: {taken} changes taken back")
    server.start()
    for seed in (7, 8):
        found = ask(engine, seed)
        assert found["tokens"] == plain.tokens("small", seed)
    wait_until(lambda: ask(engine, 7)["cached"] == RESTORED, 30, "what was flushed is there after the cut")
    assert ask(engine, 7)["tokens"] == plain.tokens("small", 7)


def test_corrupted_blocks_are_computed_again(engine, server, plain):
    ask(engine, 12)
    saved(engine, server)
    # Neither DRAM nor the list of what was there: else the server itself reads all of it at its start, and finds out.
    server.lose_power()
    (server.folder / "warm-set").unlink(missing_ok=True)
    flipped = flip(server.folder, every=5)
    server.start()
    wait_until(
        lambda: engine.generate(prompt(99, 64), 1) and server.total("kvkeep_connections") > 0, 30, "it is found again"
    )
    restored = []
    for seed in (12, 7, 5):
        found = ask(engine, seed)
        assert found["tokens"] == plain.tokens("small", seed), f"seed {seed}"
        restored.append(found["cached"])
    print(
        f"corrupted: {flipped} bytes; restored tokens: {restored}; failed loads: {engine.kvkeep('load_failures'):.0f}"
    )
    assert server.total("kvkeep_corrupt_copies_total") > 0, "no corrupted block was read: the test shows nothing"
    assert sum(restored) < 3 * RESTORED


def test_the_attention_matters(plain):
    """What the comparisons above are worth: with another past the model says something else."""
    assert plain.tokens("small", 1) != plain.tokens("small", 2)


def test_nothing_was_wrong_and_the_scheduler_never_waited(engine):
    metrics = engine.metrics()
    assert engine.kvkeep("errors") == 0
    steps = metrics["vllm:kvkeep_scheduler_seconds"]
    print(
        f"scheduler: {steps['count']} steps, mean {steps['sum'] / steps['count'] * 1e6:.0f} us, {engine.kvkeep('slow_steps'):.0f} over 5 ms"
    )


def flip(folder, every: int) -> int:
    """One byte in every `every`-th run of 64 KiB of the segments that holds something."""
    flipped = 0
    for segment in sorted((folder / "nvme" / "segments").glob("segment-*")):
        with segment.open("r+b") as file:
            size = segment.stat().st_size
            for n, at in enumerate(range(0, size, 64 << 10)):
                if n % every:
                    continue
                file.seek(at + (40 << 10))
                byte = file.read(1)
                file.seek(at + (40 << 10))
                if byte:
                    file.write(bytes([byte[0] ^ 0x55]))
                    flipped += 1
    return flipped

"""A model with a sliding window: three groups of KV, of which two need the end of a prompt only."""

import pytest
from conftest import NEW_TOKENS, PROMPTS
from harness import BLOCK, Engine, connector, prompt


@pytest.fixture(scope="module")
def engine(server, folder):
    engine = Engine("window", connector(server.endpoint), log=folder / "engine.log").start()
    engine.warm_up()
    yield engine
    engine.close()


@pytest.mark.parametrize("seed", [1, 11, 12, 13])
def test_a_prompt_is_restored_with_its_window(engine, server, plain, seed):
    length, expected = PROMPTS[seed], plain.tokens("window", seed)
    engine.reset()
    first = engine.generate(prompt(seed, length), NEW_TOKENS)
    assert (first["cached"], first["tokens"]) == (0, expected)
    server.wait_quiet()
    engine.reset()
    loaded = engine.kvkeep("load_bytes")
    again = engine.generate(prompt(seed, length), NEW_TOKENS)
    assert (again["cached"], again["tokens"]) == ((length - 1) // BLOCK * BLOCK, expected)
    # Two of six layers see everything; of the others no more than the window (256 tokens) was loaded.
    layer = 2 * 64 * 2 * 2  # bytes a token: keys and values of two heads of 64, two bytes each
    restored = (length - 1) // BLOCK * BLOCK
    window = min(restored, 256 + BLOCK)
    assert engine.kvkeep("load_bytes") - loaded <= layer * (2 * restored + 4 * window)


def test_a_prompt_that_goes_on_is_restored_up_to_where_it_differs(engine, server):
    common = prompt(31, 800)
    engine.reset()
    engine.generate(common + prompt(32, 100), 1)
    server.wait_quiet()
    other = common + prompt(33, 100)
    engine.reset()
    restored = engine.generate(other, NEW_TOKENS)
    assert restored["cached"] == 800
    engine.reset(connector=True)
    computed = engine.generate(other, NEW_TOKENS)
    assert (computed["cached"], computed["tokens"]) == (0, restored["tokens"])
    assert engine.kvkeep("errors") == 0

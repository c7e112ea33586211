"""KVKeep behind transformers: caches saved and restored by prefix, with the same logits to the bit, against a real `kvkeepd`.

tests/engines/run test_transformers.py        one test: -k name
"""

from __future__ import annotations

import time

import pytest
import torch
from harness import Server, wait_until
from kvkeep.connectors import transformers as connector
from kvkeep.connectors.transformers import PrefixStore, Unsupported, of_parameters
from kvkeep.connectors.versions import UnknownVersion
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

BOUND = 5.0
"""Seconds: far above what a lost server may cost, far below a hang."""
SMALL = dict(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)


def model_of(kind=(LlamaForCausalLM, LlamaConfig), seed=0, dtype=torch.bfloat16, **changes):
    """Random weights, made here."""
    torch.manual_seed(seed)
    return kind[0](kind[1](**SMALL | changes)).to(dtype).eval()


def prompt(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(10, 2000, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, ids, cache):
    """Logits, and the cache after it."""
    out = model(ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


def cold(model, ids, split: int | None = None):
    """Without the store. `split`: computed in two steps, as with a restored prefix of so many tokens: a matrix product may round
    otherwise where it has other rows beside the same ones."""
    cache = DynamicCache(config=model.config)
    if split:
        _, cache = run(model, ids[:, :split], cache)
    return run(model, ids[:, split or 0 :], cache)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("transformers") / "data", dram="512MiB", nvme="2GiB").start()
    yield server
    server.close()


@pytest.fixture
def made(server):
    """Makes stores that have reached the server, and closes them."""
    all_made = []

    def make(model, *, at=None, **how):
        store = PrefixStore(model, (at or server).endpoint, **how)
        all_made.append(store)
        wait_until(lambda: is_ready(store), 30, "the namespace is ready")
        return store

    yield make
    for store in all_made:
        store.close()


def is_ready(store) -> bool:
    try:
        return store.namespace.ready(5)
    except connector.kvkeep.Error:
        # Other weights: the connector is telling the store.
        return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "kind", [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)], ids=["llama", "qwen3"]
)
def test_logits_are_the_same_to_the_bit(made, kind, dtype):
    model, ids = model_of(kind, 1, dtype), prompt(1, 500)
    _, cache = cold(model, ids, 448)
    store = made(model)
    assert store.save(ids, cache) == 448
    # In another process's place: a store of its own.
    restored, tokens = made(model).restore(ids)
    assert tokens == restored.get_seq_length() == 448
    for mine, theirs in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :, :448]) and torch.equal(mine.values, theirs.values[:, :, :448])
    expected, _ = cold(model, ids, 448)
    logits, after = run(model, ids[:, tokens:], restored)
    assert torch.equal(logits, expected)
    assert after.get_seq_length() == 500


def test_generated_tokens_are_the_same(made):
    model, ids = model_of(seed=2), prompt(2, 300)
    store = made(model)
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, past_key_values=cold(model, ids[:, :256])[1])
    store.save(ids, cold(model, ids, 256)[1])
    cache, tokens = store.restore(ids)
    assert tokens == 256
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False, past_key_values=cache), expected)


def test_the_longest_common_prefix_is_restored(made):
    model, ids = model_of(seed=3), prompt(3, 400)
    store = made(model)
    store.save(ids, cold(model, ids, 192)[1])
    other = ids.clone()
    other[0, 200] += 1
    cache, tokens = store.restore(other)
    assert tokens == 192
    logits, _ = run(model, other[:, tokens:], cache)
    assert torch.equal(logits, cold(model, other, 192)[0])
    assert store.restore(prompt(4, 400))[1] == 0
    assert store.restore(ids[:, :65])[1] == 64
    assert store.restore(ids[:, :64])[1] == 0, "one token is left to compute"
    assert store.restore([])[1] == 0


def test_a_conversation_grows(made):
    model, ids = model_of(seed=5), prompt(5, 900)
    store, restored = made(model), []
    for end in (200, 450, 900):
        cache, tokens = store.restore(ids[:, :end], session="conversation")
        _, cache = run(model, ids[:, tokens:end], cache)
        assert store.save(ids[:, :end], cache, session="conversation") == end // 64 * 64
        restored.append(tokens)
    assert restored == [0, 192, 448]
    assert store.restore(ids)[1] == 896


def test_more_than_fits_the_staging_memory(made, monkeypatch):
    monkeypatch.setattr(connector, "STAGING_BYTES", 1 << 20)
    model, ids = model_of(seed=6), prompt(6, 1500)
    store = made(model)
    _, cache = cold(model, ids)
    assert store.save(ids, cache) == 1472
    restored, tokens = store.restore(ids)
    assert tokens == 1472
    for mine, theirs in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :, :1472]) and torch.equal(mine.values, theirs.values[:, :, :1472])


def test_a_hole_ends_the_prefix(made):
    model, ids = model_of(seed=7), prompt(7, 400)
    store = made(model)
    store.save(ids, cold(model, ids)[1])
    keys = store._keys(ids[0].tolist(), 6)
    assert store.namespace.remove([keys[3]])[0] == 1
    assert store.restore(ids)[1] == 192


def test_salts_are_apart(made):
    model, ids = model_of(seed=8), prompt(8, 200)
    made(model, salt="alice").save(ids, cold(model, ids)[1])
    assert made(model, salt="bob").restore(ids)[1] == made(model).restore(ids)[1] == 0
    assert made(model, salt="alice").restore(ids)[1] == 192


def test_leases_are_released(made, server):
    model, ids = model_of(seed=9), prompt(9, 200)
    store = made(model)
    store.save(ids, cold(model, ids)[1])
    assert store.restore(ids)[1] == 192
    wait_until(lambda: server.total("kvkeep_leases") == 0, 20, "no leases are left")


def test_other_weights_restore_nothing(tmp_path, made):
    server = Server(tmp_path / "data", dram="128MiB", nvme="512MiB").start()
    try:
        old_model, new_model, ids = model_of(seed=10), model_of(seed=11), prompt(10, 200)
        assert of_parameters(old_model) != of_parameters(new_model)
        old = made(old_model, at=server)
        assert old.save(ids, cold(old_model, ids)[1]) == 192
        new = made(new_model, at=server)
        assert new.restore(ids)[1] == 0
        assert new.save(ids, cold(new_model, ids, 192)[1]) == 192
        # The old ones are not served any more, and do not come in again.
        assert old.restore(ids)[1] == 0
        assert old.save(ids, cold(old_model, ids)[1]) == 0
        cache, tokens = new.restore(ids)
        assert torch.equal(run(new_model, ids[:, tokens:], cache)[0], cold(new_model, ids, tokens)[0])
    finally:
        server.close()


def test_one_changed_weight_is_another_revision():
    model = model_of(seed=12)
    before = of_parameters(model)
    assert of_parameters(model_of(seed=12)) == before
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] += 1
    assert of_parameters(model) != before


def test_another_model_is_another_namespace(made):
    ids = prompt(13, 200)
    model, deeper = model_of(seed=13), model_of(seed=13, num_hidden_layers=5)
    made(model).save(ids, cold(model, ids)[1])
    assert made(deeper).restore(ids)[1] == 0


def test_a_cache_of_another_model_is_refused(made):
    ids = prompt(14, 200)
    model = model_of(seed=14)
    store = made(model)
    for changes, message in (
        (dict(num_hidden_layers=5), "4 layers"),
        (dict(num_key_value_heads=2), "2 heads"),
        (dict(dtype=torch.float32), "float32"),
    ):
        with pytest.raises(Unsupported, match=message):
            store.save(ids, cold(model_of(seed=14, **changes), ids)[1])
    with pytest.raises(Unsupported, match="2 sequences"):
        store.save(ids, cold(model, ids.repeat(2, 1))[1])
    with pytest.raises(ValueError, match="only 100 are named"):
        store.save(ids[:, :100], cold(model, ids)[1])


def test_models_whose_cache_is_something_else_are_refused(server):
    window = Gemma3TextConfig(
        **SMALL | dict(head_dim=32, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 2)
    )
    with pytest.raises(Unsupported, match="DynamicSlidingWindowLayer"):
        PrefixStore(window, server.endpoint, revision="1", dtype=torch.bfloat16)
    rope = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(Unsupported, match="longer prompt"):
        PrefixStore(rope, server.endpoint, revision="1", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="revision"):
        PrefixStore(LlamaConfig(**SMALL), server.endpoint)


def test_an_unknown_release_is_refused(server, monkeypatch):
    monkeypatch.setattr(connector.transformers, "__version__", "6.0.0")
    with pytest.raises(UnknownVersion, match=r"supports transformers 5\.19\.\*, this is 6\.0\.0"):
        PrefixStore(model_of(), server.endpoint)
    PrefixStore(model_of(), server.endpoint, any_version=True).close()


def test_a_killed_server_is_a_miss(tmp_path, made):
    server = Server(tmp_path / "data", dram="128MiB", nvme="512MiB").start()
    try:
        model, ids = model_of(seed=15), prompt(15, 300)
        store = made(model, at=server)
        _, cache = cold(model, ids)
        assert store.save(ids, cache) == 256
        wait_until(lambda: server.total("kvkeep_dirty_bytes") == 0 and server.metrics(), 30, "the server is quiet")
        server.kill()
        started = time.monotonic()
        assert store.restore(ids)[1] == 0
        assert store.save(ids, cache) == 0
        assert time.monotonic() - started < BOUND
        server.start()
        wait_until(lambda: store.restore(ids)[1] == 256, 30, "hits again")
    finally:
        server.close()

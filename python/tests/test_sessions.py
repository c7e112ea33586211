"""Conversations as objects of the server."""

import array

import pytest
from conftest import TOKENS, blocks, chain

import kvkeep


def test_a_conversation_is_kept_restored_and_taken_down(ns):
    s = ns.sessions
    info, made = s.open("conversation 7", cls="durable", ttl=3600, priority=1, attributes={"user": "a"})
    assert made and (info.id, info.cls, info.state) == ("conversation 7", "durable", "open")
    assert (info.positions, info.tokens) == (0, 0)
    assert info.attributes == {"user": "a"} and info.ttl == 3600 and 0 < info.expires_in <= 3600
    assert info.parent is None and info.pinned is None and info.revision_matches and not info.finished
    keys, tokens = chain(4), list(range(100, 100 + 4 * TOKENS + 3))
    assert ns.put_from(keys, blocks(4), cls="durable").all_kept
    assert s.append(info.id, b"".join(keys), key_len=32, from_position=0, token_ids=tokens) == (4, len(tokens), False)
    assert s.append(info.id, keys, from_position=0, token_ids=array.array("i", tokens)) == (4, len(tokens), True)
    with pytest.raises(kvkeep.Error) as conflict:
        s.append(info.id, chain(1), from_position=2)
    assert conflict.value.kind in ("conflict", "unavailable") and str(conflict.value)
    assert s.keys(info.id) == keys
    assert (s.tokens(info.id).ids, s.tokens(info.id).total) == (tokens, len(tokens))
    assert s.tokens(info.id, 60).ids == tokens[60:] and s.tokens(info.id, 3, 5).ids == tokens[3:8]
    restored = s.restore(info.id, lease=10, call=kvkeep.Call("restore"))
    assert restored.is_whole and restored.usable_positions == 4 and restored.compute_from_token == 4 * TOKENS
    assert (restored.positions, restored.total_positions, restored.missing, restored.late) == (4, 4, [], False)
    assert restored.bytes == restored.total_bytes and restored.tokens == len(tokens)
    ns.release(restored.lease_id)
    forked, made = s.fork(info.id, "conversation 7 b", 2)
    assert made and forked.parent == ("conversation 7", 2) and s.keys(forked.id) == keys[:2]
    assert s.pin(info.id).pinned == "dram" and s.unpin(info.id).pinned is None
    assert s.hint(info.id, due_in=60.0) == 4 and s.hint(info.id, finished=True) == 4
    cut = s.truncate(info.id, 1, keep_tokens=True)
    assert (cut.positions, cut.tokens) == (1, len(tokens))
    assert [i.id for i in s.list("conversation")] == ["conversation 7", "conversation 7 b"]
    assert [i.id for i in s.list(attributes={"user": "nobody"})] == []
    assert s.close(forked.id).state == "closed" and [i.id for i in s.list(state="closed")] == [forked.id]
    assert s.get(info.id).appends >= 1
    assert s.delete(info.id) and not s.delete(info.id)
    with pytest.raises(kvkeep.Error) as unknown:
        s.get(info.id)
    assert unknown.value.kind == "unknown_session"


def test_content_that_has_no_token_ids(ns):
    s = ns.sessions
    s.open("with an image")
    keys = chain(1)
    assert ns.put_from(keys, blocks(1)).all_kept
    tokens, content = list(range(TOKENS)), [(2, 9, b"image 1")]
    s.append("with an image", keys, from_position=0, token_ids=tokens, content=content)
    assert s.tokens("with an image").content == content and not s.tokens("with an image").damaged


def test_a_hint_says_something(ns):
    ns.sessions.open("quiet")
    with pytest.raises(ValueError, match="due_in"):
        ns.sessions.hint("quiet")

"""Blocks read in place, in the server's memory: nothing is copied, and no buffer ever dangles."""

import gc

import pytest
from conftest import BLOCK, blocks, chain, eventually, example, layout
from test_forks import run

import kvkeep


def stored(ns: kvkeep.Namespace, n: int) -> tuple[list[bytes], list[bytearray]]:
    keys, written = chain(n), blocks(n)
    assert ns.put_from(keys, written).all_kept
    return keys, written


def mapped(ns: kvkeep.Namespace, keys: list[bytes], lease: float = 30, **more) -> kvkeep.MappedMatch:
    return ns.match_mapped(kvkeep.Query(keys, lease=lease, **more))


def test_blocks_are_read_where_they_lie(ns):
    keys, written = stored(ns, 3)
    with mapped(ns, keys + chain(1)) as here:
        assert (here.found.boundary_positions, here.found.reason) == (3, "never_stored")
        assert [(p.item, p.group, p.shard, p.status, p.reason) for p in here.parts] == [
            (n, 0, 0, kvkeep.HIT, None) for n in range(3)
        ]
        for part, bytes_put in zip(here.parts, written, strict=True):
            view = memoryview(part.block)
            assert view.readonly and view.nbytes == len(part.block) == BLOCK and view == bytes_put
            assert part.block.is_still_there() and part.block.version > 0 and part.block.address > 0
        again = mapped(ns, keys[:1])
        assert again.parts[0].block.address == here.parts[0].block.address, "the same memory, mapped once"
        assert again.release() and "3 parts" in repr(here) and "there" in repr(part.block)
        with pytest.raises(TypeError):
            view[0] = 1
        with pytest.raises(BufferError):
            ns.get_into(keys[:1], [part.block])
        mine = chain(1)
        assert ns.put_from(mine, [part.block]).all_kept, "a block of the store is a place to put from"
        back = bytearray(BLOCK)
        assert ns.get_into(mine, [back]).all_hit and back == written[2]


def test_the_example_of_the_documentation(ns):
    keys, written = stored(ns, 2)
    said = {"kvkeep": kvkeep, "ns": ns, "keys": keys, "call": kvkeep.Call("docs")}
    exec(example("Blocks read in place"), said)  # noqa: S102
    assert said["blocks"] == [(n, 0, 0, bytes(written[n])) for n in range(2)]


def test_parts_have_their_group_and_shard(server):
    groups = [kvkeep.Group(16, BLOCK, shards=2), kvkeep.Group(16, 4096)]
    parts = [(0, 0), (0, 1), (1, 0)]
    with server.namespace(layout(groups=groups, tp=2)) as ns:
        keys, written = chain(2), [*blocks(2), *blocks(1, 4096), *blocks(2), *blocks(1, 4096)]
        assert ns.put_from(keys, written, parts=parts).all_kept
        with mapped(ns, keys) as here:
            told = {(p.item, p.group, p.shard): memoryview(p.block).tobytes() for p in here.parts}
        assert told == {(n // 3, *parts[n % 3]): bytes(written[n]) for n in range(6)}


def test_the_lease_is_given_back_when_nobody_reads_any_more(ns):
    keys, written = stored(ns, 2)
    here = mapped(ns, keys)
    lease, view = here.found.lease_id, memoryview(here.parts[0].block)
    assert not here.release(), "somebody reads"
    block = here.parts[0].block
    with pytest.raises(BufferError, match="released"):
        memoryview(block)
    assert ns.renew(lease) is not None and view == written[0] and block.is_still_there()
    view.release()
    assert here.release() and here.release()
    eventually(lambda: ns.renew(lease) is None)

    here = mapped(ns, keys)
    lease, view = here.found.lease_id, memoryview(here.parts[1].block)
    del here
    gc.collect()
    assert ns.renew(lease) is not None and view == written[1], "a buffer keeps it"
    del view
    eventually(lambda: ns.renew(lease) is None)


def test_matches_of_one_request_share_a_lease_and_the_last_one_gives_it_back(ns):
    keys, written = stored(ns, 2)
    first, second = (mapped(ns, keys, request_id="r") for _ in range(2))
    lease = first.found.lease_id
    assert second.found.lease_id == lease and first.release() and first.release()
    for _ in range(20):  # what a release would send has been sent
        assert ns.renew(lease) is not None and memoryview(second.parts[1].block) == written[1]
    assert second.release()
    eventually(lambda: ns.renew(lease) is None)


def test_a_block_that_lost_its_lease_says_so(ns):
    keys, _ = stored(ns, 1)
    here = mapped(ns, keys)
    block, view = here.parts[0].block, memoryview(here.parts[0].block)
    ns.release(here.found.lease_id)  # behind its back, as a lease ends whose time has passed
    eventually(lambda: ns.renew(here.found.lease_id) is None)
    assert block.is_still_there() and ns.remove(keys) == (1, 0, 0)
    eventually(lambda: not block.is_still_there())
    assert len(view.tobytes()) == BLOCK and "gone" in repr(block), "still mapped, and worthless"


def test_nothing_dangles_when_the_namespace_or_the_server_is_gone(own):
    ns = own.namespace()
    keys, written = stored(ns, 2)
    here = mapped(ns, keys)
    view = memoryview(here.parts[0].block)
    ns.close()
    other = memoryview(here.parts[1].block)
    assert view == written[0] and other == written[1] and here.parts[0].block.is_still_there()
    own.kill()
    assert view == written[0] and other == written[1]
    own.start()
    with own.namespace() as another:
        stored(another, 16)
        assert len(view.tobytes()) == BLOCK
    assert not here.release()
    del here, view, other
    gc.collect()


def test_misses_are_values(own, tmp_path):
    http = next(f"http://{word.removeprefix('listen=')}" for word in own.ready.split() if word.startswith("listen="))
    with own.namespace(patience=0.1) as ns:
        keys = chain(2)
        eventually(lambda: ns.put_from(keys, blocks(2)).all_kept)
        none = mapped(ns, chain(1))
        assert none.parts == () and none.found.reason == "never_stored" and none.found.lease is None
        assert none.release()
        assert ns.match_mapped(kvkeep.Query(keys)).parts == (), "a query without a lease"
        for way in ("port", "grpc"):
            with kvkeep.Client(http, way=way, patience=5.0).namespace(ns.name, layout(), "weights") as far:
                assert far.ready(30)
                found = mapped(far, keys)
                assert found.parts == () and found.found.boundary_positions == 2 and found.found.lease is not None
        with pytest.raises(kvkeep.Error, match="128"):
            mapped(ns, [b"x" * 129])
        own.kill()
        lost = mapped(ns, keys, statuses=True)
        assert lost.parts == () and lost.found.reason in ("unreachable", "late")
        assert lost.found.statuses == bytes([kvkeep.MISS]) * 2
        ns.close()
        with pytest.raises(kvkeep.Error, match="closed"):
            mapped(ns, keys)


def test_a_forked_child_reads_zeroes_and_leaves_the_lease_alone(server):
    run(
        server,
        """
        import gc
        ns = namespace()
        keys, written = chain(3), blocks(3)
        assert ns.put_from(keys, written).all_kept
        query = kvkeep.Query(keys, lease=60)
        here = ns.match_mapped(query)
        views = [memoryview(part.block) for part in here.parts]
        block, lease = here.parts[0].block, here.found.lease_id

        def child():
            assert not any(any(view) for view in views), "zeroes, and not a crash"
            assert not block.is_still_there()
            try:
                memoryview(block)
                raise AssertionError("a buffer of what is not there")
            except BufferError as e:
                assert "match again" in str(e)
            assert ns.ready(30)
            with ns.match_mapped(query) as mine:
                assert [memoryview(p.block).tobytes() for p in mine.parts] == written, "and its own it may read"
                assert all(p.block.is_still_there() for p in mine.parts)
                in_child(lambda: any(views[0]) and 1 / 0)
            assert not here.release()
            views.clear()
            assert here.release()
            for _ in range(20):  # what a release would send has been sent
                assert ns.match(keys).boundary_positions == 3

        in_child(child)

        def child_that_drops_all():
            global here, views, block
            del here, views, block
            gc.collect()

        in_child(child_that_drops_all)
        assert [view.tobytes() for view in views] == written and block.is_still_there()
        assert ns.renew(lease) is not None, "the lease is the parent's still"
        """,
    )


def test_an_interpreter_ends_with_buffers_of_the_server(server):
    run(
        server,
        """
        ns = namespace()
        keys = chain(2)
        assert ns.put_from(keys, blocks(2)).all_kept
        here = ns.match_mapped(kvkeep.Query(keys, lease=60))
        kept = [here, memoryview(here.parts[0].block)]
        kept.append(kept)
        """,
    )

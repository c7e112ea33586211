"""Bytes go there and back by every kind of memory that Python has."""

import array
import ctypes
import mmap
import os
import tempfile

import pytest
from conftest import BLOCK, blocks, chain, collect, layout

import kvkeep


def _mmap():
    return mmap.mmap(-1, BLOCK)


def _array():
    return array.array("i", bytes(BLOCK))


def _cast():
    return memoryview(bytearray(BLOCK)).cast("f", [16, BLOCK // 64])


def _slice():
    return memoryview(bytearray(3 * BLOCK))[BLOCK : 2 * BLOCK]


def _numpy():
    return pytest.importorskip("numpy").zeros((4, BLOCK // 8), dtype="float16")


def _region():
    return kvkeep.Region(BLOCK)


def _region_slice():
    return memoryview(kvkeep.Region(4 * BLOCK))[BLOCK : 2 * BLOCK]


KINDS = {
    "bytearray": lambda: bytearray(BLOCK),
    "memoryview": lambda: memoryview(bytearray(BLOCK)),
    "slice": _slice,
    "array": _array,
    "cast": _cast,
    "ctypes": lambda: (ctypes.c_char * BLOCK)(),
    "mmap": _mmap,
    "numpy": _numpy,
    "region": _region,
    "region_slice": _region_slice,
}


def raw(buffer) -> bytes:
    return memoryview(buffer).cast("B").tobytes() if memoryview(buffer).contiguous else bytes(buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_from_one_kind_of_buffer_comes_back_in_it(ns, kind):
    keys, written = chain(3), blocks(3)
    sources = [KINDS[kind]() for _ in keys]
    for source, block in zip(sources, written, strict=True):
        memoryview(source).cast("B")[:] = block
    assert ns.put_from(keys, sources).all_kept
    places = [KINDS[kind]() for _ in keys]
    got = ns.get_into(keys, places)
    assert (got.hits, got.all_hit, len(got), got.reason) == (3, True, 3, None)
    assert got.lengths == [BLOCK] * 3 and got.statuses == bytes([kvkeep.HIT]) * 3
    assert [raw(place) for place in places] == written


def test_bytes_can_be_put_and_not_filled(ns):
    keys = chain(1)
    block = os.urandom(BLOCK)
    assert ns.put_from(keys, [block]).all_kept
    with pytest.raises(BufferError, match="read-only"):
        ns.get_into(keys, [bytes(BLOCK)])
    with pytest.raises(BufferError, match="read-only"):
        ns.get_into(keys, [kvkeep.Place(bytes(BLOCK))])
    place = bytearray(BLOCK)
    assert ns.get_into(keys, [place]).all_hit and place == block


@pytest.mark.parametrize("shared", [False, True])
def test_raw_addresses(ns, shared):
    memory = kvkeep.Region(4 * BLOCK) if shared else (ctypes.c_char * (4 * BLOCK))()
    address = memory.address if shared else ctypes.addressof(memory)
    view = memoryview(memory).cast("B")
    keys, written = chain(2), blocks(2)
    for n, block in enumerate(written):
        view[n * BLOCK : (n + 1) * BLOCK] = block
    assert ns.put_from(keys, [(address + n * BLOCK, BLOCK) for n in range(2)]).all_kept
    places = [kvkeep.Place((address, 4 * BLOCK), n * BLOCK, BLOCK) for n in (3, 2)]
    assert [place.is_shared for place in places] == [shared] * 2
    assert ns.get_into(keys, places).all_hit
    assert view[3 * BLOCK :] == written[0] and view[2 * BLOCK : 3 * BLOCK] == written[1]


def test_a_region_and_other_memory_go_in_one_call(ns):
    keys, written = chain(2), blocks(2)
    region, other = kvkeep.Region(BLOCK), bytearray(BLOCK)
    assert ns.put_from(keys, [written[0], written[1]]).all_kept
    assert ns.get_into(keys, [region, other]).all_hit
    assert memoryview(region) == written[0] and other == written[1]


def test_a_region_is_found_by_its_addresses_as_long_as_it_lives(ns):
    region = kvkeep.Region(2 * BLOCK)
    assert ns.register_region(region)
    assert (2 * BLOCK, True) in ns.describe()["regions"]
    inside = memoryview(region)[BLOCK:]
    assert kvkeep.Place(inside).is_shared and kvkeep.Place((region.address, BLOCK)).is_shared
    assert not kvkeep.Place(bytearray(BLOCK)).is_shared
    # The view keeps the region, and so does a place.
    del region
    inside[0] = 7
    place = kvkeep.Place(inside)
    del inside
    (key,) = chain(1)
    assert ns.put_from([key], [place]).all_kept
    back = bytearray(BLOCK)
    assert ns.get_into([key], [back]).all_hit and back[0] == 7


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_a_file_that_an_engine_has_mapped_is_a_region_under_the_engines_addresses(ns, by):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4 * BLOCK)
        engines = mmap.mmap(file.fileno(), 4 * BLOCK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(engines))
        if by == "path":
            region = kvkeep.Region.open(file.name, also_at=address)
        else:
            region = kvkeep.Region.from_fd(file.fileno(), 0, 4 * BLOCK, also_at=address)
        assert len(region) == 4 * BLOCK
        keys, written = chain(1), blocks(1)
        assert ns.put_from(keys, written).all_kept
        place = kvkeep.Place(memoryview(engines)[2 * BLOCK : 3 * BLOCK])
        assert place.is_shared
        assert ns.get_into(keys, [place]).all_hit
        assert engines[2 * BLOCK : 3 * BLOCK] == written[0]
        del region
        assert not kvkeep.Place((address, BLOCK)).is_shared, "forgotten with the region"


def test_memory_that_took_the_place_of_a_region_is_no_region(ns):
    """An engine frees its pool, the region is still known, and another pool lies at the same addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4 * BLOCK)
        engines = mmap.mmap(file.fileno(), 4 * BLOCK)
        engines[:] = bytes([1]) * (4 * BLOCK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(engines))
        region = kvkeep.Region.from_fd(file.fileno(), 0, 4 * BLOCK, also_at=address)
        assert kvkeep.Place((address, BLOCK)).is_shared
        # The second half is other memory now.
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        later = address + 2 * BLOCK
        assert libc.mmap(later, 2 * BLOCK, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == later
        assert kvkeep.Place((address, 2 * BLOCK)).is_shared
        assert not kvkeep.Place((later, BLOCK)).is_shared and not kvkeep.Place((address, 3 * BLOCK)).is_shared
        keys, written = chain(1), blocks(1)
        ctypes.memmove(later, bytes(written[0]), BLOCK)
        assert ns.put_from(keys, [(later, BLOCK)]).all_kept
        back = bytearray(BLOCK)
        assert ns.get_into(keys, [back]).all_hit and back == written[0]
        assert ns.get_into(keys, [(later + BLOCK, BLOCK)]).all_hit
        assert ctypes.string_at(later + BLOCK, BLOCK) == written[0]
        del region


def test_a_region_is_not_where_its_file_is_not_mapped():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4 * BLOCK)
        shared = mmap.mmap(file.fileno(), 4 * BLOCK)
        private = mmap.mmap(file.fileno(), 4 * BLOCK, flags=mmap.MAP_PRIVATE)
        for wrong in (
            ctypes.addressof(ctypes.c_char.from_buffer(private)),
            ctypes.addressof(ctypes.c_char.from_buffer(shared)) + BLOCK,
            ctypes.addressof(ctypes.c_char.from_buffer(bytearray(4 * BLOCK))),
        ):
            with pytest.raises(kvkeep.Error, match="also_at"):
                kvkeep.Region.from_fd(file.fileno(), 0, 4 * BLOCK, also_at=wrong)


def test_a_part_that_does_not_fit_is_a_miss(ns):
    keys = chain(2)
    assert ns.put_from(keys, blocks(2)).all_kept
    got = ns.get_into(keys, [bytearray(BLOCK), bytearray(BLOCK - 1)])
    assert (got.hits, got.reason) == (1, "format")
    assert kvkeep.REASONS[got.reasons[1]] == "format" and got.reasons[0] == 0
    stored = ns.put_from(chain(1), [bytearray(BLOCK - 1)])
    assert stored.outcomes == bytes([kvkeep.REFUSED]) and stored.error.kind == "wrong_size"
    assert "group" in str(ns.put_from(chain(1), blocks(1), parts=[(3, 0)]).error)


def test_a_buffer_is_held_until_its_call_has_ended(server):
    with server.namespace(in_flight_max=1) as ns:
        keys = chain(1)
        assert ns.put_from(keys, blocks(1)).all_kept
        ns.inject("silent")  # it will take its time
        place = bytearray(BLOCK)
        assert ns.submit_get(keys, [place]) is not None
        with pytest.raises(BufferError):
            place.clear()
        other = bytearray(BLOCK)
        assert ns.submit_get(keys, [other]) is None, "the queue has one call"
        other.clear()  # a busy queue holds nothing
        ns.cancel_request(b"")
        collect(ns, 0, 1)
        place.clear()
        ns.inject("none")


def test_a_buffer_is_let_go_by_a_call_that_waited(ns):
    keys, written = chain(1), blocks(1)
    assert ns.put_from(keys, written).all_kept
    written[0].clear()
    place = bytearray(BLOCK)
    assert ns.get_into(keys, [place]).all_hit
    place.clear()
    held = kvkeep.Place(other := bytearray(BLOCK))
    with pytest.raises(BufferError):
        other.clear()
    del held
    ns.poll()  # any call lets go
    other.clear()


def test_parts_are_counted_key_by_key(server):
    groups = [kvkeep.Group(16, BLOCK, shards=2), kvkeep.Group(32, BLOCK // 2, rule=("window", 64), replicated=True)]
    with server.namespace(layout(groups=groups)) as ns:
        keys = chain(4)
        both = [(0, 0), (0, 1)]
        parts = [both, [*both, (1, 0)]] * 2
        sizes = [BLOCK, BLOCK, BLOCK, BLOCK, BLOCK // 2] * 2
        written = [bytearray(os.urandom(size)) for size in sizes]
        stored = ns.put_from(keys, written, parts=parts)
        assert stored.all_kept and len(stored) == 10
        assert ns.match(keys).boundary_positions == 4
        places = [bytearray(size) for size in sizes]
        assert ns.get_into(keys, places, parts=parts).all_hit and places == written
        shard = [bytearray(BLOCK) for _ in keys]
        assert ns.get_into(b"".join(keys), shard, key_len=32, parts=[(0, 1)]).all_hit
        assert shard == [written[n] for n in (1, 3, 6, 8)]

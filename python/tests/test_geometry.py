"""An engine's blocks, said once and then named by their ids."""

import array

import pytest
from conftest import BLOCK, blocks, chain, collect

import kvkeep

LAYERS = 4
RUN = BLOCK // LAYERS
BLOCKS = 8


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_lie_where_layers_and_strides_say(ns, shared):
    memory = kvkeep.Region(BLOCKS * BLOCK) if shared else bytearray(BLOCKS * BLOCK)
    # Per layer all blocks, one behind the other.
    layers = kvkeep.Place(memory, 0, RUN, stride=BLOCKS * RUN, count=LAYERS)
    geometry = kvkeep.Geometry([(layers, RUN)], BLOCKS)
    assert (geometry.blocks, geometry.block_bytes, geometry.is_shared) == (BLOCKS, BLOCK, shared)
    view = memoryview(memory)
    keys, written = chain(3), blocks(3)
    assert ns.put_from(keys, written).all_kept
    ids = [5, 0, 7]
    assert ns.get_into(keys, geometry, ids).all_hit
    for block, bytes_of in zip(ids, written, strict=True):
        for layer in range(LAYERS):
            at = (layer * BLOCKS + block) * RUN
            assert view[at : at + RUN] == bytes_of[layer * RUN : (layer + 1) * RUN], (block, layer)
    # And out of it, by ids in a buffer.
    others = chain(3)
    assert ns.put_from(others, geometry, array.array("i", ids)).all_kept
    places = [bytearray(BLOCK) for _ in others]
    assert ns.get_into(others, places).all_hit and places == written
    assert ns.submit_get(keys, geometry, array.array("q", [1, 2, 3])) is not None
    assert ns.get_into(keys, geometry, range(1, 4)).all_hit
    (done,) = collect(ns, 0, 1)
    assert done.got.all_hit
    assert ns.get_into([others[0]], [geometry.place(6)]).all_hit
    assert view[6 * RUN : 7 * RUN] == written[0][:RUN]


def test_a_block_may_lie_in_several_areas(ns):
    keys_area, values_area = kvkeep.Region(BLOCKS * BLOCK // 2), kvkeep.Region(BLOCKS * BLOCK // 2)
    half = BLOCK // 2
    geometry = kvkeep.Geometry(
        [(keys_area.place(0, half), half), (kvkeep.Place(values_area, 0, half), half)],
        BLOCKS,
    )
    keys, written = chain(1), blocks(1)
    assert ns.put_from(keys, written).all_kept
    assert ns.get_into(keys, geometry, [3]).all_hit
    assert memoryview(keys_area)[3 * half : 4 * half] == written[0][:half]
    assert memoryview(values_area)[3 * half : 4 * half] == written[0][half:]
    place = keys_area.place(0, half) + values_area.place(half, half)
    assert len(place) == BLOCK and ns.get_into(keys, [place]).all_hit
    assert memoryview(values_area)[half : 2 * half] == written[0][half:]


def test_numpy_ids(ns):
    numpy = pytest.importorskip("numpy")
    memory = numpy.zeros((BLOCKS, BLOCK), dtype=numpy.uint8)
    geometry = kvkeep.Geometry([(kvkeep.Place(memory, 0, BLOCK), BLOCK)], BLOCKS)
    keys, written = chain(2), blocks(2)
    assert ns.put_from(keys, written).all_kept
    for kind in (numpy.int32, numpy.int64, numpy.uint32):
        memory[:] = 0
        assert ns.get_into(keys, geometry, numpy.array([6, 2], dtype=kind)).all_hit
        assert memory[6].tobytes() == written[0] and memory[2].tobytes() == written[1]


def test_what_does_not_fit_is_told():
    memory = bytearray(4 * BLOCK)
    base = kvkeep.Place(memory, 0, BLOCK)
    kvkeep.Geometry([(base, BLOCK)], 4)
    for areas, count in [([(base, BLOCK)], 5), ([(base, BLOCK - 1)], 2), ([], 1), ([(base, BLOCK)], 0)]:
        with pytest.raises(kvkeep.Error) as error:
            kvkeep.Geometry(areas, count)
        assert error.value.kind == "invalid_argument"
    with pytest.raises(kvkeep.Error, match="no such block"):
        kvkeep.Geometry([(base, BLOCK)], 4).place(4)
    for more in ({"offset": 4 * BLOCK}, {"offset": BLOCK, "bytes": 4 * BLOCK}, {"bytes": 9, "stride": 8, "count": 2}):
        with pytest.raises(kvkeep.Error, match="runs"):
            kvkeep.Place(memory, **more)

"""SGLang's own host pools on a machine without a GPU, its own factory for a storage backend, and what the tests of both share."""

from __future__ import annotations

import pytest
import sglang.srt.mem_cache.pool_host.base as base
import torch
from harness import Server
from sglang.srt.mem_cache.device_pool_info import KVBuffers, MambaStateBufferInfo, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

# Of a small machine, SGLang would leave more free than there is.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 1 << 30
PAGE = 64
CPU = torch.device("cpu")


def _pointers(tensors) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


def mha_pool(
    layout: str, *, pages: int = 64, layers: int = 4, heads: int = 4, dim: int = 64, page: int = PAGE, shm: bool = False
):
    """`pages` pages of keys and values."""
    k, v = ([torch.zeros(page, heads, dim, dtype=torch.bfloat16) for _ in range(layers)] for _ in "kv")
    known = {"k": tuple(k), "v": tuple(v), "k_data_ptrs": _pointers(k), "v_data_ptrs": _pointers(v)}
    info = MHABufferInfo(
        buffers=KVBuffers(**{f: known.get(f) for f in KVBuffers.__struct_fields__}),
        page_size=page,
        head_num=heads,
        head_dim=dim,
        v_head_dim=dim,
        dtype=torch.bfloat16,
        device=CPU,
    )
    return MHATokenToKVPoolHost(
        info,
        float(pages - 1),
        0,
        page,
        layout,
        pin_memory=False,
        device="cpu",
        allocator_type="shm" if shm else "default",
        device_capacity_tokens=page,
        start_layer=0,
        end_layer=layers,
    )


def mla_pool(layout: str, *, pages: int = 64, layers: int = 4, page: int = PAGE):
    """Of a model whose tensor-parallel ranks all hold the same."""
    rows = tuple(torch.zeros(page, 1, 128 + 64, dtype=torch.bfloat16) for _ in range(layers))
    known = dict(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(layers)),
        device_layer_num=layers,
        page_size=page,
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        kv_cache_dim=128 + 64,
        dtype=torch.bfloat16,
        device=CPU,
    )
    info = MLABufferInfo(**{f: v for f, v in known.items() if f in MLABufferInfo.__struct_fields__})
    return MLATokenToKVPoolHost(
        info,
        float(pages - 1),
        0,
        page,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=page,
        start_layer=0,
        end_layer=layers,
        target_layer_num=layers,
    )


def mamba_pool(*, slots: int = 32, layers: int = 3, shm: bool = False):
    """Recurrent states: a slot is one state of all layers, in two allocations."""
    state = torch.zeros(layers, slots, 4, 16, 16, dtype=torch.float32)
    conv = torch.zeros(layers, slots, 64, 3, dtype=torch.bfloat16)
    return MambaPoolHost(
        MambaStateBufferInfo(temporal=state, conv=(conv,)),
        1.0,
        0,
        device_capacity=slots,
        pin_memory=False,
        device="cpu",
        allocator_type="shm" if shm else "default",
        layout="page_first",
    )


def fill(pool, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for buffer in pool.kv_buffer if isinstance(pool.kv_buffer, (list, tuple)) else [pool.kv_buffer]:
        as_bytes = buffer.view(-1).view(torch.int16)
        as_bytes.copy_(torch.randint(-30000, 30000, as_bytes.shape, dtype=torch.int16, generator=source))


def page_of(pool, page: int) -> bytes:
    """What the engine itself reads as the page's content."""
    return pool.get_data_page(page * pool.page_size).contiguous().view(torch.uint8).numpy().tobytes()


def indices(pool, pages) -> torch.Tensor:
    size = pool.page_size
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


def config(
    endpoint: str,
    *,
    rank: int = 0,
    ranks: int = 1,
    mla: bool = False,
    cp: int = 1,
    stage: int = 0,
    stages: int = 1,
    interface=1,
    **options,
):
    return HiCacheStorageConfig(
        tp_rank=rank,
        tp_size=ranks,
        pp_rank=stage,
        pp_size=stages,
        attn_cp_rank=0,
        attn_cp_size=cp,
        is_mla_model=mla,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="local/test",
        extra_config={
            "backend_name": "kvkeep",
            "module_path": "kvkeep.connectors.sglang",
            "class_name": "KVKeepStorage",
            "interface_v1": interface,
            "kvkeep": {"endpoint": endpoint, "revision": "weights 1"} | options,
        },
    )


def backend(endpoint: str, pool, **how):
    """As SGLang's cache controller makes it."""
    made = StorageBackendFactory.create_backend("dynamic", config(endpoint, **how), pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made


def ready(made) -> None:
    """So that a test sees no miss of the first moment."""
    assert made.wait_ready(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("sglang") / "data", dram="768MiB", nvme="2GiB").start()
    yield server
    server.close()


@pytest.fixture
def own_server(tmp_path):
    """One that a test may kill."""
    server = Server(tmp_path / "data", dram="256MiB", nvme="1GiB").start()
    yield server
    server.close()


@pytest.fixture
def made(server):
    """Makes backends, and closes them."""
    all_made = []

    def make(pool, *, at=None, **how):
        all_made.append(backend((at or server).endpoint, pool, **how))
        ready(all_made[-1])
        return all_made[-1]

    yield make
    for one in all_made:
        one.close()


_next = iter(range(1 << 40))


def page_keys(count: int) -> list[str]:
    """Hashes that no other test has."""
    return [f"{next(_next):064x}" for _ in range(count)]


def same(pool, pages, other, other_pages) -> bool:
    return all(page_of(pool, a) == page_of(other, b) for a, b in zip(pages, other_pages, strict=True))

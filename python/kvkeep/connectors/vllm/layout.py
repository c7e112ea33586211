"""How vLLM's KV looks to the store, and where it lies.

| vLLM | store |
|---|---|
| tokens of one hash | tokens per key |
| KV cache group | group, in vLLM's order: full attention `all`, sliding window `window`, recurrent state `state` |
| tensor-parallel rank | shard; one for all where every rank holds the same (MLA) |
| block of a group, all its layers | one part: the layers' pages one behind the other, in the group's order |
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
from dataclasses import dataclass

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes, resolve_none_hash_seed
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

import kvkeep

SHARE_MIN = 64 << 20
"""Memory below this is not shared with the server but copied through the socket: allocators put only larger blocks on pages of
their own, and pages are what can be shared."""
_MAP_FIXED = 0x10


class Unsupported(ValueError):
    """This model or configuration has KV that the connector cannot store yet."""


@dataclass(frozen=True)
class Shape:
    """What the scheduler and the workers know alike of an engine's KV."""

    format: kvkeep.Format
    tokens_per_key: int
    tokens_per_block: tuple[int, ...]
    """Per group."""
    window: tuple[int | None, ...]
    """Per group: tokens of its window; None where all are needed."""
    block_bytes: tuple[int, ...]
    """Per group, of one shard's part."""
    replicated: bool
    """Every tensor-parallel rank holds the same bytes: the first one stores them."""
    aligned_to: int
    """Tokens: what is loaded ends at a multiple of this."""

    @property
    def groups(self) -> int:
        return len(self.tokens_per_block)


def shape_of(vllm_config, kv_cache_config, name: str, prefill_us_per_token: int) -> Shape:
    """Raises Unsupported with what stands in the way."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for what, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
        ("decode context", parallel.decode_context_parallel_size),
    ):
        if size > 1:
            raise Unsupported(f"{what} parallelism is not supported")
    if not cache.enable_prefix_caching:
        raise Unsupported("blocks have no keys without prefix caching (--enable-prefix-caching)")
    groups = kv_cache_config.kv_cache_groups
    if kv_cache_config.transfer_group_ids != tuple(range(len(groups))):
        raise Unsupported("a KV cache group is not open to connectors")
    _, tokens_per_key = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    tp, replicas = parallel.tensor_parallel_size, kv_cache_config.kv_tp_replicas
    specs = [_layer_specs(group) for group in groups]
    replicated = tp > 1 and replicas == tp and all(isinstance(s, MLAAttentionSpec) for group in specs for s in group)
    shards = 1 if replicated else tp
    windows = tuple(_window(group[0]) for group in specs)
    block_bytes = tuple(sum(spec.page_size_bytes for spec in group) for group in specs)
    tokens_per_block = tuple(group.kv_cache_spec.block_size for group in groups)
    declared = [
        kvkeep.Group(tokens, size, rule=_rule(group[0], window), shards=shards, replicated=replicated)
        for tokens, size, group, window in zip(tokens_per_block, block_bytes, specs, windows)
    ]
    algorithm = cache.prefix_caching_hash_algo
    if algorithm.startswith("xxhash") and "PYTHONHASHSEED" not in os.environ:
        raise Unsupported(f"keys made by {algorithm} differ from process to process: set PYTHONHASHSEED, or use sha256")
    dtype = vllm_config.model_config.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
    layout = kv_cache_config.kv_cache_layout or cache.kv_cache_layout or "unknown"
    return Shape(
        format=kvkeep.Format(
            name,
            declared,
            dtype=str(dtype).removeprefix("torch."),
            layout=f"vllm-{vllm_config.device_config.device_type}-{layout}",
            hash_algorithm=algorithm,
            hash_seed=resolve_none_hash_seed(get_hash_fn_by_name(algorithm)),
            tokens_per_key=tokens_per_key,
            tp=tp,
            prefill_us_per_token=prefill_us_per_token,
        ),
        tokens_per_key=tokens_per_key,
        tokens_per_block=tokens_per_block,
        window=windows,
        block_bytes=block_bytes,
        replicated=replicated,
        aligned_to=math.lcm(tokens_per_key, *tokens_per_block),
    )


def _layer_specs(group) -> list:
    """One per layer of the group."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return [spec.kv_cache_specs[layer] for layer in group.layer_names]
    return [spec] * len(group.layer_names)


def _window(spec) -> int | None:
    if isinstance(spec, SlidingWindowSpec):
        return spec.sliding_window + spec.extra_retained_tokens
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return spec.attention_chunk_size
    return None


def _rule(spec, window: int | None):
    if window is not None:
        return ("window", window)
    if isinstance(spec, MambaSpec):
        # Its states are handed over at boundaries that only the scheduler knows.
        raise Unsupported("models with recurrent state are not supported")
    if isinstance(spec, FullAttentionSpec):
        return "all"
    raise Unsupported(f"KV of kind {type(spec).__name__} is not supported")


def geometries(kv_cache_config, kv_caches: dict, shape: Shape, share: bool):
    """Where each group's blocks lie (a list of kvkeep.Geometry), and the region by which the server reaches them itself, or None.
    `kv_caches`: layer to tensor, as vLLM hands them out.

    Raises Unsupported where the memory is not the host's, or does not lie as the configuration says.
    """
    base, size = _allocation(kv_cache_config, kv_caches)
    region = shared(base, size) if share and size >= SHARE_MIN else None
    out = []
    for group, expected in zip(kv_cache_config.kv_cache_groups, shape.block_bytes):
        pages = {layer: spec.page_size_bytes for layer, spec in zip(group.layer_names, _layer_specs(group))}
        areas, at = [], 0
        for first, count, page, placed in _runs(kv_cache_config, group.layer_names, pages):
            place = kvkeep.Place((base, size), first, page, stride=placed.layer_stride, count=count)
            areas.append((place, placed.block_stride))
            at += page * count
        if at != expected:
            raise Unsupported(f"a block of KV has {at} bytes, not {expected}")
        out.append(kvkeep.Geometry(areas, kv_cache_config.num_blocks))
    return out, region


def _allocation(kv_cache_config, kv_caches: dict) -> tuple[int, int]:
    """Address and bytes of the one allocation that holds all KV."""
    bases = set()
    for placed in kv_cache_config.kv_cache_tensors:
        for n, layer in enumerate(placed.layers):
            tensor = kv_caches.get(layer)
            if tensor is None:
                raise Unsupported(f"layer {layer} has no KV")
            if tensor.device.type != "cpu":
                raise Unsupported(
                    f"KV on {tensor.device.type} is not reached by this connector: use vLLM's OffloadingConnector with "
                    "kvkeep.connectors.vllm_tier below it (docs/engines/vllm.md)"
                )
            bases.add((tensor.data_ptr() - placed.offset - n * placed.layer_stride, placed.size))
    if len(bases) != 1:
        raise Unsupported("KV does not lie in one allocation, as the configuration says")
    return bases.pop()


def _runs(kv_cache_config, layers: list[str], pages: dict[str, int]):
    """(offset of the first page of block 0, pages, bytes of a page, where they are placed), so that all layers are covered in order
    with as few runs as there can be."""
    places = {
        layer: (placed, n) for placed in kv_cache_config.kv_cache_tensors for n, layer in enumerate(placed.layers)
    }
    run = None
    for layer in layers:
        placed, n = places[layer]
        if run and run[3] is placed and n == run[4] and pages[layer] == run[2]:
            run[1] += 1
            run[4] += 1
            continue
        if run:
            yield run[0], run[1], run[2], run[3]
        run = [placed.offset + n * placed.layer_stride, 1, pages[layer], placed, n + 1]
    if run:
        yield run[0], run[1], run[2], run[3]


_shared: dict[int, kvkeep.Region] = {}


def shared(address: int, size: int) -> kvkeep.Region | None:
    """Puts memory of this process into a file that the server can map, where it lies; None where that cannot be done.

    The pages are copied into a sealed memfd, which is then mapped over them: the engine's tensors stay as they are, address and
    content. Only whole pages can be mapped, so the caller's memory must be an allocation with pages of its own, which large ones
    are; nobody may write it meanwhile.
    """
    page = mmap.PAGESIZE
    first, end = address // page * page, -(-(address + size) // page) * page
    if region := _shared.get(first):
        # Another connector of this worker was first.
        return region
    if not _is_private_memory(first, end):
        return None
    fd = os.memfd_create("kvkeep-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, end - first)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        old = memoryview((ctypes.c_char * (end - first)).from_address(first)).cast("B")
        done = 0
        while done < end - first:
            done += os.pwrite(fd, old[done : done + (64 << 20)], done)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        there = libc.mmap(first, end - first, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
        if there != first:
            return None
        _shared[first] = kvkeep.Region.from_fd(fd, 0, end - first, also_at=first)
        return _shared[first]
    except OSError:
        return None
    finally:
        os.close(fd)


def _is_private_memory(first: int, end: int) -> bool:
    """Whether every page from `first` to `end` is writable memory of this process alone, and no file's."""
    at = first
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, _, _, inode = line.split()[:5]
            low, high = (int(x, 16) for x in span.split("-"))
            if high <= at or at < low:
                continue
            if rights != "rw-p" or inode != "0":
                return False
            at = high
            if at >= end:
                return True
    return False

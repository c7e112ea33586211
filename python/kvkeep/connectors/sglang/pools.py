"""A host pool of SGLang: its namespace in the store, and where its pages lie."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

import kvkeep

from ..leases import look_up
from ..options import StoreOptions
from ..registration import Registration

log = logging.getLogger("sglang.kvkeep")

KEY_BYTES = 32
"""Of a page's hash (SHA-256)."""
_SETTLE_WAIT = 1.0


class Unsupported(ValueError):
    """This pool holds what cannot be stored."""


@dataclass(frozen=True)
class Shard:
    """Which of a pool's shards this rank holds."""

    index: int
    count: int
    replicated: bool
    """Every tensor-parallel rank holds the same bytes; SGLang has one of them write."""


def shard_of(config: HiCacheStorageConfig, name: str, host_pool) -> Shard:
    """The model's own pool tells whether ranks hold the same. Recurrent state and pools of heads are split in any case."""
    split_anyway = name == PoolName.MAMBA or isinstance(host_pool, MHATokenToKVPoolHost)
    replicated = config.is_mla_model and not split_anyway
    tp_rank, tp_size = (0, 1) if replicated else (config.tp_rank, config.tp_size)
    cp = config.attn_cp_size
    return Shard(tp_rank * cp + config.attn_cp_rank, tp_size * cp, replicated and cp == 1)


class Pool:
    """Pages of one host pool in the store. Its methods may be called by several threads; they raise kvkeep.Error where a call
    is wrong, and miss where the server is lost."""

    def __init__(
        self,
        client: kvkeep.Client,
        options: StoreOptions,
        config: HiCacheStorageConfig,
        name: str,
        host_pool,
        *,
        page_tokens: int,
        dtype: str,
        revision: str,
    ):
        """Raises Unsupported with what stands in the way."""
        self.name, self.host_pool = str(name), host_pool
        self._rows = getattr(host_pool, "logical_page_size", None) or host_pool.page_size or 1
        shard = shard_of(config, name, host_pool)
        self._parts = [(0, shard.index)]
        addresses, self._sizes = self._pieces_of_page(0)
        self._page_bytes = sum(self._sizes)
        self._regions = _regions(host_pool) if options.share_memory else []
        self._geometry = self._linear(addresses)
        model = config.model_name or "model"
        pieces = hashlib.blake2b(repr(self._sizes).encode(), digest_size=4).hexdigest()
        fmt = kvkeep.Format(
            model[-200:],
            [kvkeep.Group(page_tokens, self._page_bytes, shards=shard.count, replicated=shard.replicated)],
            dtype=dtype,
            layout=f"sglang-{self.name}-{type(host_pool).__name__}-{host_pool.layout}-{_layers(config, host_pool)}-{pieces}",
            hash_algorithm="sglang-sha256",
            tokens_per_key=page_tokens,
            tp=config.tp_size,
            pp=config.pp_size,
            cp=config.attn_cp_size,
        )
        # A pool that looks otherwise (layout, page, stage of a pipeline) is another namespace, not a refused one.
        begin = options.namespace or f"sglang/{model[-120:]}"
        full = f"{begin}/{self.name}/{fmt.fingerprint[:12]}"
        self._namespace = client.namespace(full, fmt, revision)
        self._registration = Registration(self._namespace, revision, advance=options.advance_revision, log=log)
        self._registration.start()
        for region in self._regions:
            # Only so that the first call need not.
            self._namespace.register_region(region, timeout=0.0)

    @property
    def namespace(self) -> kvkeep.Namespace:
        return self._namespace

    @property
    def page_bytes(self) -> int:
        """Of this rank's shard."""
        return self._page_bytes

    @property
    def is_shared(self) -> bool:
        """The server fills and reads the pool itself."""
        return self._geometry is not None and self._geometry.is_shared

    def close(self) -> None:
        self._registration.stop()
        self._namespace.close()
        # The pool may be freed next, and other memory come to lie there.
        self._regions.clear()

    # What is there.

    def match(self, keys: Sequence[bytes], lease: float, call: kvkeep.Call) -> tuple[int, kvkeep.Lease | None]:
        """Pages from the start without a gap, leased."""
        found = self._namespace.match(keys, lease=lease, promote=True, call=call)
        return found.boundary_positions, found.lease

    def look_up(self, keys: Sequence[bytes], lease: float, call: kvkeep.Call) -> tuple[list[bool], kvkeep.Lease | None]:
        """Which pages are there, one by one, leased."""
        return look_up(self._namespace, keys, lease, call)

    # Bytes.

    def get(
        self, keys: Sequence[bytes], host_indices: torch.Tensor, lease: int | None, call: kvkeep.Call
    ) -> list[bool]:
        """Fills pages. A page of which the answer is False holds anything, and nobody writes it any more."""
        places, blocks = self._places(host_indices, len(keys))
        got = self._namespace.get_into(keys, places, blocks, parts=self._parts, lease=lease, call=call)
        if got.in_doubt:
            # The engine gives the page to somebody else at once. A server that is stopped in the middle of a copy may go on
            # with it at any time, so there is nothing to do but to wait until it cannot: it was continued, or has ended.
            started = time.monotonic()
            while not self._namespace.settle(_SETTLE_WAIT):
                log.warning(
                    "kvkeep: the server may still be writing pages that were given up %.0f s ago",
                    time.monotonic() - started,
                )
        return [status == kvkeep.HIT for status in got.statuses]

    def put(
        self,
        keys: Sequence[bytes],
        host_indices: torch.Tensor,
        before: Sequence[str] | None,
        cls: str,
        call: kvkeep.Call,
    ) -> list[bool]:
        """Stores pages. True as well where another engine is storing the same page at this moment."""
        places, blocks = self._places(host_indices, len(keys))
        parent = key_of(before[-1]) if before else None
        stored = self._namespace.put_from(
            keys,
            places,
            blocks,
            parts=self._parts,
            parent=parent,
            first_position=len(before or ()),
            cls=cls,
            call=call,
        )
        return [outcome in (kvkeep.STORED, kvkeep.ALREADY_PRESENT, kvkeep.IN_PROGRESS) for outcome in stored.outcomes]

    # Where pages lie.

    def _pieces_of_page(self, page: int) -> tuple[list[int], list[int]]:
        """Addresses and sizes of what makes up a page, in SGLang's order."""
        return self._pieces(torch.arange(page * self._rows, (page + 1) * self._rows))

    def _pieces(self, host_indices: torch.Tensor) -> tuple[list[int], list[int]]:
        try:
            addresses, sizes = self.host_pool.get_page_buffer_meta(host_indices)
        except (NotImplementedError, ValueError, AttributeError) as e:
            raise Unsupported(f"pool {self.name} has no memory that can be read as it is: {e}") from e
        return list(addresses), [int(size) for size in sizes]

    def _linear(self, first: list[int]) -> kvkeep.Geometry | None:
        """Pages one stride apart per piece, as all layouts of SGLang 0.5 have them; None: ask for every page."""
        pages = int(self.host_pool.size) // self._rows
        if pages < 2:
            return None
        strides = [b - a for a, b in zip(first, self._pieces_of_page(1)[0], strict=True)]
        for page in (pages // 2, pages - 1):
            addresses, sizes = self._pieces_of_page(page)
            expected = [address + page * stride for address, stride in zip(first, strides)]
            if addresses != expected or sizes != self._sizes:
                return None
        if min(strides) <= 0:
            return None
        # Each piece with the memory that it has in all pages: pieces may lie in allocations of their own.
        areas = [
            (kvkeep.Place((address, (pages - 1) * stride + size), 0, size), stride)
            for address, size, stride in zip(first, self._sizes, strides)
        ]
        return kvkeep.Geometry(areas, pages)

    def _places(self, host_indices: torch.Tensor, count: int):
        """What `get_into` and `put_from` take."""
        if host_indices.numel() != count * self._rows:
            raise ValueError(f"{count} pages of {self._rows} rows, but {host_indices.numel()} indices")
        host_indices = host_indices.detach().to(device="cpu", dtype=torch.int64)
        rows = host_indices.reshape(count, self._rows)[:, 0]
        if self._geometry is not None and not torch.any(rows % self._rows):
            return self._geometry, (rows // self._rows).contiguous().numpy()
        addresses, sizes = self._pieces(host_indices)
        if len(addresses) != count * len(self._sizes) or sizes != self._sizes * count:
            raise ValueError(f"pool {self.name} has pages of another shape than before")
        each = len(self._sizes)
        return [_place(addresses[n * each : (n + 1) * each], self._sizes) for n in range(count)], None


def _place(addresses: list[int], sizes: list[int]) -> kvkeep.Place:
    pieces = [kvkeep.Place((address, size)) for address, size in zip(addresses, sizes)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return whole


def _layers(config: HiCacheStorageConfig, host_pool) -> str:
    """Which of the model's; pools of recurrent state do not say, so the stage of the pipeline does."""
    first, end = (getattr(host_pool, name, None) or 0 for name in ("start_layer", "end_layer"))
    return f"L{first}-{end}-stage{config.pp_rank}of{config.pp_size}"


def _regions(host_pool) -> list[kvkeep.Region]:
    """The files of a pool that SGLang allocated with `"allocator": "shm"`."""
    allocator = getattr(host_pool, "allocator", None)
    regions = []
    for fd, mapping in zip(getattr(allocator, "fds", ()), getattr(allocator, "mms", ())):
        try:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            regions.append(kvkeep.Region.from_fd(fd, 0, len(mapping), also_at=address))
        except (OSError, ValueError, kvkeep.Error) as e:
            log.warning("kvkeep: a host pool goes through the socket, because its file cannot be shared: %s", e)
    return regions


def key_of(page_hash: str) -> bytes:
    """The hash itself; where it is something else, a digest of it."""
    if len(page_hash) == 2 * KEY_BYTES:
        try:
            return bytes.fromhex(page_hash)
        except ValueError:
            pass
    return hashlib.blake2b(page_hash.encode(), digest_size=KEY_BYTES, person=b"kvkeep-sglang").digest()

"""SGLang's interface of a storage backend."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import sglang
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

import kvkeep

from .. import revision as weights
from .. import versions
from ..leases import Leases
from ..options import StoreOptions
from . import hits
from .pools import Pool, Unsupported, key_of

log = logging.getLogger("sglang.kvkeep")

_QUIET_SECONDS = 30.0
"""Between two log lines about the same failure."""


@dataclass(frozen=True)
class Options(StoreOptions):
    """What `"kvkeep"` in the backend's configuration may say; docs/engines/sglang.md explains it to users."""

    draft_revision: str | None = None
    """Digest of the draft model's weights; None: made from its folder."""


def _misses(of):
    """What would be raised on a thread of the engine is logged and answered as a miss: `of(*arguments of the call)`."""

    def decorate(method):
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except Exception as e:
                self._failed(method.__name__, e)
                return of(*args, **kwargs)

        return call

    return decorate


def _none_of(keys, *_args, **_kwargs) -> list[bool]:
    return [False] * len(keys)


def _none_of_all(transfers, *_args, **_kwargs) -> dict[str, list[bool]]:
    return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}


class KVKeepStorage(HiCacheStorage):
    """Loaded by SGLang's own factory as a `dynamic` backend; docs/engines/sglang.md says how."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None):
        """Raises where the configuration is wrong or the release unknown; where only the store is missing, everything misses."""
        extra = storage_config.extra_config or {}
        self._options = Options.of(extra.get("kvkeep") or {})
        versions.check("sglang", _version(), any_version=self._options.any_version)
        if not extra.get("interface_v1"):
            raise ValueError('kvkeep needs "interface_v1": 1 in --hicache-storage-backend-extra-config')
        if storage_config.dcp_size > 1:
            raise ValueError("kvkeep does not support decode context parallelism")
        self._config = storage_config
        self._revision = self._options.revision or self._weights()
        if self._revision is None:
            log.warning(
                "kvkeep: nothing is shared, because it is not known which weights this is (model %s): say it with "
                '"kvkeep": {"revision": ...} or {"model_path": ...}',
                storage_config.model_name,
            )
        rank = f"sglang {storage_config.tp_rank}/{storage_config.tp_size}"
        self._client = kvkeep.Client(self._options.endpoint, name=rank, patience=self._options.patience_seconds)
        self._pools: dict[str, Pool] = {}
        self._leases: dict[str, Leases] = {}
        self._requests = itertools.count()
        self._draw = os.urandom(8)
        self._said: dict[str, float] = {}

    # Host pools.

    @_misses(lambda *_: None)
    def register_mem_pool_host(self, mem_pool_host) -> None:
        super().register_mem_pool_host(mem_pool_host)
        if not self._is_logical():
            self._add(PoolName.KV, mem_pool_host)

    @_misses(lambda *_: None)
    def register_mem_host_pool_v2(self, host_pool, host_pool_name) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            self._add(host_pool_name, host_pool)

    def _add(self, name: str, host_pool) -> None:
        if self._revision is None:
            return
        name = str(name)
        if old := self._pools.pop(name, None):
            old.close()
        try:
            pool = Pool(
                self._client,
                self._options,
                self._config,
                name,
                host_pool,
                page_tokens=self.mem_pool_host.page_size,
                dtype=self._dtype(host_pool),
                revision=self._revision_of(name),
            )
        except (Unsupported, kvkeep.Error) as e:
            log.warning("kvkeep: pages of pool %s are not stored: %s", name, e)
            return
        self._leases[name] = Leases()
        self._pools[name] = pool
        way = "by the server itself" if pool.is_shared else 'through the socket ("allocator": "shm" saves a copy)'
        log.info("kvkeep: pool %s: pages of %d bytes, filled and read %s", name, pool.page_bytes, way)

    def _is_logical(self) -> bool:
        """The model has no pages of its own; side pools hold all of it."""
        return getattr(self.mem_pool_host, "kv_buffer", None) is None

    # The interface's first version.

    @_misses(lambda *_, **__: 0)
    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        if self._is_logical():
            return len(keys)
        return self._matched(PoolName.KV, [key_of(key) for key in keys], extra_info)

    @_misses(lambda *_, **__: False)
    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    @_misses(_none_of)
    def batch_get_v1(
        self, keys: list[str], host_indices, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        if self._is_logical():
            return [True] * len(keys)
        return self._got(PoolName.KV, keys, host_indices, extra_info)

    @_misses(_none_of)
    def batch_set_v1(
        self, keys: list[str], host_indices, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        if self._is_logical():
            return [True] * len(keys)
        return self._put(PoolName.KV, keys, host_indices, extra_info)

    # The second version: models with more than one pool.

    @_misses(lambda *_, **__: PoolTransferResult.empty())
    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        pages = [key_of(key) for key in keys]
        kv_pages = len(pages) if self._is_logical() else self._matched(PoolName.KV, pages, extra_info)
        found: dict[str, int] = {PoolName.KV: kv_pages} if kv_pages else {}
        lengths = list(range(1, kv_pages + 1))
        for transfer in pool_transfers or ():
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                # A second form of the same pages: its own verdict, and no limit to the others.
                block, group = max(1, transfer.block_pages), max(1, transfer.group_pages)
                wanted = [key_of(key) for key in transfer.keys or ()] or hits.keys_of_groups(pages, block, group)
                covered = hits.leading_groups(self._there(transfer.name, wanted, extra_info), block, group)
                found |= {transfer.name: covered} if covered else {}
                continue
            if not lengths:
                continue
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                reach = self._matched(transfer.name, pages[:kv_pages], extra_info)
                usable = set(range(1, reach + 1))
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                there = self._there(transfer.name, pages[:kv_pages], extra_info)
                usable = set(hits.ends_of_windows(there, max(1, len(transfer.keys or ()))))
                reach = max(usable, default=0)
            else:
                raise ValueError(f"hit policy {transfer.hit_policy} is not known")
            found |= {transfer.name: reach} if reach else {}
            lengths = [n for n in lengths if n in usable]
        return PoolTransferResult(lengths[-1] if lengths else 0, found, lengths)

    @_misses(_none_of_all)
    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._one_of_v2(self._got, t, extra_info) for t in transfers}

    @_misses(_none_of_all)
    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {t.name: self._one_of_v2(self._put, t, extra_info) for t in transfers}

    def _one_of_v2(self, do, transfer: PoolTransfer, extra_info) -> list[bool]:
        keys = transfer.keys or []
        if not keys or transfer.host_indices is None:
            return [False] * len(keys)
        try:
            return do(transfer.name, keys, transfer.host_indices, extra_info)
        except Exception as e:
            # The other pools of the call are not concerned.
            self._failed(f"pool {transfer.name}", e)
            return [False] * len(keys)

    # What they stand on.

    def _matched(self, name: str, keys: list[bytes], extra_info) -> int:
        pool = self._pools.get(str(name))
        if pool is None or not keys:
            return 0
        call = self._call(self._options.match_seconds_max, extra_info)
        count, lease = pool.match(keys, self._options.lease_seconds, call)
        self._hold(pool, lease, keys[:count])
        return count

    def _there(self, name: str, keys: list[bytes], extra_info) -> list[bool]:
        pool = self._pools.get(str(name))
        if pool is None or not keys:
            return [False] * len(keys)
        call = self._call(self._options.match_seconds_max, extra_info)
        there, lease = pool.look_up(keys, self._options.lease_seconds, call)
        self._hold(pool, lease, [key for key, is_there in zip(keys, there) if is_there])
        return there

    def _got(self, name: str, keys: list[str], host_indices, extra_info) -> list[bool]:
        pool = self._pools.get(str(name))
        if pool is None or not keys:
            return [False] * len(keys)
        pages, leases = [key_of(key) for key in keys], self._leases[pool.name]
        try:
            call = self._call(self._options.load_seconds_max, extra_info)
            return pool.get(pages, host_indices, leases.over(pages), call)
        finally:
            self._release(pool, leases.give_back(pages))

    def _put(self, name: str, keys: list[str], host_indices, extra_info) -> list[bool]:
        pool = self._pools.get(str(name))
        if pool is None or not keys:
            return [False] * len(keys)
        before = extra_info.prefix_keys if extra_info else None
        call = self._call(self._options.save_seconds_max, extra_info)
        return pool.put([key_of(key) for key in keys], host_indices, before, self._options.cls, call)

    def _hold(self, pool: Pool, lease: kvkeep.Lease | None, keys: list[bytes]) -> None:
        if lease is not None:
            self._release(pool, self._leases[pool.name].hold(lease.id, lease.ttl, keys))

    def _release(self, pool: Pool, leases: list[int]) -> None:
        if leases:
            pool.namespace.release(leases)

    def _call(self, deadline: float, extra_info: HiCacheStorageExtraInfo | None) -> kvkeep.Call:
        """SGLang names no requests, so each call is one. It may name the session that pages are of."""
        session = (extra_info.extra_info or {}).get("session_id") if extra_info else None
        info = kvkeep.RequestInfo(session=_number(session)) if session else None
        return kvkeep.Call(self._draw + next(self._requests).to_bytes(8, "little"), deadline=deadline, info=info)

    def _failed(self, what: str, e: Exception) -> None:
        now = time.monotonic()
        if now - self._said.get(what, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._said[what] = now
            log.warning("kvkeep: %s: %s (taken for a miss)", what, e, exc_info=not isinstance(e, kvkeep.Error))

    # The rest.

    def clear(self) -> bool:
        """SGLang forgets what it knows of the store; the store is everybody's and keeps what it has."""
        for name, leases in self._leases.items():
            self._release(self._pools[name], leases.give_up())
        return True

    def close(self) -> None:
        """Releases what is held and ends the connections. Calls after it are misses."""
        self.clear()
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def wait_ready(self, timeout: float) -> bool:
        """Waits for the store, for tools and tests: an engine begins with misses. Whether all pools have reached it."""
        until = time.monotonic() + timeout
        return all([_reached(pool, until - time.monotonic()) for pool in self._pools.values()])

    def leases_held(self) -> int:
        """Lookups that were not followed by a get yet."""
        return sum(len(leases) for leases in self._leases.values())

    def describe(self) -> dict[str, Any]:
        """Per pool how its namespace stands."""
        return {name: pool.namespace.describe() for name, pool in self._pools.items()}

    # The interface that the first version replaced: copies of pages, in another order of bytes. "interface_v1" turns it off.

    def get(self, key, target_location=None, target_sizes=None):
        return None

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        return [None] * len(keys)

    def set(self, key, value=None, target_location=None, target_sizes=None) -> bool:
        return False

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None) -> bool:
        return False

    # What only the running engine knows.

    def _weights(self) -> str | None:
        """Digest of the model's weights, as the running engine says where they are."""
        args = _server_args()
        if self._options.model_path:
            return weights.of_weights(self._options.model_path)
        if args is None:
            return weights.of_weights(self._config.model_name or "")
        if getattr(args, "load_format", None) == "dummy":
            # Not those of the folder.
            return None
        return weights.of_weights(args.model_path, getattr(args, "revision", None))

    def _dtype(self, host_pool) -> str:
        """Of the values, not of the bytes: every 8-bit float is kept as bytes, and they are not each other."""
        types = [getattr(host_pool, name, None) for name in ("dtype", "temporal_dtype", "conv_dtype")]
        stored = "+".join(str(t).removeprefix("torch.") for t in types if t is not None)
        if "int8" not in stored:
            return stored
        declared = getattr(_server_args(), "kv_cache_dtype", None)
        if declared in (None, "auto"):
            raise Unsupported("its values are bytes, and SGLang does not say of which type (--kv-cache-dtype)")
        return declared

    def _revision_of(self, name: str) -> str:
        """A draft model has weights of its own."""
        if not name.startswith(PoolName.DRAFT.value):
            return self._revision
        args = _server_args()
        model = getattr(args, "speculative_draft_model_path", None) or ""
        hub_revision = getattr(args, "speculative_draft_model_revision", None)
        draft = self._options.draft_revision or weights.of_weights(model, hub_revision)
        if draft is None:
            raise Unsupported('it is not known which weights the draft model has: say it with "draft_revision"')
        return f"{self._revision}+{draft}"


def _reached(pool: Pool, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            return pool.namespace.ready(left)
        except kvkeep.Error:
            # Other weights: the store is being told.
            time.sleep(0.05)
    return False


def _server_args():
    """Of the engine in this process; None outside of one."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:
        return None


def _version() -> str:
    version = getattr(sglang, "__version__", None)
    return version if isinstance(version, str) else importlib.metadata.version("sglang")


def _number(session: str) -> int:
    return int.from_bytes(hashlib.blake2b(str(session).encode(), digest_size=8).digest(), "little")

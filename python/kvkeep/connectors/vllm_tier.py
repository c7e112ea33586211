"""A tier below vLLM's OffloadingConnector: vLLM brings blocks from the GPU to host memory itself, this brings them from there to
the store and back, straight out of and into vLLM's own host region.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{"type": "KVKeepTier", "module_path": "kvkeep.connectors.vllm_tier",
            "endpoint": "local:/var/lib/kvkeep?dram=16GiB&nvme=200GiB"}]}}'

vLLM's key (block hash and group) is the store's key; a chunk is a part. All methods run on vLLM's scheduler thread and wait for
nothing; what waits is in two threads. docs/engines/vllm.md has the options and the table of keys.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import vllm
from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

import kvkeep

from . import revision as weights
from . import versions
from .registration import Registration
from .vllm.matches import request_name

log = logging.getLogger("vllm.kvkeep")

LOADS, STORES = 0, 1
_LOOKUP_MAX = 1.0
"""Seconds that a lookup waits for the server, in its thread; one that is lost is noticed in 0.1 s."""
_SETTLE_EVERY = 0.05
_TOUCHES_WAITING_MAX = 64
"""Steps whose touches may wait for the server; those of more are dropped: they are told for the policy alone."""


@dataclass(slots=True)
class _Chain:
    """Where a request's keys stand, as far as they were seen: (group, end token) to key."""

    keys: dict[tuple[int, int], bytes] = field(default_factory=dict)


@dataclass(slots=True)
class _Job:
    job: TransferJob
    keys: list[bytes]
    started: float


class KVKeepTier(SecondaryTierManager):
    """Chunks of vLLM's host tier in KVKeep.

    Options, beside vLLM's own: `endpoint`, `namespace`, `revision`, `advance_revision`, `any_version` as those of the connector
    (`kvkeep.connectors.vllm.options`), and `adapters`: name of a LoRA adapter to its folder or its revision.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        endpoint: str | None = None,
        namespace: str | None = None,
        revision: str | None = None,
        adapters: dict[str, str] | None = None,
        advance_revision: bool = True,
        any_version: bool = False,
        lease_seconds: float = 30.0,
        transfer_seconds_max: float = 10.0,
        backpressure_detector=None,
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        versions.check("vllm", vllm.__version__, any_version=any_version)
        config = offloading_spec.config
        self._lease_seconds, self._deadline = lease_seconds, transfer_seconds_max
        self._tokens_per_chunk = [group.tokens_per_block * config.cache.blocks_per_chunk for group in config.groups]
        name = namespace or config.model.name
        known = revision_of(revision or weights.of_weights(config.model.name), adapters or {})
        if known is None:
            log.warning(
                'kvkeep: the weights of %s cannot be told, so its KV is not shared: set the tier\'s "revision"', name
            )
        self._shares = known is not None
        client = kvkeep.Client(endpoint, name="vllm tier")
        fmt = format_of(config, name, self.block_size_bytes, min(self._tokens_per_chunk))
        self._namespace = client.namespace(name, fmt, known or "unknown", queues=2, in_flight_max=512)
        self._geometry, self._region = place_chunks(offloading_spec, primary_kv_view)
        self._jobs: dict[int, _Job] = {}
        self._over: list[JobResult] = []
        self._unsettled: list[JobResult] = []
        self._looked = 0.0
        events = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if events else None
        self._lookups = _Lookups(self)
        self._touched: dict[str, set[bytes]] = {}
        self._touches: queue.SimpleQueue = queue.SimpleQueue()
        self._registration = None
        if self._shares:
            self._registration = Registration(self._namespace, known, advance=advance_revision, log=log)
            self._registration.start()
            threading.Thread(target=self._touch, name="kvkeep-touch", daemon=True).start()

    # Lookups.

    def lookup(self, key: bytes, req_context) -> LookupResult:
        if not self._shares:
            return LookupResult.MISS
        self._remember(key, req_context)
        found = self._lookups.lookup(key, req_context)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def are_there(self, keys: list[bytes], request_id: str) -> list[bool]:
        """Leases what is there, so that a load which follows finds it. On the thread of lookups."""
        call = kvkeep.Call(request_name(request_id), deadline=_LOOKUP_MAX)
        _, statuses = self._namespace.lease(b"".join(keys), key_len=len(keys[0]), ttl=self._lease_seconds, call=call)
        return [status in (kvkeep.HIT, kvkeep.LOADING) for status in statuses]

    def touch(self, keys: Collection[bytes], req_context) -> None:
        if self._shares:
            self._touched.setdefault(req_context.req_id, set()).update(keys)

    def on_new_request(self, req_context) -> RequestOffloadingContext:
        req_context.set_state(_Chain())
        return RequestOffloadingContext()

    def on_request_finished(self, req_context) -> None:
        if self._shares:
            self._lookups.cleanup(req_context.req_id)
            self._namespace.release(requests=[request_name(req_context.req_id)])

    def on_schedule_end(self, context) -> None:
        self._lookups.flush()
        if self._touched:
            if self._touches.qsize() < _TOUCHES_WAITING_MAX:
                self._touches.put(self._touched)
            self._touched = {}

    # Transfers.

    def submit_store(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        parent, ordered = self._parent(keys, job_metadata.req_context)
        self._submit(
            job_metadata,
            keys,
            lambda common: self._namespace.submit_put(
                *common,
                queue=STORES,
                key_len=len(keys[0]),
                parent=parent,
                unordered=not ordered,
                call=self._call(job_metadata),
            ),
        )

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        self._submit(
            job_metadata,
            keys,
            lambda common: self._namespace.submit_get(
                *common, queue=LOADS, key_len=len(keys[0]), call=self._call(job_metadata)
            ),
        )

    def _submit(self, job: TransferJob, keys: list[bytes], submit) -> None:
        ticket = None
        if self._shares and keys:
            try:
                ticket = submit((b"".join(keys), self._geometry, [int(chunk) for chunk in job.chunk_ids]))
            except (kvkeep.Error, TypeError, ValueError):
                log.exception("kvkeep: a transfer is wrong")
        if ticket is None:
            self._over.append(JobResult(job.job_id, not keys, ()))
            if job.is_promotion:
                self._lookups.mark_miss(keys)
        else:
            self._jobs[ticket] = _Job(job, keys, time.monotonic())

    def _call(self, job: TransferJob) -> kvkeep.Call:
        return kvkeep.Call(request_name(job.req_context.req_id), deadline=self._deadline)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        if self._jobs:
            self._land(self._namespace.poll(LOADS, 512))
            self._land(self._namespace.poll(STORES, 512))
        if self._unsettled and time.monotonic() - self._looked > _SETTLE_EVERY:
            self._looked = time.monotonic()
            if self._namespace.settle(0.0):
                self._over += self._unsettled
                self._unsettled = []
        over, self._over = self._over, []
        return over

    def _land(self, completions) -> None:
        for done in completions:
            flying = self._jobs.pop(done.ticket, None)
            if flying is None:
                continue
            job, seconds = flying.job, time.monotonic() - flying.started
            if done.got is not None:
                hits = [status == kvkeep.HIT for status in done.got.statuses]
                good = [key for key, hit in zip(flying.keys, hits) if hit]
                self._lookups.mark_miss([key for key, hit in zip(flying.keys, hits) if not hit])
                result = JobResult(job.job_id, all(hits), None if all(hits) else good, seconds, sum(done.got.lengths))
                if done.got.in_doubt:
                    # vLLM gives its chunks away with the answer, and the server may still be writing one.
                    self._unsettled.append(result)
                    continue
            else:
                kept = done.stored.kept if done.stored is not None else 0
                if why := done.error if done.stored is None else done.stored.error:
                    log.info("kvkeep: %d of %d chunks were stored: %s", kept, len(flying.keys), why)
                result = JobResult(job.job_id, kept == len(flying.keys), None, seconds, kept * self.block_size_bytes)
                if self._events is not None and kept:
                    self._events.append(
                        OffloadingEvent(flying.keys[:kept], Medium.STORAGE, removed=False, ownership="kvkeep")
                    )
            self._over.append(result)

    def has_pending_work(self) -> bool:
        return bool(self._jobs or self._over)

    def drain_jobs(self) -> None:
        until = time.monotonic() + self._deadline + 1
        while self._jobs and time.monotonic() < until:
            for each in (LOADS, STORES):
                self._land(self._namespace.wait(each, 512, 0.01))
        while self._unsettled and not self._namespace.settle(1.0):
            log.warning("kvkeep: the server may still be writing vLLM's host memory; waiting for it")
        self._over += self._unsettled
        self._unsettled = []

    def take_events(self) -> Iterable[OffloadingEvent]:
        if not self._events:
            return ()
        events, self._events = self._events, []
        return events

    def shutdown(self) -> None:
        if self._registration is not None:
            self._registration.stop()
        self._touches.put(None)
        self._lookups.shutdown()
        self._namespace.close()
        self._region = None

    # The order of keys.

    def _remember(self, key: bytes, req_context) -> int | None:
        position, chain = req_context.get_offload_key_position(key), req_context.get_state(_Chain)
        if position is not None and chain is not None:
            chain.keys[(get_offload_group_idx(key), position)] = key
        return position

    def _parent(self, keys: list[bytes], req_context) -> tuple[bytes | None, bool]:
        """Key of the chunk before the first of these, and whether they follow each other."""
        positions = [self._remember(key, req_context) for key in keys]
        groups = {get_offload_group_idx(key) for key in keys}
        if len(groups) != 1 or None in positions:
            return None, False
        group = groups.pop()
        step = self._tokens_per_chunk[group] if group < len(self._tokens_per_chunk) else self._tokens_per_chunk[0]
        if any(b - a != step for a, b in zip(positions, positions[1:])):
            return None, False
        if positions[0] == step:
            return None, True
        chain = req_context.get_state(_Chain)
        before = chain.keys.get((group, positions[0] - step)) if chain else None
        return before, before is not None

    def _touch(self) -> None:
        while (touched := self._touches.get()) is not None:
            for request_id, keys in touched.items():
                # What the request's lookup has leased is not counted again.
                call = kvkeep.Call(request_name(request_id))
                by_length: dict[int, list[bytes]] = {}
                for key in keys:
                    by_length.setdefault(len(key), []).append(key)
                try:
                    for length, same in by_length.items():
                        self._namespace.touch(b"".join(same), key_len=length, call=call)
                except kvkeep.Error as e:
                    log.warning("kvkeep: a touch was refused: %s", e)


class _Lookups(AsyncLookupManager):
    """Asks once a step, in a thread of its own."""

    def __init__(self, tier: KVKeepTier):
        self._tier = tier
        super().__init__("kvkeep")

    def batch_lookup(self, keys: list[bytes], req_context) -> Iterable[bool]:
        return self._tier.are_there(keys, req_context.req_id)


def revision_of(model: str | None, adapters: dict[str, str]) -> str | None:
    """The model's revision with those of its adapters folded in: vLLM's keys name an adapter, not its weights."""
    if model is None or not adapters:
        return model
    known = {name: weights.of_weights(what) if os.path.isdir(what) else what for name, what in adapters.items()}
    if None in known.values():
        return None
    return hashlib.blake2b(json.dumps([model, known], sort_keys=True).encode(), digest_size=16).hexdigest()


def format_of(config, name: str, chunk_bytes: int, tokens_per_key: int) -> kvkeep.Format:
    """A chunk is one part: all layers of one of vLLM's groups, of all ranks of the engine."""
    parallel = config.parallel
    free = parallel.is_parallelism_agnostic
    canonical = "-canonical" if config.canonical_layout else ""
    return kvkeep.Format(
        name,
        [kvkeep.Group(tokens_per_key, chunk_bytes)],
        dtype=config.model.dtype,
        layout=f"vllm-offload-{config.kv_cache_layout}{canonical}",
        hash_algorithm="vllm-offload-key",
        hash_seed=os.getenv("PYTHONHASHSEED", DEFAULT_NONE_HASH_SEED),
        tokens_per_key=tokens_per_key,
        tp=1 if free else parallel.tp_size,
        pp=1 if free else parallel.pp_size,
        cp=1 if free else parallel.pcp_size * parallel.dcp_size,
        canonical=free,
    )


def place_chunks(offloading_spec, view: memoryview) -> tuple[kvkeep.Geometry, kvkeep.Region | None]:
    """Where vLLM's chunks lie. The server is given the file that they lie in; where there is none, they go through the socket."""
    row, chunks = view.strides[0], view.shape[0]
    flat = view.cast("B")
    address = ctypes.addressof(ctypes.c_char.from_buffer(flat))
    region = None
    path = getattr(getattr(offloading_spec, "_scheduler_mmap", None), "mmap_path", None)
    if path is not None and os.path.exists(path):
        try:
            region = kvkeep.Region.open(path, 0, row * chunks, also_at=address)
        except (OSError, kvkeep.Error) as e:
            log.warning("kvkeep: vLLM's host region is not shared with the server, blocks go through the socket: %s", e)
    return kvkeep.Geometry([(kvkeep.Place((address, row)), row)], chunks), region

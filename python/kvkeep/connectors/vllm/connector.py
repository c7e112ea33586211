"""vLLM's interface, handed on to the two sides. Nothing raises on the engine's threads: what fails there is logged, counted, and a
miss."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from .. import versions
from . import contact, layout
from .messages import Step
from .metrics import PromMetrics, Stats
from .options import Options
from .scheduler import SchedulerSide
from .worker import QUEUES, WorkerSide

log = logging.getLogger("vllm.kvkeep")

_SLOW = 0.005
_SAID_MAX = 20


def _safely(otherwise):
    """A hook of the engine: whatever happens in it, the engine goes on, with `otherwise()`."""

    def wrap(hook):
        @functools.wraps(hook)
        def safe(self, *args, **kwargs):
            if self._side is None:
                return otherwise()
            started = time.perf_counter()
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                self._side.stats.count("errors")
                self._said += 1
                if self._said <= _SAID_MAX:
                    log.exception("kvkeep: %s failed; the engine goes on without", hook.__name__)
                return otherwise()
            finally:
                self._spent += time.perf_counter() - started

        return safe

    return wrap


class KVKeepConnector(KVConnectorBase_V1, SupportsHMA):
    """KV in KVKeep. See the package's documentation."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.of(self._kv_transfer_config.kv_connector_extra_config)
        versions.check("vllm", vllm.__version__, any_version=options.any_version)
        self._said, self._spent = 0, 0.0
        self._side: SchedulerSide | WorkerSide | None = None
        self._share = options.share_memory
        revision = contact.revision_of(options, vllm_config)
        if revision is None:
            log.warning(
                "kvkeep: the weights of %s cannot be told, so its KV is neither saved nor loaded; "
                'say which they are with "revision" in kv_connector_extra_config',
                vllm_config.model_config.model,
            )
            return
        name = options.namespace or vllm_config.model_config.model
        self._shape = layout.shape_of(vllm_config, kv_cache_config, name, options.prefill_us_per_token)
        scheduler = role == KVConnectorRole.SCHEDULER
        namespace = contact.namespace_of(
            options,
            name,
            self._shape.format,
            revision,
            self._kv_transfer_config.engine_id or "",
            role.name.lower(),
            1 if scheduler else QUEUES,
        )
        if scheduler:
            self._side = SchedulerSide(options, self._shape, namespace, revision, vllm_config)
        else:
            self._side = WorkerSide(options, self._shape, namespace, vllm_config.parallel_config.rank)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a miss later, nothing more."""
        return False

    # The scheduler's thread.

    def bind_gpu_block_pool(self, gpu_block_pool) -> None:
        if self._side is not None:
            self._side.bind_pool(gpu_block_pool)

    @_safely(lambda: None)
    def on_new_request(self, request) -> None:
        self._side.on_new_request(request)

    @_safely(lambda: (0, False))
    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._side.matched_tokens(request, num_computed_tokens)

    @_safely(lambda: None)
    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self._side.after_alloc(request, blocks, num_external_tokens)

    @_safely(Step)
    def build_connector_meta(self, scheduler_output) -> Step:
        return self._side.build_step(scheduler_output)

    @_safely(lambda: None)
    def update_connector_output(self, connector_output) -> None:
        self._side.update(connector_output)

    @_safely(lambda: (False, None))
    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        self._side.finished(request)
        # Saves hold no blocks: see `saves`.
        return False, None

    def request_finished(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @_safely(tuple)
    def take_events(self):
        return self._side.take_events()

    @_safely(lambda: False)
    def has_pending_push_work(self) -> bool:
        return self._side.has_work()

    @_safely(lambda: True)
    def reset_cache(self) -> bool:
        self._side.reset()
        return True

    # A worker's thread.

    def register_kv_caches(self, kv_caches) -> None:
        if self._side is None:
            return
        # What is wrong here is wrong for good, and said at the start.
        geometries, region = layout.geometries(self._kv_cache_config, kv_caches, self._shape, self._share)
        shared = region is not None and all(g.is_shared for g in geometries)
        self._side.register(geometries, region)
        log.info(
            "kvkeep: %d groups of KV, %s", len(geometries), "shared with the server" if shared else "through the socket"
        )

    @_safely(lambda: None)
    def handle_preemptions(self, kv_connector_metadata) -> None:
        self._side.fence(kv_connector_metadata)

    @_safely(lambda: None)
    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        self._side.start_loads(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are over before their request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Whole blocks are saved, behind the step that fills them."""

    @_safely(lambda: None)
    def wait_for_save(self) -> None:
        self._side.start_saves(self._connector_metadata)

    @_safely(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        loaded, failed = self._side.results(self._connector_metadata, finished_req_ids)
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)

    @_safely(lambda: None)
    def build_connector_worker_meta(self):
        return self._side.report()

    # Either.

    def get_kv_connector_stats(self) -> Stats | None:
        if self._side is None:
            return None
        if self._role == KVConnectorRole.SCHEDULER:
            self._side.stats.observe("scheduler_seconds", self._spent)
            self._side.stats.count("slow_steps", self._spent > _SLOW)
            self._spent = 0.0
        return self._side.stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._side is not None:
            self._side.close()

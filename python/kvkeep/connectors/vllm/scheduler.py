"""The scheduler's side: what to load, what to save, what not to touch yet. Nothing here waits for the store."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

from vllm.distributed.kv_events import BlockStored

import kvkeep

from .. import revision as weights
from ..registration import Registration
from .conversations import Conversations
from .layout import Shape
from .matches import Found, Matches
from .messages import Blocks, Load, Save, Step, WorkerReport
from .metrics import Stats
from .options import Options
from .saves import Ended, Saves

log = logging.getLogger("vllm.kvkeep")

NULL_BLOCK = 0
"""vLLM's stand-in for a block that a group does not need."""
_LOAD_TRIES = 2
"""Loads of one request that may fail; then it is computed."""
_MEASURE_MIN = 256
"""Tokens of a step from which on its time says what computing one costs."""


@dataclass(slots=True)
class _Request:
    """What is known of a request."""

    request: object
    suffix: bytes
    """Behind each of its keys: which adapter, and whether this engine may share."""
    session: str | None
    key_len: int
    keys: bytearray = field(default_factory=bytearray)
    info: kvkeep.RequestInfo | None = None
    local_tokens: int = 0
    """That the engine has itself, as of its last question."""
    load_from: int | None = None
    """First position of the load that was promised; None: none was."""
    load_to: int = 0
    saved: int = 0
    """Positions that the store has or that are being saved."""
    asked_before: bool = False
    failures: int = 0


class SchedulerSide:
    """Used by vLLM's scheduler thread alone."""

    def __init__(self, options: Options, shape: Shape, namespace: kvkeep.Namespace, revision: str, vllm_config):
        self._options, self._shape, self._namespace = options, shape, namespace
        self.stats = Stats()
        self._matches = Matches(namespace, self.stats, options.lease_seconds)
        self._saves = Saves(vllm_config.parallel_config.tensor_parallel_size)
        self._requests: dict[str, _Request] = {}
        self._step = Step()
        self._fences: set[int] = set()
        self._events: list[BlockStored] = []
        events = vllm_config.kv_events_config
        self._tell_events = bool(events and events.enable_kv_cache_events)
        self._adapters: dict[str, bytes] = {}
        self._salt = b""
        self._pool = None
        self._doubts: dict[int, int] = {}
        self._us_per_token: float | None = None
        self._measured: tuple[float, int] | None = None
        self._conversations = Conversations(namespace, self.stats, shape.tokens_per_key)
        self._registration = Registration(namespace, revision, advance=options.advance_revision, log=log)
        self._registration.start()

    # What vLLM asks.

    def on_new_request(self, request) -> None:
        params = request.kv_transfer_params if isinstance(request.kv_transfer_params, dict) else {}
        own = params.get("kvkeep") if isinstance(params.get("kvkeep"), dict) else {}
        suffix = self._suffix(request)
        if suffix is None:
            return
        state = _Request(request, suffix, own.get("session") or request.session_id, 0)
        self._requests[request.request_id] = state
        self._extend_keys(state)
        state.info = kvkeep.RequestInfo(own.get("kind", "unspecified"), input_tokens=request.num_tokens)
        if self._options.load and not request.skip_reading_prefix_cache:
            self._ask(state)

    def matched_tokens(self, request, local_tokens: int) -> tuple[int | None, bool]:
        state = self._requests.get(request.request_id)
        if state is None:
            return 0, False
        state.local_tokens, state.load_from = local_tokens, None
        if not self._options.load or state.failures >= _LOAD_TRIES or request.skip_reading_prefix_cache:
            return 0, False
        found = self._matches.answer(request.request_id, wait=not state.asked_before)
        state.asked_before = True
        if found is not None and time.monotonic() - found.asked_at > self._options.lease_seconds / 2:
            # It waited long for its turn: the lease may end before the load does.
            found = None
        if found is None:
            if self._matches.is_pending(request.request_id) or self._ask(state):
                return None, False
            return 0, False
        return self._promise(state, found)

    def after_alloc(self, request, blocks, external_tokens: int) -> None:
        state = self._requests.get(request.request_id)
        if state is None:
            return
        ids = blocks.get_block_ids()
        first_new = [state.local_tokens // size for size in self._shape.tokens_per_block]
        self._fence(block for group, first in zip(ids, first_new) for block in group[first:])
        if external_tokens > 0 and state.load_from is not None:
            first, end = (
                state.load_from,
                min(state.load_to, (state.local_tokens + external_tokens) // self._shape.tokens_per_key),
            )
            self._step.loads.append(
                Load(request.request_id, self._blocks(state, ids, first, end), state.request.num_prompt_tokens)
            )
            self.stats.count("loads")
        else:
            self._matches.forget(request.request_id)
        state.load_from = None

    def build_step(self, out) -> Step:
        cached = out.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        for request_id, new in zip(cached.req_ids, cached.new_block_ids):
            if new is not None and request_id not in resumed:
                self._fence(block for group in new for block in group)
        if self._options.save and out.kv_connector_block_state is not None:
            for request_id, tokens in out.num_scheduled_tokens.items():
                self._save(request_id, tokens, out.kv_connector_block_state.resolve_block_ids)
        step, self._step = self._step, Step()
        step.fences, self._fences = sorted(self._fences), set()
        step.idle = out.total_num_scheduled_tokens == 0
        self._measured = (time.monotonic(), out.total_num_scheduled_tokens)
        self._matches.poll()
        return step

    def update(self, output) -> None:
        if self._measured and self._measured[1] >= _MEASURE_MIN:
            us = (time.monotonic() - self._measured[0]) * 1e6 / self._measured[1]
            self._us_per_token = us if self._us_per_token is None else 0.7 * self._us_per_token + 0.3 * us
        self._measured = None
        for request_id in output.failed_recving or ():
            if state := self._requests.get(request_id):
                state.failures += 1
                state.saved = 0
                self.stats.count("load_failures")
        for request_id in output.finished_recving or ():
            # The worker's gets stood on the lease.
            self._matches.forget(request_id)
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            for ended in self._saves.end(report):
                self._saved(ended)
            self._doubt(report)

    def finished(self, request) -> None:
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return
        self._matches.forget(request.request_id)
        if state.session and state.saved and not self._salt:
            self._conversations.append(
                state.session, bytes(state.keys[: state.saved * state.key_len]), state.key_len, request
            )

    def take_events(self) -> list[BlockStored]:
        events, self._events = self._events, []
        return events

    def reset(self) -> None:
        """What the engine computes from now on may be something else (it says no more than that): it keeps to itself. The store and
        other engines keep what they have."""
        self._salt = os.urandom(8)
        for state in self._requests.values():
            self._matches.forget(state.request.request_id)
            state.failures = _LOAD_TRIES

    def has_work(self) -> bool:
        """Whether steps are wanted although no request is left: to hear of saves."""
        return bool(self._saves)

    def bind_pool(self, pool) -> None:
        self._pool = pool

    def close(self) -> None:
        self._registration.stop()
        self._conversations.close()

    # Keys.

    def _suffix(self, request) -> bytes | None:
        """None: this request's KV must not be shared, since nobody can say which adapter made it."""
        adapter = request.lora_request
        if adapter is None:
            return self._salt
        name = adapter.lora_name
        if name not in self._adapters:
            known = self._options.adapter_revisions.get(name) or weights.of_weights(adapter.lora_path)
            if known is None:
                log.warning("kvkeep: the weights of adapter %s cannot be told: its KV is not shared", name)
            self._adapters[name] = b"" if known is None else weights.short(known)
        if not self._adapters[name]:
            return None
        return self._adapters[name] + self._salt

    def _extend_keys(self, state: _Request) -> None:
        hashes = state.request.block_hashes
        have = len(state.keys) // state.key_len if state.key_len else 0
        if have == len(hashes):
            return
        for block_hash in hashes[have:]:
            state.keys += block_hash
            state.keys += state.suffix
        state.key_len = len(state.keys) // len(hashes)

    def _key(self, state: _Request, position: int) -> bytes:
        return bytes(state.keys[position * state.key_len : (position + 1) * state.key_len])

    # Loading.

    def _ask(self, state: _Request) -> bool:
        self._extend_keys(state)
        # At least one token is computed, or there is nothing to go on with.
        positions = min(len(state.request.block_hashes), (state.request.num_tokens - 1) // self._shape.tokens_per_key)
        if positions <= 0:
            return False
        keys = bytes(state.keys[: positions * state.key_len])
        return self._matches.ask(state.request.request_id, keys, state.key_len, state.info)

    def _promise(self, state: _Request, found: Found) -> tuple[int, bool]:
        match, per_key = found.match, self._shape.tokens_per_key
        end = match.boundary_tokens - match.boundary_tokens % self._shape.aligned_to
        tokens = max(0, end - state.local_tokens)
        state.saved = max(state.saved, match.boundary_positions)
        self.stats.count("match_tokens", tokens)
        if tokens < max(self._options.min_load_tokens, 1):
            return 0, False
        if match.verdict == "recompute" or (match.verdict is None and self._is_slower(match, tokens)):
            self.stats.count("recomputed_by_advice")
            return 0, False
        state.load_from, state.load_to = state.local_tokens // per_key, end // per_key
        return tokens, True

    def _is_slower(self, match, tokens: int) -> bool:
        """Whether loading takes longer than computing did so far."""
        if match.load_seconds is None or self._us_per_token is None:
            return False
        return match.load_seconds > tokens * self._us_per_token / 1e6

    def _blocks(self, state: _Request, ids: tuple[list[int], ...], first: int, end: int) -> Blocks:
        """The blocks of positions `first` to `end - 1`."""
        per_key = self._shape.tokens_per_key
        out = []
        for group, tokens in zip(ids, self._shape.tokens_per_block):
            every = tokens // per_key
            row = []
            for position in range(first, end):
                ends_here = (position + 1) % every == 0
                block = group[position // every] if ends_here and position // every < len(group) else NULL_BLOCK
                row.append(block if block != NULL_BLOCK else -1)
            out.append(row)
        keys = bytes(state.keys[first * state.key_len : end * state.key_len])
        return Blocks(keys, state.key_len, tuple(out))

    # Saving.

    def _save(self, request_id: str, tokens: int, block_ids) -> None:
        state = self._requests.get(request_id)
        if state is None:
            return
        request = state.request
        computed = request.num_computed_tokens + tokens
        full = min(computed // self._shape.tokens_per_key, len(request.block_hashes))
        if full <= state.saved:
            return
        self._extend_keys(state)
        first, state.saved = state.saved, full
        blocks = self._blocks(state, block_ids(request_id), first, full)
        parent = self._key(state, first - 1) if first else None
        save = Save(self._saves.number(), request_id, blocks, parent, first, request.num_prompt_tokens)
        self._saves.begin(save, request)
        self._step.saves.append(save)

    def _fence(self, blocks) -> None:
        self._fences |= self._saves.that_read(blocks)

    def _saved(self, ended: Ended) -> None:
        save, n = ended.save, len(ended.save.blocks)
        self.stats.count("save_blocks", ended.stored)
        self.stats.count("save_bytes", ended.stored * sum(self._shape.block_bytes))
        lost = n - ended.stored
        self.stats.count("save_abandoned_blocks" if ended.abandoned else "save_refused_blocks", lost)
        if not self._tell_events or not ended.stored:
            return
        key_len, per_key, request = save.blocks.key_len, self._shape.tokens_per_key, ended.request
        hash_len = len(request.block_hashes[0])
        hashes = [save.blocks.keys[i * key_len : i * key_len + hash_len] for i in range(ended.stored)]
        tokens = request.all_token_ids[save.first * per_key : (save.first + ended.stored) * per_key]
        adapter = request.lora_request
        self._events.append(
            BlockStored(
                block_hashes=hashes,
                parent_block_hash=save.parent[:hash_len] if save.parent else None,
                token_ids=list(tokens),
                block_size=per_key,
                lora_id=adapter.lora_int_id if adapter else None,
                medium="STORAGE",
                lora_name=adapter.lora_name if adapter else None,
                ownership="kvkeep",
            )
        )

    def _doubt(self, report: WorkerReport) -> None:
        """Blocks that the server may still be writing stay out of vLLM's hands, although their request is computed meanwhile."""
        if self._pool is None:
            return
        for block, n in report.doubtful.items():
            if block not in self._doubts:
                self._pool.touch([self._pool.blocks[block]])
            self._doubts[block] = self._doubts.get(block, 0) + n
        for block, n in report.settled.items():
            if block in self._doubts:
                self._doubts[block] -= n
                if self._doubts[block] <= 0:
                    del self._doubts[block]
                    self._pool.free_blocks([self._pool.blocks[block]])

"""A worker's side: gets into KV memory and puts out of it, submitted in one step and collected in later ones."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

import kvkeep

from ..registration import Registration
from .layout import Shape
from .matches import request_name
from .messages import Blocks, Load, Save, Saved, Step, WorkerReport
from .metrics import Stats
from .options import Options

log = logging.getLogger("vllm.kvkeep")

LOADS, SAVES = 0, 1
"""Queues of the namespace."""
QUEUES = 2
_IDLE_WAIT = 0.002
"""Seconds that a step in which nothing is computed waits for what is under way, instead of going round at once."""
_FENCED_WAIT = 0.1
"""Age in seconds that a save may reach before it is taken back for somebody who needs its blocks in this step."""
_TAKEN_BACK_WAIT = 1.0
"""Seconds that taking a save back may take at the very most; it takes some tens of microseconds."""
_LOST = ("unreachable", "restart")
"""What is said of a server that was lost."""
_SETTLE_EVERY = 0.1
"""Seconds between two looks at memory that is in doubt."""


@dataclass(slots=True)
class _Get:
    load: Load
    places: list[int]
    """Block of each item."""
    started: float


@dataclass(slots=True)
class _Put:
    save: Save
    positions: int
    """Leading positions of the save that it has nothing of; they count as stored."""
    parts: list[int]
    """Parts of each of the other positions."""
    started: float


class WorkerSide:
    """Used by vLLM's worker thread alone."""

    def __init__(self, options: Options, shape: Shape, namespace: kvkeep.Namespace, rank: int):
        self._options, self._shape, self._namespace = options, shape, namespace
        self._shard = 0 if shape.replicated else rank
        self._saves_here = not (shape.replicated and rank != 0)
        self.stats = Stats()
        self._geometries: list[kvkeep.Geometry] = []
        self._gets: dict[int, _Get] = {}
        self._puts: dict[int, _Put] = {}
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._report = WorkerReport()
        self._doubtful: Counter[int] = Counter()
        self._looked = 0.0
        self._region: kvkeep.Region | None = None
        self._registration: Registration | None = None

    def register(self, geometries: list[kvkeep.Geometry], region: kvkeep.Region | None) -> None:
        """Where the blocks lie. From now on there is something to do."""
        self._geometries, self._region = geometries, region
        self._look_for_the_server()

    def _look_for_the_server(self) -> None:
        """At the start, and after it was lost. One thread tells it of the memory, which can take a second a gigabyte; until that is
        done nothing is loaded or saved, or each transfer would tell it again."""
        if self._registration is None or not self._registration.is_alive():
            self._registration = Registration(self._namespace, "", advance=False, log=log, region=self._region)
            self._registration.start()

    def _is_in_place(self) -> bool:
        return self._registration is not None and not self._registration.is_alive()

    def close(self) -> None:
        if self._registration is not None:
            self._registration.stop()

    # In the order in which vLLM calls them in a step.

    def fence(self, step: Step) -> None:
        """Blocks of these saves are written by others in this step."""
        if not step.fences:
            return
        self._collect_puts(self._namespace.poll(SAVES, 512))
        wanted = set(step.fences)
        begun = [put.started for put in self._puts.values() if put.save.job in wanted]
        if not begun:
            return
        since = time.monotonic()
        if not self._are_over(wanted, min(begun) + _FENCED_WAIT):
            for ticket, put in list(self._puts.items()):
                if put.save.job in wanted:
                    self._namespace.cancel(ticket)
            if not self._are_over(wanted, time.monotonic() + _TAKEN_BACK_WAIT):
                log.error("kvkeep: a save was not taken back")
        self.stats.observe("hold_seconds", time.monotonic() - since)

    def _are_over(self, jobs: set[int], until: float) -> bool:
        """Whether none of these saves is under way any more; waits for it."""
        while any(put.save.job in jobs for put in self._puts.values()):
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._collect_puts(self._namespace.wait(SAVES, 512, left))
        return True

    def start_loads(self, step: Step) -> None:
        for load in step.loads:
            try:
                ticket = self._submit_load(load)
            except Exception:
                # Its request waits to hear of it, whatever happens.
                log.exception("kvkeep: a load failed")
                self.stats.count("errors")
                ticket = None
            if ticket is None:
                self._failed.add(load.request_id)
                self._loaded.add(load.request_id)

    def _submit_load(self, load: Load) -> int | None:
        keys, parts, places, blocks = self._items(load.blocks, 0)
        if not blocks or not self._is_in_place():
            return None
        call = self._call(load.request_id, self._options.load_seconds_max, load.input_tokens)
        ticket = self._namespace.submit_get(
            keys, *places, queue=LOADS, key_len=load.blocks.key_len, parts=parts, call=call
        )
        if ticket is not None:
            self._gets[ticket] = _Get(load, blocks, time.monotonic())
        return ticket

    def start_saves(self, step: Step) -> None:
        for save in step.saves:
            if not self._saves_here:
                # The first rank has the same bytes, and stores them.
                self._saved(save, len(save.blocks), False)
                continue
            if not self._is_in_place():
                self._saved(save, 0, False)
                continue
            try:
                self._submit_save(save)
            except Exception:
                log.exception("kvkeep: a save failed")
                self.stats.count("errors")
                self._saved(save, 0, False)

    def _submit_save(self, save: Save) -> None:
        skipped, key_len = self._leading_empty(save.blocks), save.blocks.key_len
        keys, parts, places, blocks = self._items(save.blocks, skipped)
        if not blocks:
            self._saved(save, len(save.blocks), False)
            return
        ticket = self._namespace.submit_put(
            keys,
            *places,
            queue=SAVES,
            key_len=key_len,
            parts=parts,
            parent=save.blocks.keys[(skipped - 1) * key_len : skipped * key_len] if skipped else save.parent,
            first_position=save.first + skipped,
            cls=self._options.cls,
            call=self._call(save.request_id, self._options.save_seconds_max, save.input_tokens),
        )
        if ticket is None:
            self.stats.count("save_busy_blocks", len(save.blocks))
            self._saved(save, 0, False)
            return
        counts = [len(p) for p in parts] if isinstance(parts[0], list) else [1] * (len(save.blocks) - skipped)
        self._puts[ticket] = _Put(save, skipped, counts, time.monotonic())

    def _call(self, request_id: str, seconds: float, input_tokens: int) -> kvkeep.Call:
        info = kvkeep.RequestInfo(input_tokens=input_tokens)
        return kvkeep.Call(request_name(request_id), deadline=seconds, info=info)

    def results(self, step: Step | None, finished: set[str]) -> tuple[set[str], set[str]]:
        """Requests whose loads are over, and those of them that failed."""
        for get in self._gets.values():
            if get.load.request_id in finished:
                # Nobody waits for it any more.
                self._namespace.cancel_request(request_name(get.load.request_id))
        idle = step is not None and step.idle
        if self._gets:
            self._collect_gets(self._wait(LOADS, idle and not self._loaded))
        if self._puts:
            self._collect_puts(self._wait(SAVES, idle and not self._gets and not self._loaded))
        if self._doubtful and time.monotonic() - self._looked > _SETTLE_EVERY:
            self._looked = time.monotonic()
            if self._namespace.settle(0.0):
                self._report.settled += self._doubtful
                self._doubtful = Counter()
        loaded, self._loaded = self._loaded, set()
        failed, self._failed = self._failed, set()
        return loaded, failed

    def report(self) -> WorkerReport | None:
        if not self._report:
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def _wait(self, queue: int, idle: bool) -> list[kvkeep.Completion]:
        return self._namespace.wait(queue, 512, _IDLE_WAIT) if idle else self._namespace.poll(queue, 512)

    # What became of them.

    def _collect_gets(self, completions: list[kvkeep.Completion]) -> None:
        for done in completions:
            get = self._gets.pop(done.ticket, None)
            if get is None:
                continue
            request_id, got = get.load.request_id, done.got
            self._loaded.add(request_id)
            seconds = time.monotonic() - get.started
            if got is not None and got.all_hit:
                self.stats.observe("load_seconds", seconds)
                self.stats.count("load_blocks", len(get.load.blocks))
                self.stats.count("load_bytes", sum(got.lengths))
                continue
            self._failed.add(request_id)
            if got is not None and got.reason in _LOST:
                self._look_for_the_server()
            why = got.reason if got is not None else done.error
            log.info("kvkeep: a load of %d blocks failed after %.3f s: %s", len(get.places), seconds, why)
            if got is not None and got.in_doubt:
                doubtful = Counter({get.places[item] for item in got.in_doubt})
                self._doubtful += doubtful
                self._report.doubtful += doubtful

    def _collect_puts(self, completions: list[kvkeep.Completion]) -> None:
        for done in completions:
            put = self._puts.pop(done.ticket, None)
            if put is None:
                continue
            self.stats.observe("save_seconds", time.monotonic() - put.started)
            stored, kept = put.positions, done.stored.kept if done.stored is not None else 0
            for parts in put.parts:
                kept -= parts
                if kept < 0:
                    break
                stored += 1
            why = done.error if done.stored is None else done.stored.error
            if why is not None:
                if why.kind in _LOST:
                    self._look_for_the_server()
                log.info("kvkeep: %d of %d blocks were saved: %s", stored, len(put.save.blocks), why)
                log.debug("kvkeep: %s", self._namespace.describe()["text"])
            self._saved(put.save, stored, done.cancelled)

    def _saved(self, save: Save, stored: int, abandoned: bool) -> None:
        self._report.saved.setdefault(save.job, []).append(Saved(stored, abandoned))

    # What a call names.

    def _leading_empty(self, blocks: Blocks) -> int:
        """Leading positions of which no group has a block."""
        for n, row in enumerate(zip(*blocks.ids)):
            if any(block >= 0 for block in row):
                return n
        return len(blocks)

    def _items(self, blocks: Blocks, skipped: int):
        """Keys, parts, places (and block ids) as the calls take them, and the block of each item."""
        keys = blocks.keys[skipped * blocks.key_len :]
        if len(blocks.ids) == 1:
            ids = blocks.ids[0][skipped:]
            if all(block >= 0 for block in ids):
                return keys, [(0, self._shard)], (self._geometries[0], ids), ids
        parts, places, flat, kept = [], [], [], bytearray()
        for n, row in enumerate(zip(*blocks.ids)):
            here = [(group, block) for group, block in enumerate(row) if block >= 0]
            if not here:
                continue
            kept += blocks.keys[n * blocks.key_len : (n + 1) * blocks.key_len]
            parts.append([(group, self._shard) for group, _ in here])
            places += [self._geometries[group].place(block) for group, block in here]
            flat += [block for _, block in here]
        return bytes(kept), parts, (places,), flat

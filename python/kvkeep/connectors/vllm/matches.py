"""Questions to the store, "how much of this prompt do you have", asked without waiting."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import kvkeep

from .metrics import Stats

ANSWER_MAX = 0.09
"""Seconds after which a question is answered with a miss, so that the scheduler hears of it within a tenth of a second."""
FIRST_WAIT = 0.0005
"""Seconds that a request's first asking waits for an answer which is nearly there: less than a step of any engine."""
_QUEUE = 0


def request_name(request_id: str) -> bytes:
    """How the store knows a request: its id, or a digest of one that is too long."""
    name = request_id.encode()
    return name if len(name) <= 64 else hashlib.blake2b(name, digest_size=32).digest()


@dataclass(slots=True)
class Found:
    """An answer."""

    match: kvkeep.Match
    asked_at: float


class Matches:
    """All on the scheduler's thread."""

    def __init__(self, namespace: kvkeep.Namespace, stats: Stats, lease_seconds: float):
        self._namespace, self._stats, self._lease = namespace, stats, lease_seconds
        self._asked: dict[int, tuple[str, float]] = {}
        self._pending: dict[str, int] = {}
        self._found: dict[str, Found] = {}

    def ask(self, request_id: str, keys: bytes, key_len: int, info: kvkeep.RequestInfo) -> bool:
        """Whether it is under way; where not, too much else is."""
        self.forget(request_id)
        call = kvkeep.Call(request_name(request_id), deadline=ANSWER_MAX, info=info)
        query = kvkeep.Query(keys, key_len=key_len, lease=self._lease, promote=True)
        ticket = self._namespace.submit_match(query, queue=_QUEUE, call=call)
        if ticket is None:
            self._stats.count("match_lost")
            return False
        self._asked[ticket] = (request_id, time.monotonic())
        self._pending[request_id] = ticket
        return True

    def is_pending(self, request_id: str) -> bool:
        return request_id in self._pending

    def answer(self, request_id: str, wait: bool) -> Found | None:
        """The answer, if it is here; None: not yet, or never asked. `wait`: at most FIRST_WAIT for it."""
        self._land(self._namespace.poll(_QUEUE, 512))
        if wait and request_id in self._pending:
            until = time.monotonic() + FIRST_WAIT
            while request_id in self._pending and (left := until - time.monotonic()) > 0:
                self._land(self._namespace.wait(_QUEUE, 512, left))
        return self._found.get(request_id)

    def forget(self, request_id: str) -> None:
        """Nobody needs the answer any more: what it leased may go."""
        self._pending.pop(request_id, None)
        if found := self._found.pop(request_id, None):
            self._let_go(found.match)

    def poll(self) -> None:
        """Lets go of answers that came for nobody."""
        if self._asked:
            self._land(self._namespace.poll(_QUEUE, 512))

    def _land(self, completions: list[kvkeep.Completion]) -> None:
        for done in completions:
            request_id, asked_at = self._asked.pop(done.ticket, (None, 0.0))
            match = done.matched[0] if done.matched else None
            wanted = request_id is not None and self._pending.get(request_id) == done.ticket
            if not wanted:
                if match is not None:
                    self._let_go(match)
                continue
            del self._pending[request_id]
            self._stats.count("matches")
            self._stats.observe("match_seconds", time.monotonic() - asked_at)
            if match is None or match.error is not None or match.reason in ("unreachable", "late", "restart"):
                self._stats.count("match_lost")
            if match is not None:
                self._found[request_id] = Found(match, asked_at)
            else:
                # The call itself was wrong, which is a bug; it is a miss all the same.
                self._found[request_id] = Found(_NOTHING, asked_at)

    def _let_go(self, match) -> None:
        if match.lease_id is not None:
            self._namespace.release(match.lease_id)


class _Nothing:
    """An answer that is none."""

    boundary_positions = boundary_tokens = 0
    lease_id = verdict = load_seconds = reason = error = None


_NOTHING = _Nothing()

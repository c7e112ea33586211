"""Finished requests of a conversation, appended to the store's session of that id: it can then be listed, restored, pinned,
deleted as one thing. In a thread of its own, because sessions are not on the way of blocks and their calls wait."""

from __future__ import annotations

import logging
import queue
import threading
import time

import kvkeep

from .metrics import Stats

log = logging.getLogger("vllm.kvkeep")

_WAITING_MAX = 256
"""Requests that wait to be appended; one more is not."""
_TRIES = 4
_PAUSE = 0.25
"""Seconds between two tries: the last blocks of a request may be on their way still."""


class Conversations:
    """Starts its thread with the first request that has a session."""

    def __init__(self, namespace: kvkeep.Namespace, stats: Stats, tokens_per_key: int):
        self._namespace, self._stats, self._tokens_per_key = namespace, stats, tokens_per_key
        self._waiting: queue.Queue = queue.Queue(_WAITING_MAX)
        self._thread: threading.Thread | None = None

    def append(self, session: str, keys: bytes, key_len: int, request) -> None:
        """Never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvkeep-sessions", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((session, keys, key_len, list(request.all_token_ids)))
        except queue.Full:
            self._stats.count("sessions_failed")

    def close(self) -> None:
        if self._thread is not None:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                pass

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            session, keys, key_len, tokens = item
            for left in reversed(range(_TRIES)):
                try:
                    self._append(session, keys, key_len, tokens)
                    self._stats.count("sessions_appended")
                    break
                except kvkeep.Error as e:
                    if left == 0:
                        log.warning("kvkeep: session %s was not appended to: %s", session, e)
                        self._stats.count("sessions_failed")
                    else:
                        time.sleep(_PAUSE)

    def _append(self, session: str, keys: bytes, key_len: int, tokens: list[int]) -> None:
        sessions = self._namespace.sessions
        info, made = sessions.open(session)
        chain = [keys[i : i + key_len] for i in range(0, len(keys), key_len)]
        have = info.positions
        if not made and have:
            pairs = list(zip(sessions.keys(session), chain))
            # A key of which no copy is left to tell it is taken for ours: the one before says the same of its past.
            same = next((n for n, (there, ours) in enumerate(pairs) if there not in (None, ours)), len(pairs))
            if same == len(chain):
                return
            if same < have:
                # It went another way from there on.
                info = sessions.truncate(session, same)
                have = same
        known = info.tokens
        sessions.append(
            session,
            keys[have * key_len :],
            key_len=key_len,
            from_position=have,
            token_ids=tokens[known : len(chain) * self._tokens_per_key],
            from_token=known,
        )

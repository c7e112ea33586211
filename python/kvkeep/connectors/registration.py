"""Tells the store of a namespace as soon as the store is there. The engine never waits for it: until then everything misses."""

from __future__ import annotations

import logging
import threading

import kvkeep

_READY_WAIT = 2.0
"""Seconds that one question for the server may take; asked again and again, in a thread of its own."""
_REFUSED_PAUSE = 1.0
_LOST_PAUSE = 0.05


class Registration(threading.Thread):
    """Registers a namespace (and memory), and says that the weights are others now, where they are. Ends when that is done.

    Each process of an engine has one, so that its first call finds all in place; only one of them advances the revision.
    """

    def __init__(
        self,
        namespace: kvkeep.Namespace,
        revision: str,
        *,
        advance: bool,
        log: logging.Logger,
        region: kvkeep.Region | None = None,
    ):
        super().__init__(name="kvkeep-registration", daemon=True)
        self._namespace, self._revision, self._advance, self._log = namespace, revision, advance, log
        self._region = region
        # Not `_stop`: that is a method of every thread.
        self._ended = threading.Event()

    def run(self) -> None:
        said = None
        while not self._ended.is_set():
            try:
                if self._namespace.ready(_READY_WAIT):
                    if self._region is not None:
                        self._namespace.register_region(self._region)
                    self._log.info("kvkeep: namespace %s is ready", self._namespace.name)
                    return
                self._ended.wait(_LOST_PAUSE)
            except kvkeep.Error as e:
                if self._ended.is_set() or (e.kind == "stale_revision" and self._advance and self._moved_on()):
                    return
                if said != str(e):
                    said = str(e)
                    self._log.warning("kvkeep: the store will not have us, every lookup misses: %s", e)
                self._ended.wait(_REFUSED_PAUSE)

    def _moved_on(self) -> bool:
        try:
            if self._namespace.advance_revision(self._revision):
                name = self._namespace.name
                self._log.warning("kvkeep: other weights than the store knew: what %s held is missed from now on", name)
                return True
        except kvkeep.Error as e:
            self._log.warning("kvkeep: the revision was not advanced: %s", e)
        return False

    def stop(self) -> None:
        """Ends it soon; does not wait."""
        self._ended.set()

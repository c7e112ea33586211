"""The namespace of an engine: which one, at which revision, and who tells the store."""

from __future__ import annotations

import hashlib
import logging
import threading
import time

import kvkeep

from .. import revision as weights
from .options import Options

log = logging.getLogger("vllm.kvkeep")

_READY_WAIT = 2.0
"""Seconds that one question for the server may take; asked again and again, in a thread of its own."""
_REFUSED_PAUSE = 1.0
_PATIENCE = {"scheduler": 0.1, "worker": 0.3}
"""Seconds of silence after which the server is lost. A prompt waits for the scheduler's questions. Of the workers' transfers only those
under way wait longer, and a server on a busy host that is late by 0.2 s need not lose what was computed."""


def instance_of(engine_id: str) -> bytes:
    """What names an engine to the store: the same in its scheduler and its workers, which so share its leases."""
    return hashlib.blake2b(engine_id.encode(), digest_size=16, person=b"kvkeep-vllm").digest()


def revision_of(options: Options, vllm_config) -> str | None:
    """Which weights this engine has; None: it cannot say, and must not share."""
    if options.revision:
        return options.revision
    if vllm_config.load_config.load_format == "dummy":
        # Not those of the folder.
        return None
    return weights.of_weights(vllm_config.model_config.model, vllm_config.model_config.revision)


def namespace_of(
    options: Options, name: str, fmt: kvkeep.Format, revision: str, engine_id: str, role: str, queues: int
):
    """Nothing connects yet."""
    client = kvkeep.Client(
        options.endpoint, name=f"vllm {role}", instance=instance_of(engine_id), patience=_PATIENCE[role]
    )
    return client.namespace(name, fmt, revision, queues=queues, in_flight_max=512)


class Registration(threading.Thread):
    """Registers the namespace (and memory) as soon as the server is there, and says that the weights are others now, where they are.

    It ends when that is done. Meanwhile the engine runs with misses; it never waits for this. Every process of an engine has one, so
    that its first call finds all in place; only the scheduler's advances the revision.
    """

    def __init__(
        self, namespace: kvkeep.Namespace, revision: str, *, advance: bool, region: kvkeep.Region | None = None
    ):
        super().__init__(name="kvkeep-registration", daemon=True)
        self._namespace, self._revision, self._advance, self._region = namespace, revision, advance, region
        self._stop = threading.Event()

    def run(self) -> None:
        said = None
        while not self._stop.is_set():
            try:
                if self._namespace.ready(_READY_WAIT):
                    if self._region is not None:
                        self._namespace.register_region(self._region)
                    log.info("kvkeep: namespace %s is ready", self._namespace.name)
                    return
            except kvkeep.Error as e:
                if self._stop.is_set():
                    return
                if e.kind == "stale_revision" and self._advance:
                    if self._moved_on():
                        return
                elif said != str(e):
                    said = str(e)
                    log.warning("kvkeep: the store will not have us, every lookup misses: %s", e)
                self._stop.wait(_REFUSED_PAUSE)
            time.sleep(0.05)

    def _moved_on(self) -> bool:
        try:
            if self._namespace.advance_revision(self._revision):
                log.warning(
                    "kvkeep: other weights than the store knew: what it holds in %s is missed from now on",
                    self._namespace.name,
                )
                return True
        except kvkeep.Error as e:
            log.warning("kvkeep: the revision was not advanced: %s", e)
        return False

    def stop(self) -> None:
        self._stop.set()

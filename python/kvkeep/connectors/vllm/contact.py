"""The namespace of an engine: which one, and at which revision."""

from __future__ import annotations

import hashlib

import kvkeep

from .. import revision as weights
from .options import Options

_PATIENCE = {"scheduler": 0.5, "worker": 2.0}
"""Seconds of silence after which the server is lost. A prompt waits for its own question at most `matches.ANSWER_MAX`, whatever stands
here; but once the scheduler has lost the server, prompts miss at once, and on a host without a free core a word of 0.1 s cost a prompt
of 8k tokens its half minute. A worker has to tell of gigabytes of memory, which takes a server on a busy host a second, and one that gives up
tells it again; only transfers under way wait so long for a server that stopped."""


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

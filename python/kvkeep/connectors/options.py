"""Options that the thin connectors (SGLang, LMCache) have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class StoreOptions:
    """Where the store is, and how patient an engine is with it. All times in seconds."""

    endpoint: str | None = None
    """Of the store; None: `KVKEEP_ENDPOINT`, else a server on this host."""
    namespace: str | None = None
    """Begin of the namespaces' names; None: the model as the engine calls it."""
    revision: str | None = None
    """Digest of the weights; None: made from the model's folder."""
    model_path: str | None = None
    """Folder of the weights; None: as the engine knows it."""
    advance_revision: bool = True
    """What the store has of other weights under this name is missed by everybody from now on. False: share nothing then."""
    lease_seconds: float = 30.0
    """What was found stays readable so long, unless it is released before."""
    match_seconds_max: float = 1.0
    """A lookup that takes longer found nothing."""
    load_seconds_max: float = 10.0
    """A load that takes longer has failed."""
    save_seconds_max: float = 10.0
    """A save that takes longer has failed."""
    patience_seconds: float = 0.3
    """A server that is silent for so long is lost until it speaks again. All calls are on threads that move KV in the background,
    so a little more than on a scheduler's: a busy host is not a lost server."""
    cls: str = "cache"
    """Class of what is saved: cache, replicated, durable."""
    share_memory: bool = True
    """Let the server fill and read the engine's host pool itself where it can. False: through the socket."""
    any_version: bool = False
    """Work with releases of the engine that were not tested."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for an option that does not exist: a typing error must not go unnoticed."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"kvkeep has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**given)

"""What `kv_connector_extra_config` may say."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """The options of the connector; docs/engines/vllm.md explains them to users."""

    endpoint: str | None = None
    """Of the store; None: `KVKEEP_ENDPOINT`, else a server on this host."""
    namespace: str | None = None
    """Its name; None: the model as vLLM was told it."""
    revision: str | None = None
    """Digest of the weights; None: made from the model's folder."""
    adapter_revisions: dict[str, str] = field(default_factory=dict)
    """Name of a LoRA adapter to the digest of its weights; one that is not here is read from its folder."""
    advance_revision: bool = True
    """What the store has of other weights under this name is missed by everybody from now on. False: share nothing then."""
    load: bool = True
    save: bool = True
    share_memory: bool = True
    """Let the server fill and read the engine's KV memory itself. False: through the socket."""
    min_load_tokens: int = 1
    """Fewer tokens than this are computed rather than loaded."""
    lease_seconds: float = 30.0
    """What was matched stays readable so long, unless it is released before."""
    load_seconds_max: float = 10.0
    """A load that takes longer has failed."""
    save_seconds_max: float = 10.0
    prefill_us_per_token: int = 0
    """Declared cost of computing one token, for the store's advice; 0: the connector measures it and decides itself."""
    cls: str = "cache"
    """Class of what is saved: cache, replicated, durable."""
    any_version: bool = False
    """Work with releases of vLLM that were not tested."""

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Options:
        """Raises ValueError for an option that does not exist: a typing error must not go unnoticed."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise ValueError(f"kvkeep has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**extra)

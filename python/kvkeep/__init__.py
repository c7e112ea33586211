"""KVKeep for Python: attention KV kept in a store, taken back instead of computed again.

    client = kvkeep.Client("local:/var/lib/engine/kv?dram=4GiB&nvme=50GiB")   # nothing need be started
    ns = client.namespace("my-model", format, revision="digest of the weights")
    found = ns.match(keys, lease=30, call=kvkeep.Call("request 1"))
    got = ns.get_into(keys[: found.boundary_positions], buffers, lease=found.lease_id)

What there is and what it promises is written in the type stubs beside this file, `_native.pyi`. `python -m kvkeep doctor` says
what is wrong. A store must never be worse than no store: a server that is lost is misses, and no exception.
"""

import atexit as _atexit
import os as _os

from . import _native, _programs
from ._doctor import doctor
from ._native import (
    ALREADY_PRESENT,
    HIT,
    IN_PROGRESS,
    LOADING,
    MISS,
    PENDING,
    REASONS,
    REFUSED,
    STORED,
    THROTTLED,
    TIERS,
    Call,
    Client,
    Completion,
    Error,
    Event,
    EventBatch,
    Events,
    Format,
    Geometry,
    Got,
    Group,
    Lease,
    MappedBlock,
    MappedMatch,
    MappedPart,
    Match,
    Namespace,
    Place,
    Query,
    Region,
    RequestInfo,
    Restored,
    SessionInfo,
    Sessions,
    Stored,
    Tokens,
    __version__,
)

__all__ = [
    "ALREADY_PRESENT",
    "HIT",
    "IN_PROGRESS",
    "LOADING",
    "MISS",
    "PENDING",
    "REASONS",
    "REFUSED",
    "STORED",
    "THROTTLED",
    "TIERS",
    "Call",
    "Client",
    "Completion",
    "Error",
    "Event",
    "EventBatch",
    "Events",
    "Format",
    "Geometry",
    "Got",
    "Group",
    "Lease",
    "MappedBlock",
    "MappedMatch",
    "MappedPart",
    "Match",
    "Namespace",
    "Place",
    "Query",
    "Region",
    "RequestInfo",
    "Restored",
    "SessionInfo",
    "Sessions",
    "Stored",
    "Tokens",
    "__version__",
    "doctor",
]

_programs.announce()
_os.register_at_fork(after_in_child=_native._after_fork)
_atexit.register(_native._close_all)

"""What the native module has; `import kvkeep` has all of it.

Words that hold everywhere:

* **Keys** are opaque, 1 to 128 bytes. Either a sequence of bytes-like objects, or ONE bytes-like object in which keys of
  `key_len` bytes lie one behind the other (fast: no Python object per key).
* **Parts.** A position has a part per (group, shard) of the format. `parts=[(group, shard), ...]` names those that a call is
  about, for each key the same ones; or a list with one such list per key. Default: `[(0, 0)]`. Items of a call are counted key
  by key, and within a key in the order of its parts; places, block ids and status codes follow that order.
* **Places** say where the bytes of each item lie in this process. Either a sequence with one `PlaceLike` per item, or a
  `Geometry` together with `blocks`: one block id per item (a sequence of ints, or a buffer of int32 or int64).
* **Seconds** are floats. **Tickets** and **lease ids** are ints.
* **Whose memory it is.** From the call to its end (return, or for a submitted call its completion being polled) the memory that
  it names belongs to the call: nobody may read what a get fills, and nobody may write what a get fills or a put reads. An object
  that has a buffer (bytearray, memoryview, array, ndarray, mmap ...) is held by the call so long: it cannot be resized or freed.
  Of a raw `(address, length)` the caller promises that it stays mapped until then. The exception are parts that are **in
  doubt** (`Got.in_doubt`): the server may write those until `Namespace.settle` answers True. Only memory of a `Region` can be
  in doubt over the Unix socket, where the server writes it itself; but a call whose deadline passed while this process's own
  I/O thread was not run calls any memory in doubt.
* **Which way bytes go.** Memory of a `Region` (looked up by address: buffers, slices and raw addresses that lie in one are found)
  is filled and read by the server itself, in one copy or straight from the disk. All other memory is filled from the socket:
  a copy more. A call goes one way: one item outside of regions makes all of its items travel.
* **Losses.** A server that is down, stopped, too slow or started anew is misses, never an exception. `Error` is raised where the
  call itself is wrong (and by what is not hot: sessions, `ready`, `remove`, `prefetch`, `explain`). TypeError, ValueError and
  BufferError are raised where the arguments are of the wrong kind.
* **The GIL** is released in every call that may wait. All objects may be used by several threads.
* **Forks.** A forked child goes on with the same objects: it is a new instance with connections, queues and event descriptors of
  its own (ask `event_fd` again). Tickets of its parent are not its own, and buffers that the parent's calls held at that moment
  stay held in the child. Objects cannot be pickled: a spawned process makes its own.
  What is bound to the parent's connections ends in the child: `MappedBlock` and `Events` say how.
* **Signals.** `wait`, `ready` and `Events` look for them (Ctrl-C) while they wait; the other calls end by their deadlines.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, TypeAlias, final

from typing_extensions import Buffer  # collections.abc.Buffer since Python 3.12

__version__: str

Keys: TypeAlias = Sequence[Buffer] | Buffer
Parts: TypeAlias = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]
PlaceLike: TypeAlias = Buffer | tuple[int, int] | Place
"""An object with a contiguous buffer (a writable one for a get), a raw `(address, length)`, or a `Place`."""
Places: TypeAlias = Sequence[PlaceLike] | Geometry
BlockIds: TypeAlias = Sequence[int] | Buffer
# Where a method has the name of a type.
_Bytes: TypeAlias = bytes
_List: TypeAlias = list
Tier: TypeAlias = Literal["hbm", "dram", "nvme", "remote"]
Class: TypeAlias = Literal["cache", "replicated", "durable"]

def _after_fork() -> None: ...
def _close_all() -> None: ...

# Codes in `Match.statuses` and `Got.statuses`.
HIT: int
PENDING: int
LOADING: int
MISS: int
THROTTLED: int
# Codes in `Stored.outcomes`.
STORED: int
ALREADY_PRESENT: int
IN_PROGRESS: int
REFUSED: int
# Words of the codes in `Got.reasons`, `Match.tiers`: REASONS[code]; code 0 is None.
REASONS: tuple[str | None, ...]
TIERS: tuple[str | None, ...]

class Error(Exception):
    """A call that is itself wrong, or that the server refused. The text says what to do."""

    kind: str
    """`invalid_argument`, `wrong_size`, `too_large`, `format_mismatch`, `stale_revision`, `unknown_session`, `conflict`,
    `denied`, `config`, `unreachable`, `late`, ... : the word of the API."""
    message: str
    retryable: bool
    retry_after: float | None
    context: dict[str, str]

@final
class Group:
    """One group of layers that share a rule and a block size.

    `rule`: "all", "state", or ("window", tokens). `size`: bytes of one shard's block, exactly; or ("up_to", max); or
    ("multiple_of", step, max).
    """

    def __new__(
        cls,
        tokens_per_block: int,
        size: int | tuple[Literal["up_to"], int] | tuple[Literal["multiple_of"], int, int],
        *,
        rule: Literal["all", "state"] | tuple[Literal["window"], int] = "all",
        shards: int = 1,
        replicated: bool = False,
    ) -> Self: ...

@final
class Format:
    """How the KV of one model looks; checked here, fingerprinted by the server. Same declaration, same namespace."""

    def __new__(
        cls,
        model: str,
        groups: Sequence[Group],
        *,
        dtype: str,
        layout: str,
        hash_algorithm: str,
        tokens_per_key: int,
        hash_seed: str = "",
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        canonical: bool = False,
        prefill_us_per_token: int = 0,
        prefill_doubles_at_tokens: int = 0,
    ) -> Self:
        """`canonical`: the bytes do not depend on tp/pp/cp (which are then 1). `prefill_us_per_token`: declared cost of computing
        a token, what the verdict "load or recompute" is made from and eviction weighs; 0: not said.
        `prefill_doubles_at_tokens`: the context at which a token costs twice that; 0: the same everywhere. Both are no part of the
        fingerprint."""
    @property
    def fingerprint(self) -> str: ...
    def differences(self, other: Format) -> list[str]:
        """Names of the fields that differ."""
    def __eq__(self, other: object) -> bool: ...

@final
class RequestInfo:
    """What the policy learns from. `hint`: "ends" (the session does not come back) or seconds until its next request.
    `priority`: below 0 the positions count a quarter from now on, above 0 four times; None: as before."""

    def __new__(
        cls,
        kind: Literal["unspecified", "chat", "user", "tool", "subagent", "batch"] = "unspecified",
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        session: int = 0,
        client: int = 0,
        hint: Literal["ends"] | float | None = None,
        priority: int | None = None,
    ) -> Self: ...

@final
class Call:
    """What a call says beside its arguments: make one per request and give it to each call of that request.

    `request_id`: at most 64 bytes; a str is taken as UTF-8. Leases are named by it. `deadline`: seconds for the whole call;
    None: the client's. `label`: for accounting.
    """

    def __new__(
        cls,
        request_id: bytes | str = b"",
        *,
        deadline: float | None = None,
        info: RequestInfo | None = None,
        label: str = "",
    ) -> Self: ...
    @property
    def request_id(self) -> bytes: ...
    @property
    def deadline(self) -> float | None: ...

@final
class Region:
    """Memory shared with the server. Has the buffer protocol (writable bytes): `memoryview(region)[a:b]` is a place.

    `Region(bytes)` is fresh zeroed memory, every page allocated (a sealed memfd, which the server maps). It is unmapped when
    neither the object, nor a buffer of it, nor a place or call is left.
    """

    def __new__(cls, bytes: int) -> Self: ...
    @staticmethod
    def open(
        path: str | PathLike[str], offset: int = 0, bytes: int | None = None, *, also_at: int | None = None
    ) -> Region:
        """A file on tmpfs that an engine has mapped already (None: to its end). The server gets the descriptor. The file must
        never be truncated. `also_at`: the address at which the engine's own shared mapping of the same bytes starts (else
        `ValueError`): buffers and raw addresses in there are then places of this region, as long as the kernel says that the
        file is mapped there. Geometries and places that were made of it count on its staying."""
    @staticmethod
    def from_fd(fd: int, offset: int = 0, bytes: int | None = None, *, also_at: int | None = None) -> Region:
        """The same by a descriptor, which is duplicated. A memfd with F_SEAL_SHRINK is mapped by the server; another is
        reached by system calls there, one more copy in the kernel."""
    def __len__(self) -> int: ...
    @property
    def address(self) -> int:
        """Where it starts in this process."""
    def place(self, offset: int, bytes: int, *, stride: int = 0, count: int = 1) -> Place:
        """`count` runs of `bytes`, `stride` apart, from `offset`: one block."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Place:
    """Where one block lies: one run of memory, or many of one length and distance, or several of these (`place + place`).

    `memory`: an object with a writable buffer (held as long as the place lives), or a raw `(address, length)`. `bytes` None: to
    the end of the memory.
    """

    def __new__(
        cls,
        memory: Buffer | tuple[int, int],
        offset: int = 0,
        bytes: int | None = None,
        *,
        stride: int = 0,
        count: int = 1,
    ) -> Self: ...
    def __add__(self, other: Place) -> Place:
        """This, and then the other."""
    def __len__(self) -> int:
        """Bytes of the block."""
    @property
    def is_shared(self) -> bool:
        """All of it lies in regions: the server fills and reads it itself."""

@final
class Geometry:
    """Where an engine's blocks lie, said once; calls then name block ids.

    `areas`: per area the place of block 0 and the bytes from one block to the next, in the order in which the pieces make up a
    block. `blocks`: how many there are, ids 0 to `blocks - 1`. Example: 32 layers in one allocation `kv`, per layer 1000 blocks
    of 4096 bytes one behind the other: `Geometry([(Place(kv, 0, 4096, stride=1000 * 4096, count=32), 4096)], 1000)`.
    """

    def __new__(cls, areas: Sequence[tuple[PlaceLike, int]], blocks: int) -> Self: ...
    @property
    def blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def is_shared(self) -> bool: ...
    def place(self, block: int) -> Place: ...

@final
class Lease:
    """A lease that was granted. `ttl`: seconds from when it was answered."""

    @property
    def id(self) -> int: ...
    @property
    def ttl(self) -> float: ...
    @property
    def positions(self) -> int: ...

@final
class Match:
    """How much of a chain is here."""

    @property
    def boundary_positions(self) -> int:
        """Keys covered by the largest boundary that is valid under the rules of all groups."""
    @property
    def boundary_tokens(self) -> int: ...
    @property
    def lease(self) -> Lease | None:
        """Taken where it was asked for and something matched."""
    @property
    def lease_id(self) -> int | None: ...
    @property
    def statuses(self) -> _Bytes:
        """A code per key (HIT ...) where they were asked for, else empty."""
    @property
    def tiers(self) -> _Bytes:
        """The slowest tier per key (index of TIERS), where statuses were asked for."""
    @property
    def bytes(self) -> int:
        """Of the parts that the boundary needs."""
    @property
    def load_seconds(self) -> float | None:
        """Estimate of how long loading takes; None: not known."""
    @property
    def recompute_seconds(self) -> float | None:
        """Declared cost of computing it again; None: the format declares none."""
    @property
    def verdict(self) -> Literal["load", "recompute"] | None:
        """What the server advises; None: nothing known."""
    @property
    def reason(self) -> str | None:
        """Why the boundary is not larger; None where every key matched."""
    @property
    def error(self) -> Error | None:
        """In `match_many` and completions: this query is itself wrong, and matched nothing."""

@final
class Query:
    """One chain of `match_many` and `submit_match`; the arguments are those of `Namespace.match`."""

    def __new__(
        cls,
        keys: Keys,
        *,
        key_len: int | None = None,
        lease: float | None = None,
        request_id: bytes | str = b"",
        promote: bool = False,
        statuses: bool = False,
        release: int | None = None,
    ) -> Self: ...

@final
class Got:
    """What came of a get: per item a code, no objects."""

    def __len__(self) -> int:
        """Items."""
    @property
    def hits(self) -> int:
        """Leading items that are hits: the usable prefix. What the place of any other item holds is undefined."""
    @property
    def all_hit(self) -> bool: ...
    @property
    def statuses(self) -> bytes:
        """A code per item: HIT ..."""
    @property
    def reasons(self) -> bytes:
        """Index of REASONS per item; 0 for hits."""
    @property
    def reason(self) -> str | None:
        """Of the first item that is no hit."""
    @property
    def lengths(self) -> list[int]:
        """Bytes at the start of each place; 0 unless a hit."""
    @property
    def in_doubt(self) -> list[int]:
        """Items whose place the server may still be writing: leave it alone until `Namespace.settle`. Nearly always empty."""
    @property
    def retry_after(self) -> float | None:
        """When to ask again for what was throttled, where the server named a time."""
    @property
    def tiers(self) -> bytes:
        """Where each was found: index of TIERS."""

@final
class Stored:
    """What came of a put: per part a code, no objects."""

    def __len__(self) -> int:
        """Parts."""
    @property
    def kept(self) -> int:
        """Leading parts that the store has at the class asked for (STORED or ALREADY_PRESENT)."""
    @property
    def all_kept(self) -> bool: ...
    @property
    def outcomes(self) -> bytes:
        """A code per part: STORED, ALREADY_PRESENT, IN_PROGRESS, REFUSED."""
    @property
    def error(self) -> Error | None:
        """Why the first refused part was refused. A lost server is `unreachable`."""
    @property
    def retry_after(self) -> float | None:
        """Of the first part that another caller is writing, or that was throttled."""
    @property
    def copies(self) -> int:
        """The fewest copies that a stored part stands on; 0: none was stored."""
    @property
    def degraded(self) -> bool:
        """A stored part has fewer copies than its class asks for."""

@final
class Completion:
    """A submitted call that has ended."""

    @property
    def ticket(self) -> int: ...
    @property
    def request_id(self) -> bytes: ...
    @property
    def cancelled(self) -> bool:
        """It was taken back before it was done."""
    @property
    def kind(self) -> Literal["get", "put", "match", "wrong"]: ...
    @property
    def got(self) -> Got | None: ...
    @property
    def stored(self) -> Stored | None: ...
    @property
    def matched(self) -> list[Match] | None: ...
    @property
    def error(self) -> Error | None:
        """The call itself was wrong (`kind` is "wrong"). Nothing is ever raised by polling."""

@final
class MappedMatch:
    """A match, and where its blocks lie in the server's memory, to be read in place: nothing is copied.

    It holds the lease, which ends after its `ttl` as any does. The lease is given back when `release` was called and no buffer of
    a block is left, or when neither this nor a part, block or buffer of it is left; matches of one request share a lease, which
    goes back with the last of them. Once the lease has ended the server may use the memory anew, whoever still reads: so whoever
    has read asks `MappedBlock.is_still_there`.
    """

    @property
    def found(self) -> Match: ...
    @property
    def parts(self) -> tuple[MappedPart, ...]:
        """The parts of the positions up to the boundary, in order. Empty where this process cannot read in place (another
        host, a user that the server does not trust: `auth.map_uids`; then `Namespace.describe()["way"]["mapped"]` is False),
        where the query asks for no lease, and where the server is lost. `Namespace.get_into` goes everywhere."""
    def release(self) -> bool:
        """Gives the lease back now, or where a buffer of a block is still there (False) with the last of them. No buffer can be
        had after it. Never waits; idempotent. Leaving a `with` block does the same."""
    def __enter__(self) -> MappedMatch: ...
    def __exit__(self, *args: object) -> None: ...

@final
class MappedPart:
    """One part of a mapped match."""

    @property
    def item(self) -> int:
        """Index of its key."""
    @property
    def group(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def status(self) -> int:
        """HIT; LOADING where it is on NVMe only (get it, or prefetch it and match again); or MISS."""
    @property
    def reason(self) -> str | None:
        """Why it is no hit."""
    @property
    def block(self) -> MappedBlock | None:
        """Where it lies, where it is a hit."""

@final
class MappedBlock:
    """A block in the server's memory. Has the buffer protocol: `memoryview(block)` is read-only bytes, and a writable buffer
    is refused with BufferError, as any is after `MappedMatch.release`.

    The memory stays mapped as long as the block or a buffer of it lives, also when the namespace was closed or the server has
    died. A forked child does not have it: there a buffer that was had before the fork reads as zeroes, `is_still_there` is False,
    a new buffer is refused with BufferError, and the lease stays its parent's. (That is done by `os.fork`'s handlers: a
    program that forks in another way must not read in the child.)
    """

    def __len__(self) -> int:
        """Bytes."""
    @property
    def address(self) -> int:
        """Where it starts in this process, for a copy of the caller's own (to a GPU). Only as long as the block lives."""
    @property
    def version(self) -> int:
        """Of the put that made the bytes."""
    def is_still_there(self) -> bool:
        """Whether the memory was this block's all the while until now. Asked behind every read or copy; False: what was read
        is worthless, and is a miss. So it is when the lease has ended and the memory was used anew, when the position was
        removed, and in a forked child."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Event:
    """What happened to one position."""

    @property
    def sequence(self) -> int:
        """Goes up. 0: one of a snapshot."""
    @property
    def what(self) -> Literal["stored", "promoted", "demoted", "removed", "unknown"]:
        """After "removed" it is no longer readable. "unknown": a newer server's word."""
    @property
    def handle(self) -> tuple[int, int]:
        """Its namespace and revision, as `Namespace.describe()["handle"]` has them."""
    @property
    def key(self) -> _Bytes: ...
    @property
    def parent_key(self) -> _Bytes | None:
        """Of the position before; None: the chain starts here, or it is not known."""
    @property
    def position(self) -> int:
        """Index in its chain."""
    @property
    def token_ids(self) -> list[int]:
        """As its put gave them; none in a snapshot."""
    @property
    def bytes(self) -> int: ...
    @property
    def tier(self) -> Tier | None: ...
    @property
    def groups(self) -> list[int]: ...

@final
class EventBatch:
    """Some events, in order."""

    @property
    def events(self) -> tuple[Event, ...]:
        """At most a few hundred."""
    @property
    def sequence(self) -> int:
        """Of the last event: where to go on, as `after_sequence`."""
    @property
    def gap(self) -> bool:
        """Events were lost, because the reader was too slow or asked for what is too old: watch again with a snapshot."""
    @property
    def snapshot_end(self) -> bool:
        """That was what is here; what follows are changes."""

@final
class Events:
    """A stream of events. Iterating waits for batch after batch, without the GIL; signals interrupt it (KeyboardInterrupt).

    It ends (StopIteration; None and `ended`) with `close`, with its namespace, when the server ends it in order, and in a forked
    child, which watches anew. A server that is lost raises Error (`unreachable`, `retryable`), once: watch again, after the last
    `EventBatch.sequence` while it is the same server, else with a snapshot. At most one batch waits in this process; a
    reader that is too slow holds the server back and is told of the `gap`. Threads that share it get each batch once.
    """

    def next_batch(self, timeout: float = 1.0) -> EventBatch | None:
        """The next batch; None where none came in time, or none will: `ended`."""
    @property
    def ended(self) -> bool:
        """Nothing will be told any more. False while another thread waits."""
    def close(self) -> None:
        """Ends it, also for a thread that waits. Idempotent; leaving a `with` block does the same."""
    def __iter__(self) -> Iterator[EventBatch]: ...
    def __next__(self) -> EventBatch: ...
    def __enter__(self) -> Events: ...
    def __exit__(self, *args: object) -> None: ...

@final
class Client:
    """Where the server is and how patient to be with it. Holds no connection: each namespace has its own.

    `endpoint`: `local:DIR?dram=4GiB&nvme=50GiB` (a private server, started where none answers), `unix:/path`,
    `http(s)://host:port`; None: `KVKEEP_ENDPOINT`, else `http://127.0.0.1:7070`. `token` and `ca_file` None: `KVKEEP_TOKEN` and
    `KVKEEP_CA`. `deadline`: seconds of a call that names none. `patience`: seconds of silence after which the server is lost.
    `block_connections`: calls at a time that move blocks or ask, per namespace. `instance`: 16 bytes that name this engine
    instance; processes that share one share its leases. None: drawn. Raises Error (`config`) where something is wrong.
    """

    def __new__(
        cls,
        endpoint: str | None = None,
        *,
        token: str | None = None,
        ca_file: str | PathLike[str] | None = None,
        name: str | None = None,
        instance: bytes | None = None,
        deadline: float = 10.0,
        patience: float = 0.1,
        connect_timeout: float = 2.0,
        block_connections: int = 16,
        way: Literal["fastest", "socket", "port", "grpc"] = "fastest",
    ) -> Self: ...
    @property
    def endpoint(self) -> str: ...
    def namespace(
        self, name: str, format: Format, revision: str, *, queues: int = 1, in_flight_max: int = 64
    ) -> Namespace:
        """Nothing connects until its first call. `revision`: digest of weights and adapters; a store that holds KV of others is
        not read and not written. `queues`: completion queues, 1 to 16; `in_flight_max`: calls of a queue that are under way or
        wait to be polled, 1 to 512."""

@final
class Namespace:
    """A namespace, and the connections, the I/O thread and the queues that this process has for it."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> Format: ...
    @property
    def instance(self) -> bytes:
        """Names this process to servers; another one in every forked child."""
    @property
    def sessions(self) -> Sessions: ...

    # What waits: for its deadline at most, and for a lost server no longer than `patience`.
    def match(
        self,
        keys: Keys,
        *,
        key_len: int | None = None,
        lease: float | None = None,
        promote: bool = False,
        statuses: bool = False,
        release: int | None = None,
        call: Call | None = None,
    ) -> Match:
        """How much of a chain is here. `lease`: keep what matched readable for so many seconds (0: the server's default), named
        by the call's request id. `promote`: start bringing it up to DRAM. `statuses`: answer per key. `release`: end this lease
        first."""
    def match_many(self, queries: Sequence[Query], *, call: Call | None = None) -> list[Match]:
        """Many chains in one call; a query that is wrong alone has `Match.error`."""
    def match_mapped(self, query: Query, *, call: Call | None = None) -> MappedMatch:
        """Looks one chain up, leases what matched, and answers where it lies in the server's memory: for a process on the
        server's host that it trusts. The query needs a `lease`. A miss, a lost server or a way without mappings is no parts."""
    def lease(
        self, keys: Keys, *, key_len: int | None = None, ttl: float | None = None, call: Call | None = None
    ) -> tuple[Lease | None, bytes]:
        """Takes a lease named by the call's request id, or extends that request's lease; and a status code per key."""
    def renew(self, lease: int, *, ttl: float | None = None, call: Call | None = None) -> Lease | None:
        """None: it has ended, or the server is lost."""
    def release(self, leases: int | Sequence[int] = (), *, requests: Sequence[bytes | str] = ()) -> None:
        """Ends leases, by id or by the request that took them. Soon, and without waiting; never fails."""
    def touch(self, keys: Keys, *, key_len: int | None = None, call: Call | None = None) -> int:
        """Counts as an access; answers how many of the positions are here."""
    def get_into(
        self,
        keys: Keys,
        places: Places,
        blocks: BlockIds | None = None,
        *,
        key_len: int | None = None,
        parts: Parts | None = None,
        lease: int | None = None,
        call: Call | None = None,
    ) -> Got:
        """Reads parts into places. A part that does not fit its place is a miss with reason "format"."""
    def put_from(
        self,
        keys: Keys,
        places: Places,
        blocks: BlockIds | None = None,
        *,
        key_len: int | None = None,
        parts: Parts | None = None,
        parent: bytes | None = None,
        first_position: int = 0,
        cls: Class | None = None,
        keep: bool = False,
        unordered: bool = False,
        ttl: float | None = None,
        priority: int = 0,
        token_ids: Sequence[Sequence[int]] | None = None,
        call: Call | None = None,
    ) -> Stored:
        """Stores positions out of places. `parent`: key of the position before the first one; None: the chain starts here.
        `first_position`: index of the first key in its chain. `cls`: what the acknowledgement promises; None: cache. `keep`:
        back-pressure rather than dropping. `unordered`: each key stands alone. `token_ids`: per key, told to watchers."""

    # What does not wait: one step submits, a later one polls. None: the queue is busy, nothing was done.
    def submit_get(
        self,
        keys: Keys,
        places: Places,
        blocks: BlockIds | None = None,
        *,
        queue: int = 0,
        key_len: int | None = None,
        parts: Parts | None = None,
        lease: int | None = None,
        call: Call | None = None,
    ) -> int | None: ...
    def submit_put(
        self,
        keys: Keys,
        places: Places,
        blocks: BlockIds | None = None,
        *,
        queue: int = 0,
        key_len: int | None = None,
        parts: Parts | None = None,
        parent: bytes | None = None,
        first_position: int = 0,
        cls: Class | None = None,
        keep: bool = False,
        unordered: bool = False,
        ttl: float | None = None,
        priority: int = 0,
        token_ids: Sequence[Sequence[int]] | None = None,
        call: Call | None = None,
    ) -> int | None: ...
    def submit_match(
        self, queries: Query | Sequence[Query], *, queue: int = 0, call: Call | None = None
    ) -> int | None: ...
    def poll(self, queue: int = 0, max: int = 64) -> list[Completion]:
        """The oldest completions of a queue. Never waits."""
    def wait(self, queue: int = 0, max: int = 64, timeout: float = 1.0) -> list[Completion]:
        """The same, waiting for the first one; empty where none came."""
    def event_fd(self, queue: int = 0) -> int:
        """Readable while completions of the queue wait. It need not be read: polling the queue empty makes it unreadable. It is
        the namespace's: do not close it. Another one in a forked child."""
    def cancel(self, ticket: int) -> bool:
        """Takes a call back: its completion comes all the same and at once. Whether it was under way."""
    def cancel_request(self, request_id: bytes | str) -> int:
        """Takes back all submitted calls of a request; how many were under way."""

    # Memory.
    def register_region(self, region: Region, *, timeout: float = 10.0) -> bool:
        """Tells the server of a region now, so that the first call need not. False: no server, or a way without regions;
        then calls work all the same, and the server is told with the first call that finds it."""
    def settle(self, timeout: float = 1.0) -> bool:
        """Waits until no memory is in doubt any more; whether none is."""

    # The rest.
    def ready(self, timeout: float = 10.0) -> bool:
        """Waits until the server is there and the namespace registered. Raises Error where the server will not have us
        (`format_mismatch`, `stale_revision`, `denied`): all verbs are misses meanwhile."""
    def advance_revision(self, revision: str, *, call: Call | None = None) -> bool:
        """The weights changed: what is stored is missed by everybody from now on. False: the server is lost."""
    def remove(self, keys: Keys, *, key_len: int | None = None, call: Call | None = None) -> tuple[int, int, int]:
        """Deletes positions: (removed, absent, held)."""
    def prefetch(
        self, keys: Keys, *, key_len: int | None = None, tier: Tier = "dram", call: Call | None = None
    ) -> tuple[int, int, int]:
        """Starts bringing positions up: (started, already there, refused)."""
    def watch_events(
        self,
        *,
        all_namespaces: bool = False,
        snapshot: bool = False,
        after_sequence: int = 0,
        call: Call | None = None,
    ) -> Events:
        """Follows what is stored and removed, here or in all namespaces of the tenant. `snapshot`: first what is here.
        `after_sequence`: go on after this event; not with a snapshot. The call's deadline covers the opening, which raises
        Error where the server is lost or as many are watching as may (`throttled`)."""
    def describe(self) -> dict[str, Any]:
        """How it stands: standing, why, way, breaker, server, counters, client, queues, regions; "text" for people."""
    def counters(self) -> dict[str, int]: ...
    def inject(self, fault: Literal["none", "refused", "silent", "miss"]) -> None:
        """Plays a lost server, for tests of programs that use this. Not inherited by forked children."""
    def after_fork(self) -> None:
        """In a forked child: closes the copies of the parent's sockets. `import kvkeep` has it called by itself."""
    def close(self) -> None:
        """Takes back what is in flight and ends the I/O thread. Calls after it raise Error. Idempotent."""
    @property
    def closed(self) -> bool: ...
    def __enter__(self) -> Namespace: ...
    def __exit__(self, *args: object) -> None: ...

@final
class SessionInfo:
    """What is known of a session."""

    id: str
    state: Literal["open", "closed"]
    cls: Class
    positions: int
    tokens: int
    ttl: float | None
    expires_in: float | None
    priority: int
    attributes: dict[str, str]
    parent: tuple[str, int] | None
    pinned: Tier | None
    finished: bool
    created_unix_ms: int
    changed_unix_ms: int
    appends: int
    revision_matches: bool
    """False: of other weights. Its blocks are of no use; its token ids are."""
    uid: int

@final
class Restored:
    """How a restore ended."""

    positions: int
    """In the tier."""
    total_positions: int
    bytes: int
    total_bytes: int
    usable_positions: int
    """Up to the largest boundary that is valid under the rules of all groups."""
    compute_from_token: int
    tokens: int
    missing: list[tuple[int, int, str]]
    """Runs that are not here: (first position, count, why)."""
    revision_matches: bool
    late: bool
    lease_id: int | None
    is_whole: bool

@final
class Tokens:
    """Token ids of a session."""

    ids: list[int]
    content: list[tuple[int, int, bytes]]
    """(first token, tokens, content id)"""
    damaged: bool
    total: int

@final
class Sessions:
    """Conversations, documents and agents as objects of the server. Blocks are put as always; a session names them.

    None of these verbs is a hot one: they go over gRPC, and raise Error where the server is lost.
    """

    def open(
        self,
        id: str,
        *,
        cls: Class | None = None,
        ttl: float | None = None,
        priority: int = 0,
        attributes: Mapping[str, str] | None = None,
        parent: tuple[str, int] | None = None,
        call: Call | None = None,
    ) -> tuple[SessionInfo, bool]:
        """Makes a session, or finds it; and whether it was made. `parent`: it begins with the first positions of that one."""
    def append(
        self,
        id: str,
        keys: Keys = (),
        *,
        key_len: int | None = None,
        from_position: int,
        token_ids: Sequence[int] | Buffer = (),
        from_token: int = 0,
        content: Sequence[tuple[int, int, bytes]] = (),
        call: Call | None = None,
    ) -> tuple[int, int, bool]:
        """Adds to the end, if it is as long as the caller believes (else `conflict`): (positions, tokens, repeated) after it.
        Token ids: ints, or a buffer of uint32/int32/int64."""
    def get(self, id: str, *, call: Call | None = None) -> SessionInfo: ...
    def list(
        self,
        prefix: str = "",
        *,
        cls: Class | None = None,
        state: Literal["open", "closed"] | None = None,
        attributes: Mapping[str, str] | None = None,
        all_namespaces: bool = False,
        limit: int = 1000,
        call: Call | None = None,
    ) -> _List[SessionInfo]: ...
    def keys(self, id: str, *, call: Call | None = None) -> _List[bytes | None]:
        """Key of each position of its manifest; None where no copy is here to tell it."""
    def restore(
        self, id: str, *, tier: Tier = "dram", lease: float | None = None, call: Call | None = None
    ) -> Restored:
        """Brings it up to a tier; at the call's deadline it ends with what is there."""
    def tokens(self, id: str, first: int = 0, count: int | None = None, *, call: Call | None = None) -> Tokens:
        """Token ids from `first` on; `count` None: all."""
    def fork(
        self, id: str, to: str, at_position: int | None = None, *, call: Call | None = None
    ) -> tuple[SessionInfo, bool]: ...
    def truncate(
        self, id: str, positions: int, *, keep_tokens: bool = False, call: Call | None = None
    ) -> SessionInfo: ...
    def pin(self, id: str, tier: Tier = "dram", *, call: Call | None = None) -> SessionInfo: ...
    def unpin(self, id: str, *, call: Call | None = None) -> SessionInfo: ...
    def hint(
        self,
        id: str,
        *,
        finished: bool = False,
        paused: bool = False,
        due_in: float | None = None,
        priority: int | None = None,
        call: Call | None = None,
    ) -> int:
        """What is known of its future; how many positions the policy was told of."""
    def close(self, id: str, *, call: Call | None = None) -> SessionInfo: ...
    def delete(self, id: str, *, call: Call | None = None) -> bool: ...

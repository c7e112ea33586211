"""Which namespace, position and part a key of LMCache is.

| LMCache | store |
|---|---|
| model, object group, world size, shapes and types of an object | a namespace; other shapes are another one |
| chunk hash and cache salt | key of a position: the hash, and a digest of the salt behind it |
| rank (of `kv_rank`) | shard of the position: it is there when all ranks have stored theirs |
| cache salt | also the label of calls, for accounting |
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.memory_management import MemoryObj

import kvkeep

from .. import revision as weights
from ..leases import Leases
from ..options import StoreOptions
from ..registration import Registration

log = logging.getLogger("lmcache.kvkeep")

OBJECT_BYTES_MAX = 128 << 20
"""Of a block of the store. Larger objects are not stored."""
_HASH_BYTES_MAX = 96


@dataclass(frozen=True)
class Options(StoreOptions):
    """What `adapter_params` may say; docs/engines/lmcache.md explains it to users."""

    revisions: Mapping[str, str] = field(default_factory=dict)
    """Model to the digest of its weights, for a server of several models."""
    layout: str | None = None
    """Names the bytes of objects where their shapes and types do not tell, because LMCache serializes them (`serde`) or the engine
    keeps its KV as bytes (8-bit floats): the KV's type, the chunk, the serde and its settings. None: shapes and types."""
    chunk_tokens: int = 256
    """LMCache's `chunk_size`."""
    allow_delete: bool = False
    """Let LMCache's eviction remove from the store, which is everybody's. False: it only forgets."""


@dataclass(frozen=True)
class Kind:
    """Keys whose objects may be in one namespace."""

    model: str
    group: int
    world: int

    @classmethod
    def of(cls, key: ObjectKey) -> Kind:
        return cls(key.model_name, key.object_group_id, max(1, ObjectKey.WorldSizeFromKVRank(key.kv_rank)))


def rank_of(key: ObjectKey) -> int:
    return (key.kv_rank >> 16) & 0xFF


def position_of(key: ObjectKey) -> bytes:
    """A user's salt is part of it: nobody finds what another one stored."""
    chunk = key.chunk_hash
    if len(chunk) > _HASH_BYTES_MAX:
        chunk = hashlib.blake2b(chunk, digest_size=64).digest()
    salt = hashlib.blake2b(key.cache_salt.encode(), digest_size=16, person=b"kvkeep-salt")
    return chunk + salt.digest()


class Space:
    """A namespace, and the leases that LMCache holds in it as locks."""

    def __init__(self, namespace: kvkeep.Namespace, registration: Registration, object_bytes: int | None):
        self.namespace, self.registration = namespace, registration
        self.object_bytes = object_bytes
        """None: they differ."""
        self.leases: Leases = Leases()

    def close(self) -> None:
        self.registration.stop()
        if held := self.leases.give_up():
            self.namespace.release(held)
        self.namespace.close()


@dataclass(frozen=True)
class Layout:
    """What the bytes of an object mean."""

    text: str
    object_bytes: int | None

    @classmethod
    def of(cls, shapes: Sequence, dtypes: Sequence) -> Layout | None:
        """None: bytes, of which it cannot be told what they are."""
        if any(dtype in (torch.uint8, torch.int8) for dtype in dtypes):
            return None
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        parts = (f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in zip(shapes, dtypes))
        return cls("+".join(parts).replace(" ", ""), size)

    @classmethod
    def of_object(cls, obj: MemoryObj) -> Layout | None:
        meta = obj.meta
        return cls.of(meta.shapes, meta.dtypes) if meta.shapes else cls.of([meta.shape], [meta.dtype])


class Spaces:
    """Namespaces, made when the first key of theirs comes. Thread safe."""

    def __init__(self, client: kvkeep.Client, options: Options, regions: Iterable[kvkeep.Region]):
        self._client, self._options, self._regions = client, options, list(regions)
        self._making = threading.Lock()
        """Held while a namespace is made, which may read weights; nothing on LMCache's own threads waits for it."""
        self._lock = threading.Lock()
        self._spaces: dict[Kind, dict[str, Space]] = {}
        self._latest: dict[Kind, Layout] = {}
        self._revisions: dict[str, str | None] = {}
        self._warned: set[tuple[Kind, str]] = set()
        self._closed = False

    def of_object(self, key: ObjectKey, obj: MemoryObj) -> Space | None:
        """Where an object is stored and read; None where nothing of its kind is shared."""
        return self._space(Kind.of(key), self._named() or Layout.of_object(obj))

    def of_lookup(self, key: ObjectKey, layouts: Mapping[int, MemoryLayoutDesc]) -> Space | None:
        """Where a key is looked up. LMCache says the layout or leaves it out; then it is the one that was used last."""
        kind = Kind.of(key)
        if self._options.layout:
            return self._space(kind, self._named())
        if said := (layouts or {}).get(key.object_group_id):
            return self._space(kind, Layout.of(said.shapes, said.dtypes))
        with self._lock:
            layout = self._latest.get(kind)
        return self._space(kind, layout) if layout else None

    def _named(self) -> Layout | None:
        return Layout(self._options.layout, None) if self._options.layout else None

    def of_kind(self, key: ObjectKey) -> list[Space]:
        with self._lock:
            return list(self._spaces.get(Kind.of(key), {}).values())

    def all(self) -> list[Space]:
        with self._lock:
            return [space for spaces in self._spaces.values() for space in spaces.values()]

    def close(self) -> None:
        with self._making, self._lock:
            self._closed = True
            spaces = [space for of_kind in self._spaces.values() for space in of_kind.values()]
            self._spaces.clear()
            # LMCache unmaps its memory next, and other memory may come to lie there.
            self._regions.clear()
        for space in spaces:
            space.close()

    def _space(self, kind: Kind, layout: Layout | None) -> Space | None:
        if layout is None:
            self._warn_once(kind, 'bytes are stored only where adapter_params name what they are ("layout")')
            return None
        if layout.object_bytes is not None and layout.object_bytes > OBJECT_BYTES_MAX:
            self._warn_once(kind, f"objects of {layout.object_bytes} bytes are larger than {OBJECT_BYTES_MAX}")
            return None
        with self._lock:
            self._latest[kind] = layout
            space = self._spaces.get(kind, {}).get(layout.text)
        if space is not None:
            return space
        with self._making:
            # Another thread may have made it meanwhile.
            space = self._spaces.get(kind, {}).get(layout.text)
            if space is None and not self._closed and (revision := self._revision(kind.model)):
                space = self._open(kind, layout, revision)
                with self._lock:
                    self._spaces.setdefault(kind, {})[layout.text] = space
        return space

    def _warn_once(self, kind: Kind, why: str) -> None:
        if (kind, why) not in self._warned:
            self._warned.add((kind, why))
            log.warning("kvkeep: objects of %s, group %d, are not stored: %s", kind.model, kind.group, why)

    def _open(self, kind: Kind, layout: Layout, revision: str) -> Space:
        options = self._options
        size = layout.object_bytes or ("up_to", OBJECT_BYTES_MAX)
        fmt = kvkeep.Format(
            kind.model[-200:],
            [kvkeep.Group(options.chunk_tokens, size, shards=kind.world)],
            dtype="bytes" if options.layout else layout.text.split("[")[0],
            layout=f"lmcache-{kind.group}-{hashlib.blake2b(layout.text.encode(), digest_size=16).hexdigest()}",
            hash_algorithm="lmcache",
            tokens_per_key=options.chunk_tokens,
            tp=kind.world,
        )
        begin = options.namespace or f"lmcache/{kind.model[-120:]}"
        namespace = self._client.namespace(f"{begin}/{kind.group}/{fmt.fingerprint[:12]}", fmt, revision)
        registration = Registration(namespace, revision, advance=options.advance_revision, log=log)
        registration.start()
        for region in self._regions:
            namespace.register_region(region, timeout=0.0)
        return Space(namespace, registration, layout.object_bytes)

    def _revision(self, model: str) -> str | None:
        if model not in self._revisions:
            options = self._options
            said = options.revisions.get(model) or options.revision
            self._revisions[model] = said or weights.of_weights(options.model_path or model)
            if self._revisions[model] is None:
                log.warning(
                    "kvkeep: nothing of %s is shared, because it is not known which weights these are: say it in adapter_params "
                    'with "revision", "revisions" or "model_path"',
                    model,
                )
        return self._revisions[model]

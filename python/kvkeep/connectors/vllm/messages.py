"""What the scheduler's connector and the workers' connectors tell each other, pickled by vLLM."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(slots=True)
class Blocks:
    """Positions of a chain, and the engine's blocks of them.

    `keys`: keys of `key_len` bytes, one behind the other. `ids`: per group the block of each position, or -1 where the group has
    none that ends there (its blocks are larger), or none any more (it lies behind the window).
    """

    keys: bytes
    key_len: int
    ids: tuple[list[int], ...]

    def __len__(self) -> int:
        return len(self.keys) // self.key_len


@dataclass(slots=True)
class Load:
    """Fill these blocks for a request that waits for it."""

    request_id: str
    blocks: Blocks
    input_tokens: int


@dataclass(slots=True)
class Save:
    """Store these blocks. `parent`: key of the position before; `first`: index of the first position in its chain."""

    job: int
    request_id: str
    blocks: Blocks
    parent: bytes | None
    first: int
    input_tokens: int


@dataclass(slots=True)
class Step(KVConnectorMetadata):
    """One step of the engine."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    """Save jobs whose blocks are given to somebody else in this step: over before the step begins."""
    idle: bool = False
    """Nothing is computed in this step, so a worker may wait a moment for what is under way."""


@dataclass(slots=True)
class Saved:
    """How one worker's part of a save job ended."""

    stored: int
    """Leading positions that the store has."""
    abandoned: bool
    """It was taken back, because its blocks were needed."""


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """What happened in one worker, or (aggregated) in all of them, since the last report."""

    saved: dict[int, list[Saved]] = field(default_factory=dict)
    """Per job, one entry per worker that is done with it."""
    doubtful: Counter[int] = field(default_factory=Counter)
    """Blocks that the server may still be writing, because a load was given up while it copied; by how many workers."""
    settled: Counter[int] = field(default_factory=Counter)
    """Blocks that were doubtful and are not any more; the same."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, WorkerReport)
        for job, ends in other.saved.items():
            self.saved.setdefault(job, []).extend(ends)
        self.doubtful += other.doubtful
        self.settled += other.settled
        return self

    def __bool__(self) -> bool:
        return bool(self.saved or self.doubtful or self.settled)

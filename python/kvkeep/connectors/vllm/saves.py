"""Which blocks are being saved. A save goes on while the engine computes the next steps, and after its request ended: nothing is
held for it. So who gets one of these blocks next must wait until the save has been taken back; that is what a fence is."""

from __future__ import annotations

from dataclasses import dataclass

from .messages import Save, WorkerReport


@dataclass(slots=True)
class _Job:
    save: Save
    request: object
    workers: int
    """That have not reported yet."""
    stored: int
    """Leading positions that all workers so far have stored."""
    abandoned: bool = False


@dataclass(slots=True)
class Ended:
    """A save that all workers are done with."""

    save: Save
    request: object
    """vLLM's, which may have finished meanwhile."""
    stored: int
    abandoned: bool


class Saves:
    """All on the scheduler's thread."""

    def __init__(self, workers: int):
        self._workers = workers
        self._jobs: dict[int, _Job] = {}
        self._job_of: dict[int, set[int]] = {}
        self._next = 0

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def number(self) -> int:
        """For the next job."""
        self._next += 1
        return self._next

    def begin(self, save: Save, request) -> None:
        self._jobs[save.job] = _Job(save, request, self._workers, len(save.blocks))
        for block in self._blocks(save):
            self._job_of.setdefault(block, set()).add(save.job)

    def that_read(self, blocks) -> set[int]:
        """Jobs that are not over, and read one of these blocks."""
        if not self._job_of:
            return set()
        jobs: set[int] = set()
        for block in blocks:
            jobs |= self._job_of.get(block, jobs)
        return jobs

    def end(self, report: WorkerReport) -> list[Ended]:
        """What a report brings to its end."""
        over = []
        for number, ends in report.saved.items():
            job = self._jobs.get(number)
            if job is None:
                continue
            for end in ends:
                job.workers -= 1
                job.stored = min(job.stored, end.stored)
                job.abandoned |= end.abandoned
            if job.workers <= 0:
                del self._jobs[number]
                for block in self._blocks(job.save):
                    readers = self._job_of.get(block)
                    if readers is not None:
                        readers.discard(number)
                        if not readers:
                            del self._job_of[block]
                over.append(Ended(job.save, job.request, job.stored, job.abandoned))
        return over

    @staticmethod
    def _blocks(save: Save):
        return (block for ids in save.blocks.ids for block in ids if block >= 0)

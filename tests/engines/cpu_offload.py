"""vLLM's host tier refuses to copy to and from a CPU's KV, which it calls the GPU's. This copies, so that what lies below the host
tier can be tested on a machine without GPU."""

from __future__ import annotations

import time

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuOffloadingSpec(TieringOffloadingSpec):
    """Everything of vLLM's own, but the worker."""

    def get_worker(self, kv_caches):
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker


class CopyingWorker(OffloadingWorker):
    """Copies at once, in the calling thread. One group of KV."""

    def __init__(self, caches, blocks_per_chunk: int, region: SharedOffloadRegion):
        assert len(caches.group_data_refs) == 1
        self._per_chunk, self._region, self._over = blocks_per_chunk, region, []
        # Per tensor: the engine's blocks, and their places in the chunks of the host.
        self._pairs = [
            (t.tensor, region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk), t.page_size_bytes)
            for t in caches.tensors
        ]

    def submit_store(self, job_id, src_spec, dst_spec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id, src_spec, dst_spec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def _copy(self, job_id, engine, host, to_host: bool) -> bool:
        started, copied = time.perf_counter(), 0
        first = engine.block_indices[0] % self._per_chunk
        for n, block in enumerate(engine.block_ids, start=first):
            chunk, within = int(host.block_ids[n // self._per_chunk]), n % self._per_chunk
            for blocks, chunks, page in self._pairs:
                a, b = blocks[int(block)], chunks[chunk, within * page : (within + 1) * page]
                if to_host:
                    b.copy_(a)
                else:
                    a.copy_(b)
                copied += page
        self._over.append(TransferResult(job_id, True, copied, time.perf_counter() - started))
        return True

    def get_finished(self):
        over, self._over = self._over, []
        return over

    def wait(self, job_ids) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs = []
        self._region.cleanup()

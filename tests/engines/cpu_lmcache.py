"""LMCache's in-process connector has no copy between a CPU's KV and its host memory: "No supported cpu connector found." This copies,
so that its host memory and its files can be compared on a machine without GPU. All else is LMCache's own."""

from __future__ import annotations

import lmcache.v1.gpu_connector
import torch
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

__all__ = ["LMCacheConnectorV1"]


class CopyingConnector(GPUConnectorInterface):
    """Copies whole blocks at once, in the calling thread. A chunk is a number of blocks; what is in it has vLLM's own order."""

    def __init__(self, metadata):
        self._shape = metadata.kv_shape  # layers, 2, tokens of a chunk, heads, width
        self._caches: list[torch.Tensor] = []

    def initialize_kvcaches_ptr(self, **kwargs) -> None:
        self._caches = kwargs.get("kvcaches", self._caches)

    def to_gpu(self, memory_obj, start, end, **kwargs) -> None:
        # What vLLM has itself may be in use by others: it stays as it is.
        known = max(0, kwargs.get("vllm_cached_tokens", 0) - start)
        for cache, kept, blocks in self._places(memory_obj, start, end, kwargs):
            skip = known // cache.shape[2]
            cache[blocks[skip:]] = kept[skip:]

    def from_gpu(self, memory_obj, start, end, **kwargs) -> None:
        for cache, kept, blocks in self._places(memory_obj, start, end, kwargs):
            torch.index_select(cache, 0, blocks, out=kept)

    def _places(self, memory_obj, start: int, end: int, kwargs):
        """Per layer: the engine's blocks, their place in the chunk, and which ones."""
        self.initialize_kvcaches_ptr(**kwargs)
        heads, tokens, width = self._caches[0].shape[1:]
        blocks = kwargs["slot_mapping"][start:end:tokens] // tokens
        chunk = memory_obj.tensor.view(len(self._caches), len(blocks), heads, tokens, width)
        return ((cache, kept, blocks) for cache, kept in zip(self._caches, chunk, strict=True))

    def batched_to_gpu(self, memory_objs, starts, ends, **kwargs) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        layers, kv, _, heads, width = self._shape
        return torch.Size([kv, layers, num_tokens, heads * width])


# The only connector that is made in a process of vLLM's.
lmcache.v1.gpu_connector.CreateGPUConnector = lambda config, metadata, engine, **hints: CopyingConnector(metadata)

"""transformers: a `Cache` saved by the tokens it was computed from, and restored by the longest prefix of a prompt.

    store = PrefixStore(model, "local:/var/lib/kvkeep?dram=4GiB&nvme=50GiB")
    cache, tokens = store.restore(ids)                       # 0 tokens: nothing was found, the cache is empty
    out = model(ids[:, tokens:], past_key_values=cache)      # computes the rest
    store.save(ids, cache)                                   # the blocks that the store does not have yet

One sequence at a time, without padding. A lost server is a miss. docs/engines/transformers.md has the details.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence

import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import kvkeep

from . import versions
from .registration import Registration

log = logging.getLogger("kvkeep.transformers")

STAGING_BYTES = 64 << 20
"""Memory through which blocks go, shared with the server. One block, where that is larger."""
_SAMPLE = 1024
"""Elements taken at the start, in the middle and at the end of a tensor."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rope that turn the same token otherwise in a longer prompt."""


class Unsupported(ValueError):
    """This model's cache, or this cache, cannot be stored in blocks of tokens."""


class PrefixStore:
    """Caches of one model in the store. Thread safe; calls of several threads follow each other."""

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        endpoint: str | None = None,
        *,
        namespace: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        block_tokens: int = 64,
        salt: str = "",
        advance_revision: bool = True,
        lease_seconds: float = 30.0,
        deadline: float = 10.0,
        patience: float = 0.3,
        cls: str = "cache",
        any_version: bool = False,
    ):
        """`endpoint` None: `KVKEEP_ENDPOINT`, else a server on this host. `revision`: digest of the weights; None: made from the
        model's parameters as they are now, so make another store when they (or its adapters) change. `dtype` None: the model's.
        `salt`: who does not have it does not find what was saved with it. `patience`: a server that is silent for so long is lost
        until it speaks again. Times in seconds.

        Raises Unsupported for a model whose cache is not keys and values of every token, ValueError for a configuration without
        `revision` and `dtype`, versions.UnknownVersion.
        """
        versions.check("transformers", transformers.__version__, any_version=any_version)
        self._config = model if isinstance(model, PreTrainedConfig) else model.config
        if isinstance(model, PreTrainedConfig):
            if revision is None or dtype is None:
                raise ValueError(
                    "a configuration does not tell the weights: name their revision and dtype, or pass the model"
                )
        else:
            revision, dtype = revision or of_parameters(model), dtype or model.dtype
        self._dtype, self._block_tokens, self._cls = dtype, block_tokens, cls
        self._layers, self._heads, self._dim = _shape(self._config)
        self._block_bytes = self._layers * 2 * self._heads * block_tokens * self._dim * dtype.itemsize
        self._seed = hashlib.sha256(b"kvkeep-transformers" + salt.encode()).digest()
        self._lease_seconds, self._deadline = lease_seconds, deadline
        name = (self._config.name_or_path or self._config.model_type).strip("/")[-120:]
        fmt = kvkeep.Format(
            name,
            [kvkeep.Group(block_tokens, self._block_bytes)],
            dtype=str(dtype).removeprefix("torch."),
            layout=f"transformers-LKHTD-{self._layers}x2x{self._heads}xTx{self._dim}",
            hash_algorithm="sha256-u32le",
            tokens_per_key=block_tokens,
        )
        client = kvkeep.Client(endpoint, name="transformers", deadline=deadline, patience=patience)
        full = namespace or f"transformers/{name}/{fmt.fingerprint[:12]}"
        self._namespace = client.namespace(full, fmt, revision)
        self._registration = Registration(self._namespace, revision, advance=advance_revision, log=log)
        self._registration.start()
        self._staging: _Staging | None = None
        self._lock = threading.Lock()
        self._draw, self._numbers = os.urandom(8), itertools.count()

    @property
    def namespace(self) -> kvkeep.Namespace:
        return self._namespace

    def restore(
        self, token_ids: Sequence[int] | torch.Tensor, *, device: torch.device | str = "cpu", session: str = ""
    ) -> tuple[Cache, int]:
        """A new cache with the longest prefix that is here, and how many tokens that is: whole blocks, and at least one token of the
        prompt is left to compute. `session`: what conversation it is, for the store's policy."""
        ids = _ids(token_ids)
        cache = DynamicCache(config=self._config)
        keys = self._keys(ids, (len(ids) - 1) // self._block_tokens)
        if not keys:
            return cache, 0
        call = self._call(session)
        with self._lock:
            found = self._namespace.match(keys, lease=self._lease_seconds, promote=True, call=call)
            keys, tokens = keys[: found.boundary_positions], 0
            # Per layer keys and values: heads, tokens, width.
            shape = (2 * self._layers, self._heads, len(keys) * self._block_tokens, self._dim)
            states = torch.empty(shape, dtype=self._dtype, device=device)
            try:
                for blocks in self._got(keys, found.lease_id, call):
                    size = len(blocks) * self._block_tokens
                    into = states[:, :, tokens : tokens + size].unflatten(2, (len(blocks), self._block_tokens))
                    into.copy_(blocks.flatten(1, 2).permute(1, 2, 0, 3, 4))
                    tokens += size
            finally:
                if found.lease_id is not None:
                    self._namespace.release(found.lease_id)
        if tokens:
            for layer in range(self._layers):
                k, v = states[2 * layer : 2 * layer + 2, :, :tokens]
                # A copy of its own: the cache grows by making new tensors, and lets go of this one.
                cache.update(k.unsqueeze(0), v.unsqueeze(0), layer)
        return cache, tokens

    def save(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache, *, session: str = "") -> int:
        """Stores the whole blocks of a cache that the store does not have yet. `token_ids`: what the cache was computed from; of
        more of them than it holds, those at the end are not in it yet. Answers how many tokens from the start are here now.

        Raises Unsupported where the cache is not one of this store's model.
        """
        ids = _ids(token_ids)
        held = self._check(cache)
        if held > len(ids):
            raise ValueError(f"the cache holds {held} tokens, of which only {len(ids)} are named")
        keys = self._keys(ids, held // self._block_tokens)
        if not keys:
            return 0
        call = self._call(session)
        with self._lock:
            here = self._namespace.match(keys, call=call).boundary_positions
            while here < len(keys):
                staging = self._staging_memory()
                count = min(staging.blocks, len(keys) - here)
                self._fill(staging.view(self, count), cache, here * self._block_tokens)
                stored = self._namespace.put_from(
                    keys[here : here + count],
                    staging.geometry,
                    list(range(count)),
                    parent=keys[here - 1] if here else None,
                    first_position=here,
                    cls=self._cls,
                    call=call,
                )
                here += stored.kept
                if stored.kept < count:
                    break
        return here * self._block_tokens

    def close(self) -> None:
        """Ends the connection. Idempotent."""
        self._registration.stop()
        self._namespace.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # Keys.

    def _keys(self, ids: list[int], blocks: int) -> list[bytes]:
        """A key says all tokens up to the end of its block, and the salt."""
        keys, before = [], self._seed
        for at in range(0, blocks * self._block_tokens, self._block_tokens):
            tokens = b"".join(t.to_bytes(4, "little") for t in ids[at : at + self._block_tokens])
            keys.append(before := hashlib.sha256(before + tokens).digest())
        return keys

    # Bytes.

    def _got(self, keys: list[bytes], lease: int | None, call: kvkeep.Call) -> Iterator[torch.Tensor]:
        """Blocks in order, up to the first that is missing; each tensor is good until the next one is asked for."""
        at = 0
        while at < len(keys):
            staging = self._staging_memory()
            count = min(staging.blocks, len(keys) - at)
            got = self._namespace.get_into(
                keys[at : at + count], staging.geometry, list(range(count)), lease=lease, call=call
            )
            if got.hits:
                yield staging.view(self, got.hits)
            if got.in_doubt and not self._namespace.settle(1.0):
                # The server may write it at any time: it is left to the server.
                self._staging = None
            if got.hits < count:
                return
            at += count

    def _fill(self, blocks: torch.Tensor, cache: Cache, first: int) -> None:
        tokens = len(blocks) * self._block_tokens
        for n, layer in enumerate(cache.layers):
            for m, states in enumerate((layer.keys, layer.values)):
                piece = states[0, :, first : first + tokens].unflatten(1, (len(blocks), self._block_tokens))
                blocks[:, n, m].copy_(piece.transpose(0, 1))

    def _staging_memory(self) -> _Staging:
        if self._staging is None:
            self._staging = _Staging(self._block_bytes)
        return self._staging

    def _check(self, cache: Cache) -> int:
        """Tokens that it holds."""
        layers = getattr(cache, "layers", ())
        if len(layers) != self._layers or any(type(layer) is not DynamicLayer for layer in layers):
            raise Unsupported(f"not a cache of {self._layers} layers that keep every token, as this model has it")
        lengths = {layer.get_seq_length() for layer in layers}
        if lengths == {0}:
            return 0
        for layer in layers:
            for states in (layer.keys, layer.values):
                batch, heads, _, dim = states.shape
                if batch != 1:
                    raise Unsupported(f"a cache of {batch} sequences: save them one by one")
                if (heads, dim, states.dtype) != (self._heads, self._dim, self._dtype):
                    raise Unsupported(
                        f"the cache has {heads} heads of {dim} {states.dtype}, this store is for {self._heads} of {self._dim} {self._dtype}"
                    )
        if len(lengths) != 1:
            raise Unsupported("the layers of the cache hold different numbers of tokens")
        return lengths.pop()

    def _call(self, session: str) -> kvkeep.Call:
        number = int.from_bytes(hashlib.blake2b(session.encode(), digest_size=8).digest(), "little") if session else 0
        request = self._draw + next(self._numbers).to_bytes(8, "little")
        return kvkeep.Call(request, deadline=self._deadline, info=kvkeep.RequestInfo(session=number))


class _Staging:
    """Memory shared with the server, cut into blocks."""

    def __init__(self, block_bytes: int):
        self.blocks = max(1, STAGING_BYTES // block_bytes)
        region = kvkeep.Region(self.blocks * block_bytes)
        self.geometry = kvkeep.Geometry([(region.place(0, block_bytes), block_bytes)], self.blocks)
        self._bytes = torch.frombuffer(memoryview(region), dtype=torch.uint8)
        self._block_bytes = block_bytes

    def view(self, store: PrefixStore, count: int) -> torch.Tensor:
        """Blocks, layers, keys and values, heads, tokens, width."""
        flat = self._bytes[: count * self._block_bytes].view(store._dtype)
        return flat.view(count, store._layers, 2, store._heads, store._block_tokens, store._dim)


def of_parameters(model: PreTrainedModel) -> str:
    """Digest of a model's weights as they are in memory, adapters among them: names, shapes, types and samples of all tensors."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(model.config.to_json_string(use_diff=False).encode())
    if getattr(model, "_hf_peft_config_loaded", False):
        digest.update(repr(sorted(model.active_adapters())).encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        for first in sorted({0, max(0, len(flat) // 2 - _SAMPLE // 2), max(0, len(flat) - _SAMPLE)}):
            sample = flat[first : first + _SAMPLE].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, heads and width of keys and of values. Raises Unsupported for models whose cache is something else."""
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others or not layers:
        raise Unsupported(
            f"{text.model_type} keeps more or less than keys and values of every token: {', '.join(others) or 'no layers'}"
        )
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in _LENGTH_DEPENDENT:
        raise Unsupported(f"rope of type {kind} gives a token other keys in a longer prompt")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return len(layers), heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _ids(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(token_ids, torch.Tensor):
        if token_ids.dim() == 2 and token_ids.shape[0] == 1:
            token_ids = token_ids[0]
        if token_ids.dim() != 1:
            raise ValueError(f"token ids of one sequence are wanted, not of shape {tuple(token_ids.shape)}")
        return token_ids.tolist()
    return [int(t) for t in token_ids]

"""Which weights an engine serves. KV of one set of weights is garbage to another, so a namespace has a revision, and an engine
that cannot say which weights it has must not share.

In this order: what the operator says; else a digest of the model's configuration and of its weight files (names, sizes, headers and
samples of every tensor: no file is read whole, and a fine-tuned model that was copied over another one is told apart); else None.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

_SAMPLE = 4096
"""Bytes read at the start, in the middle and at the end of each tensor."""
_HEADER_MAX = 256 << 20
"""Longest header of a safetensors file that is believed."""
_PLAIN_SAMPLES = 64
"""Samples of a weight file whose tensors are not known."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_CONFIGURATION = ("config.json", "adapter_config.json", "quantize_config.json", "hf_quant_config.json")


def of_weights(model: str | os.PathLike[str], hub_revision: str | None = None) -> str | None:
    """Digest of a model's (or an adapter's) weights; None where there are none or they cannot be read: do not share.

    `model`: its folder, or its name on a hub, of which the local copy is read (of `hub_revision`; None: main). Nothing is fetched.
    """
    folder = Path(model) if os.path.isdir(model) else _local_copy(str(model), hub_revision)
    if folder is None:
        return None
    try:
        # Engines load safetensors where there are some; another copy of the model may lack the rest.
        files = sorted(folder.glob("*.safetensors"))
        files = files or sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
        if not files:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name in _CONFIGURATION:
            if (folder / name).is_file():
                _take(digest, name.encode(), (folder / name).read_bytes())
        for path in files:
            _take(digest, path.name.encode(), str(path.stat().st_size).encode())
            with path.open("rb") as file:
                for sample in _samples(file, path):
                    _take(digest, sample)
        return digest.hexdigest()
    except (OSError, ValueError):
        return None


def _local_copy(name: str, hub_revision: str | None) -> Path | None:
    """Where huggingface_hub keeps what it fetched of a model."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=hub_revision, local_files_only=True))
    except Exception:
        # No such package, no such name, nothing fetched: their errors have no common kind.
        return None


def short(revision: str) -> bytes:
    """Eight bytes of a revision, for a place behind the keys of an adapter."""
    return hashlib.blake2b(revision.encode(), digest_size=8).digest()


def _samples(file, path: Path):
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        # Eight bytes of length, a header in JSON that says where each tensor lies, the tensors.
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_MAX, size - 8):
            raise ValueError("no safetensors header")
        header = file.read(length)
        yield header
        spans = [tuple(tensor["data_offsets"]) for name, tensor in json.loads(header).items() if name != "__metadata__"]
        ranges = [(8 + length + first, 8 + length + end) for first, end in sorted(spans)]
    else:
        step = max(size // _PLAIN_SAMPLES, _SAMPLE)
        ranges = [(first, min(first + step, size)) for first in range(0, size, step)]
    for first, end in ranges:
        for at in (first, (first + end) // 2, max(first, end - _SAMPLE)):
            file.seek(at)
            yield file.read(min(_SAMPLE, end - at))


def _take(digest, *fields: bytes) -> None:
    """Each with its length, so that no two lists of fields look alike."""
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)

"""Digests of weights: of folders, and of the local copies of models that are named as on a hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from kvkeep.connectors.revision import of_weights
from safetensors.torch import save_file


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    numbers = torch.Generator().manual_seed(1)
    save_file({f"layer.{n}": torch.randn(64, 64, generator=numbers) for n in range(4)}, folder / "model.safetensors")
    return folder


def changed(folder: Path, name: str = "layer.2") -> None:
    """Weights of the same names, shapes and size."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    weights[name] += 1
    save_file(weights, folder / "model.safetensors")


def test_a_copy_has_the_same_digest_and_a_change_another(model, tmp_path):
    first = of_weights(model)
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    assert first is not None and of_weights(copy) == of_weights(str(copy)) == first
    # What engines do not load does not count.
    (copy / "pytorch_model.bin").write_bytes(b"the same weights in another file")
    (copy / "README.md").write_text("x")
    assert of_weights(copy) == first
    changed(copy)
    assert of_weights(copy) not in (first, None)
    (model / "config.json").write_text(json.dumps({"hidden_size": 64, "rope_theta": 2.0}))
    assert of_weights(model) not in (first, None)


def test_what_has_no_weights_has_no_digest(tmp_path):
    assert of_weights(tmp_path) is None
    assert of_weights(tmp_path / "nowhere") is None
    assert of_weights("") is None and of_weights("nobody/nothing") is None
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert of_weights(tmp_path) is None


def test_a_name_on_a_hub_is_its_local_copy(model, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert of_weights("some/model") is None
    snapshots = cache / "models--some--model" / "snapshots"
    refs = cache / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    for ref, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(model, snapshots / commit)
        (refs / ref).write_text(commit)
    changed(snapshots / ("b" * 40))
    assert of_weights("some/model") == of_weights(model)
    assert of_weights("some/model", "v2") == of_weights(snapshots / ("b" * 40)) != of_weights(model)

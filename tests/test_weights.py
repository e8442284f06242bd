"A file says what is in it, or is refused by name."
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trio import folder, says  # noqa: F401 (a fixture)

from franken.trio import Checkpoint
from franken.weights import INDEXES, TYPES, digest, open_weights, read_index, weight_files


@pytest.mark.parametrize("dtype", [d for d in TYPES.values()])
def test_read_is_what_was_written(tmp_path, dtype):
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 8 * 21, dtype=np.uint8) if dtype == "bool" else np.random.default_rng(0).integers(0, 255, 8 * 21, dtype=np.uint8))
    tensors = {"a": torch.zeros(3), "b": bits.view(getattr(torch, dtype)).reshape(-1, 7).contiguous(), "scalar": torch.tensor(2.), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    places = open_weights(tmp_path / "model.safetensors")
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    assert all(torch.equal(raw(places[n].tensor()), raw(t)) and places[n].shape == tuple(t.shape) for n, t in tensors.items())
    buffer, flat = np.empty(4096, np.uint8), tensors["b"].reshape(-1)
    for first, last in ((0, 5), (3, 14), (len(flat) - 1, len(flat))): assert torch.equal(raw(places["b"].read(first, last, buffer)), raw(flat[first:last]))


def test_a_pickle_of_tensors_is_the_same_checkpoint(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json"): (tmp_path / name).write_bytes((folder / name).read_bytes())
    old, new = Checkpoint(str(tmp_path)).check(), Checkpoint(str(folder))
    assert old.names() == new.names() and all(torch.equal(t, new.tensor(n)) for n, t in old.tensors())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]  # never the pickle beside it


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save(dict(a=torch.ones(2), b=Runs()), tmp_path / "pytorch_model.bin")
    with says("pytorch_model.bin", "weights alone", "safetensors"): open_weights(tmp_path / "pytorch_model.bin")
    torch.save(torch.ones(2), tmp_path / "pytorch_model.bin")
    with says("pytorch_model.bin", "tensors by name"): open_weights(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "C:\\model.safetensors", "..\\model.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    for name in INDEXES:
        (tmp_path / name).write_text(json.dumps(dict(weight_map={"lm_head.weight": shard})))
        with says(name, "outside", "don't trust|Don't trust"): read_index(tmp_path / name)


def test_an_index_that_is_none(tmp_path):
    for content in ({}, [], dict(weight_map={}), dict(weight_map={"a": 3}), dict(weight_map=["a"])):
        (tmp_path / INDEXES[0]).write_text(json.dumps(content))
        with says(INDEXES[0], "no weight_map"): weight_files(tmp_path)


def test_a_missing_shard_is_seen_without_an_index(tmp_path):
    for i in (1, 3): save_file({f"t{i}": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00003.safetensors")
    with says("model-00002-of-00003.safetensors", "missing shard"): weight_files(tmp_path)


def test_broken_files(folder, tmp_path):
    path, whole = tmp_path / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for content in (whole[:-1], whole[:50], b"", whole + b"more", b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with says("model.safetensors", "truncated or broken"): open_weights(path)
    path.write_bytes(whole)
    last = max(open_weights(path).values(), key=lambda s: s.start)
    path.write_bytes(whole[:-4])  # cut after it was opened
    with says("model.safetensors", "ends at byte", "4 bytes more"): last.tensor()


def test_a_parameter_in_two_files(folder, tmp_path):
    for name in ("a", "b"): (tmp_path / f"{name}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("config.json", "tokenizer.json"): (tmp_path / name).write_bytes((folder / name).read_bytes())
    with says("b.safetensors", "twice", "remove|Remove"): Checkpoint(str(tmp_path)).check()


def test_the_hubs_cache_knows_its_digests(tmp_path):
    (tmp_path / "blobs").mkdir()
    name = "a" * 64
    (tmp_path / "blobs" / name).write_bytes(b"anything")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digest(tmp_path / "model.safetensors", 8, 0) == name
    assert digest(tmp_path / "blobs" / ".." / "blobs" / name, 8, 1) == name


def test_only_what_is_needed_is_downloaded(folder, tmp_path, monkeypatch):
    "A hub that gives what is asked for, from a repository with shards, a duplicate and pickles."
    import franken.trio
    from fnmatch import fnmatch
    hub, got = tmp_path / "hub", tmp_path / "got"
    hub.mkdir(), got.mkdir()
    for name in ("config.json", "tokenizer.json"): (hub / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, hub / "model-00001-of-00001.safetensors")
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "training_args.bin"): (hub / extra).write_bytes(b"not wanted")
    (hub / INDEXES[0]).write_text(json.dumps(dict(weight_map=dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))))

    def snapshot(where, revision, allow_patterns):
        for path in hub.iterdir():
            if any(fnmatch(path.name, p) for p in allow_patterns): (got / path.name).write_bytes(path.read_bytes())
        return str(got)
    monkeypatch.setattr(franken.trio, "snapshot_download", snapshot)
    checkpoint = Checkpoint("owner/name").check()
    assert {p.name for p in got.iterdir()} == {"config.json", "tokenizer.json", INDEXES[0], "model-00001-of-00001.safetensors"}
    assert checkpoint.names() == Checkpoint(str(folder)).names()

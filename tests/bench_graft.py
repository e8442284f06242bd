"What it costs to save a graft, beside copying one parent: bytes a second and peak memory, on parents of some GB made here and removed."
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import json

import numpy as np

from franken.organism import build_config, build_processor

GB, LAYERS, SHARDS, TIMES = float(os.environ.get("FRANKEN_BENCH_GB", 2)), 24, 4, 3


def header(shapes: dict) -> bytes:
    "A safetensors header of bfloat16 tensors."
    at, entries = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        entries[name] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + size])
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def synthetic(folder: Path, seed: int):
    "A checkpoint with a real one's names, in shards; its numbers are noise that is finite in bfloat16."
    folder.mkdir()
    rng, width = np.random.default_rng(seed), int((GB * 1e9 / 2 / LAYERS / 9) ** .5)
    block = (rng.integers(0, 1 << 16, 1 << 22, dtype=np.uint16) & 0xBFFF).tobytes()
    shapes = {f"model.layers.{l}.{n}.weight": (width, f * width) for l in range(LAYERS) for n, f in (("self_attn.q_proj", 1), ("self_attn.o_proj", 1), ("mlp.up_proj", 2), ("mlp.gate_proj", 2), ("mlp.down_proj", 2))}
    shapes |= {"model.embed_tokens.weight": (width, 12 * width), "lm_head.weight": (width, 12 * width), "model.norm.weight": (width,)}
    names, where = list(shapes), {}
    for i in range(SHARDS):
        part, name = {n: shapes[n] for n in names[i::SHARDS]}, f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        with open(folder / name, "wb") as f:
            f.write(header(part))
            left = sum(2 * int(np.prod(s)) for s in part.values())
            while left: left -= f.write(block[:min(left, len(block))])
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    config = build_config(layers=LAYERS).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    build_processor().save_pretrained(folder)


SAVE = """
import re, sys, time
from franken.grafting import Graft, save_hybrid
from franken.trio import Checkpoint
import torch
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
a, b, out, text, known = sys.argv[1:]
parents = {"in": Checkpoint(a), "rl": Checkpoint(b)}
if known == "hashes known": [c.fingerprint for c in parents.values()]
before, began = peak(), time.perf_counter()
save_hybrid(Graft.parse(text), parents, out)
print(time.perf_counter() - began, before, peak())
"""


def save(a: Path, b: Path, out: Path, text: str, known: str) -> tuple[float, float, float]:
    "(seconds, MB before, MB at the peak) of saving a graft in a process of its own."
    shutil.rmtree(out, ignore_errors=True)
    said = subprocess.run([sys.executable, "-c", SAVE, a, b, out, text, known], capture_output=True, text=True, check=True).stdout
    return tuple(map(float, said.split()))


def copy(a: Path, out: Path) -> float:
    "Seconds of `cp -r`."
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", a, out], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bench-graft-") as root:
        a, b, out = (Path(root) / n for n in ("a", "b", "out"))
        synthetic(a, 0), synthetic(b, 1)
        size = sum(p.stat().st_size for p in a.glob("*.safetensors"))
        copy(a, out)  # one that does not count
        ways = {"Mid and Late from RL": "mid=rl + late=rl", "half way to RL": "decoder=rl@0.5"}
        runs = {("cp of one parent", ""): [], **{(w, "hashes known"): [] for w in ways}, ("Mid and Late from RL", "hashes, too"): []}
        for _ in range(TIMES):  # in turns: the machine's mood is the same for all
            for (way, known), found in runs.items(): found.append(save(a, b, out, ways[way], known) if way in ways else (copy(a, out), 0, 0))
        base = min(t for t, *_ in runs["cp of one parent", ""])
        print(f"Saving a graft of {size / 1e9:.1f} GB in {SHARDS} shards, fastest of {TIMES}")
        for (way, known), found in runs.items():
            t = min(found)
            print(f"  {way + (', ' + known if known else ''):40}{size / t[0] / 1e9:8.2f} GB/s{base / t[0]:8.2f} of cp" + (f"   memory {t[1]:.0f} -> {max(f[2] for f in found):.0f} MB" if t[1] else ""))

"""What comparing two checkpoints costs, here: a pair of Qwen2.5-VL-3B's shapes, made on the spot with a planted difference, against reading the same bytes and against the reference's way. Run by `make bench`.

Half of the 3B's layers: 4.8 GB a side. BENCH_FOLDER names a folder with 10 GB of room, if the temporary one has not. Each way runs in a process of its own, whose peak memory is its own, too."""
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, RANK, HIDDEN, INNER, KV = 18, 8, 2048, 11008, 256
VISION, VISION_INNER, BLOCKS, WORDS = 1280, 3420, 32, 151936


def shapes():
    "{name: shape} of Qwen2.5-VL-3B, with half of its layers."
    yield "model.embed_tokens.weight", (WORDS, HIDDEN)
    for i in range(LAYERS):
        for name, shape in (("self_attn.q_proj", (HIDDEN, HIDDEN)), ("self_attn.k_proj", (KV, HIDDEN)), ("self_attn.v_proj", (KV, HIDDEN)), ("self_attn.o_proj", (HIDDEN, HIDDEN)),
                            ("mlp.gate_proj", (INNER, HIDDEN)), ("mlp.up_proj", (INNER, HIDDEN)), ("mlp.down_proj", (HIDDEN, INNER))): yield f"model.layers.{i}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"): yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    for i in range(BLOCKS):
        for name, shape in (("attn.qkv", (3 * VISION, VISION)), ("attn.proj", (VISION, VISION)), ("mlp.gate_proj", (VISION_INNER, VISION)), ("mlp.up_proj", (VISION_INNER, VISION)), ("mlp.down_proj", (VISION, VISION_INNER))):
            yield f"visual.blocks.{i}.{name}.weight", shape
    yield "visual.merger.mlp.0.weight", (5120, 5120)
    yield "visual.merger.mlp.2.weight", (HIDDEN, 5120)


def make(folder: Path):
    "before and after: integers over 1024, which bfloat16 holds exactly, and a difference of rank 8 in every matrix."
    config = dict(num_hidden_layers=LAYERS, tie_word_embeddings=True)
    g, shards, size = torch.Generator().manual_seed(0), [{}], 0
    for name, shape in shapes():
        shards[-1][name], size = shape, size + 2 * np.prod(shape)
        if size > 1e9: shards, size = [*shards, {}], 0
    noise = (torch.randint(-64, 65, (1 << 26,), generator=g).float() / 1024).bfloat16()
    draw = lambda *size: torch.randint(-1, 2, size, generator=g).float()
    indexes = {side: {} for side in ("before", "after")}
    for side in indexes: (folder / side).mkdir(), (folder / side / "config.json").write_text(json.dumps(config))
    for number, shard in enumerate(filter(None, shards)):
        file = f"model-{number:05}.safetensors"
        before, after = {}, {}
        for name, shape in shard.items():
            start = int(torch.randint(0, 1 << 20, (1,), generator=g))
            before[name] = noise[start:].repeat(-(-int(np.prod(shape)) // (len(noise) - start)))[:int(np.prod(shape))].reshape(shape).clone()
            planted = draw(shape[0], RANK) @ draw(RANK, shape[1]) if len(shape) > 1 else draw(*shape)
            after[name] = before[name] + (planted / 1024).bfloat16()
        for side, tensors in (("before", before), ("after", after)):
            save_file(tensors, folder / side / file, metadata={"format": "pt"})
            indexes[side] |= dict.fromkeys(tensors, file)
    for side, index in indexes.items(): (folder / side / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))


def read(folder: Path, chunk: int = 1 << 22):
    "Read and sum the same bytes, on as many threads as there are cores: what no comparison can beat."
    spans = [(p, at, min(chunk, p.stat().st_size - at)) for side in ("before", "after") for p in sorted((folder / side).glob("*.safetensors")) for at in range(0, p.stat().st_size, chunk)]
    def one(span):
        path, at, size = span
        buffer = np.empty(size, np.uint8)
        with open(path, "rb", buffering=0) as f: os.preadv(f.fileno(), [memoryview(buffer)], at)
        return int(buffer[:size // 8 * 8].view(np.int64).sum())
    with ThreadPoolExecutor(os.cpu_count()) as pool: sum(pool.map(one, spans))


def whole(folder: Path):
    "The reference's way: both state dicts in memory, differences matrix by matrix, in float32."
    from safetensors.torch import load_file
    before, after = ({n: t.half() for p in sorted((folder / side).glob("*.safetensors")) for n, t in load_file(p).items()} for side in ("before", "after"))
    deltas = {n: after[n] - before[n] for n in after}
    for n, d in deltas.items(): torch.norm(d.float()).item(), (torch.norm(before[n].float()) + 1e-8).item()


def ours(folder: Path, spectra="none"):
    from franken.comparison import compare
    return compare(str(folder / "before"), str(folder / "after"), spectra=spectra, top=RANK)


def peak() -> float:
    "Megabytes that this process had at its most."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def timed(way: str, folder: Path) -> dict:
    "Seconds of a way (the faster of two runs; one of the slow way) and its peak memory, in a process of its own."
    said = subprocess.run([sys.executable, __file__, way, folder], capture_output=True, text=True, check=True)
    return json.loads(said.stdout.splitlines()[-1])


def alone(way: str, folder: Path):
    "The body of such a process: print what it cost."
    start, took = peak(), []
    if way != "read": import franken.comparison  # noqa: F401 (not part of the bill)
    for _ in range(1 if way in ("whole", "top") else 2):
        began = time.perf_counter()
        found = {"read": read, "whole": whole, "ours": ours, "top": lambda folder: ours(folder, "top")}[way](folder)
        took.append(time.perf_counter() - began)
    more = {}
    if way == "top":
        matrices = found[found["cols"].notna()]
        ranks = [int(sum(x > 0 for x in s)) for s in matrices["sigma"]]
        more = dict(matrices=len(matrices), planted=sum(r == RANK for r in ranks), error=float(matrices["top_error"].max()), energy=float(matrices["energy_top"].min()))
    print(json.dumps(dict(seconds=min(took), peak=peak(), start=start) | more))


def by_shape():
    "All singular values of one matrix of each shape: against torch's svdvals in float64, both with every core; the largest error of a value that is given."
    from franken.spectra import leading, singular_values
    torch.set_num_threads(os.cpu_count())
    print(f"\n{'all singular values':24}{'svdvals f64':>14}{'svdvals f32':>14}{'ours':>10}{'x f64':>8}{'x f32':>8}{'error':>10}{'f32 error':>11}{'top 16':>10}{'residual':>10}")
    rng, bill = np.random.default_rng(0), {}
    for rows, cols in ((HIDDEN, HIDDEN), (KV, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (3 * VISION, VISION), (VISION, VISION_INNER), (5120, 5120)):
        k = min(rows, cols)
        matrix = (rng.standard_normal((rows, cols)) * np.exp(-3 * np.arange(cols) / cols)).astype(np.float32)
        def took(run):
            began = time.perf_counter()
            return time.perf_counter() - began if (value := run()) is None else (value, time.perf_counter() - began)
        exact, plain = took(lambda: torch.linalg.svdvals(torch.from_numpy(matrix).double()))
        single, quick = took(lambda: torch.linalg.svdvals(torch.from_numpy(matrix)))
        (sigma, method), fast = took(lambda: singular_values(matrix))
        (_, _, _, residual), first = took(lambda: leading(matrix, 16))
        bill[rows, cols] = plain, fast
        error = np.nanmax(np.abs(sigma / exact.numpy() - 1))
        print(f"{f'{rows} x {cols} ({method})':24}{plain:12.2f} s{quick:12.2f} s{fast:8.2f} s{plain / fast:8.1f}{quick / fast:8.1f}{error:10.0e}{(single.double() / exact - 1).abs().max():11.0e}{first:8.2f} s{float(residual):10.0e}", flush=True)
    layer = [(HIDDEN, HIDDEN)] * 2 + [(KV, HIDDEN)] * 2 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
    plain, fast = (sum(bill[shape][i] for shape in layer) for i in range(2))
    print(f"  a decoder layer of a 3B, all of its matrices: {plain:.2f} s, ours {fast:.2f} s, {plain / fast:.1f} x")


def main():
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        folder = Path(folder)
        began = time.perf_counter()
        make(folder)
        size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e9
        largest = 2 * WORDS * HIDDEN / 1e6
        print(f"A pair of {size / 2:.1f} GB a side, {sum(1 for _ in shapes())} parameters, rank {RANK} planted (made in {time.perf_counter() - began:.0f} s), {os.cpu_count()} cores; files warm where memory holds them")
        reading = timed("read", folder)
        line = lambda what, r, more="": print(f"  {what:48}{r['seconds']:8.2f} s{size / r['seconds']:8.2f} GB/s{reading['seconds'] / r['seconds']:8.2f} of reading{r['peak']:9.0f} MB peak{more}", flush=True)
        line("read and sum the same bytes", reading)
        norms, reference = timed("ours", folder), timed("whole", folder)
        line("compare, spectra none", norms, f"   {reference['seconds'] / norms['seconds']:.0f} x faster than whole state dicts; allowed {1000 + 4 * largest:.0f} MB")
        line("the reference's way: whole state dicts", reference)
        top = timed("top", folder)
        line("compare, spectra top", top, f"   rank {RANK} found in {top['planted']} of {top['matrices']} matrices; residual at most {top['error']:.0e}, their energy at least {top['energy']:.6f}")
    by_shape()


if __name__ == "__main__": alone(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 1 else main()

"Invented tables of a six-layer trio, to test figures, verdicts and the report on. No measurement."
import numpy as np
import pandas as pd

from franken.regions import REGIONS, Regions
from franken.stats import share
from franken.tables import tidy, write_table

ABILITIES = ("vision", "vision_to_reasoning", "reasoning")
FUNCTIONS = ("recognition", "attribute", "ocr", "counting", "grounding", "relation")
STEMS = {"attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


def _share(rng, p, n): return dict(zip(("score", "low", "high"), share(rng.binomial(n, min(1, max(0, p))), n)), n=n)

def _abilities(rng, n=500):
    level = {"base": (.9, .12, .07), "in": (.88, .43, .25), "rl": (.86, .85, .62)}
    rows = [dict(model=m, ability=a, **_share(rng, p, n), accuracy=p, explained=.5, faithful=.8) for m, ps in level.items() for a, p in zip((*ABILITIES, "overall"), (*ps, sum(ps) / 3))]
    return pd.DataFrame(rows)

def _attend(rng, regions, n=200):
    rows = []
    for trace in ("own", "shared"):
        for m, rise in (("in", 0), ("rl", .03)):
            for l in range(regions.n):
                x, up = .12 + .05 * np.sin(l) + rise * (l >= regions.cuts[0]), rise * (l >= regions.cuts[0]) + rng.normal(0, .003)
                over = dict(over_in=up, over_in_low=up - .005, over_in_high=up + .005) if m == "rl" else dict(over_in=None, over_in_low=None, over_in_high=None)
                rows.append(dict(model=m, layer=l, region=regions.of(l), n=n, mass=x, mean=x / 9, low=x - .008, high=x + .008, trace=trace, n_both=n if m == "rl" else 0, **over))
    return pd.DataFrame(rows)

def _localize(rng, regions, model, n=100):
    rows = []
    for f, depth in zip(FUNCTIONS, (.2, .45, .5, .3, .55, .6)):
        for l in range(regions.n):
            p = 1 / (1 + np.exp(12 * (l / regions.n - depth)))
            rows.append(dict(probe="swap", mode="residual", function=f, layer=l, rate=p))
    for f in (*FUNCTIONS, "vision_to_reasoning", "reasoning"):
        for l in range(regions.n): rows.append(dict(probe="skip", mode="skip", function=f, layer=l, rate=.1 + .8 * rng.random()))
    for r in rows:
        s = _share(rng, r["rate"], n)
        clean = dict(base=.9 if "reasoning" in r["function"] else .1, rl=.2)[model]
        r |= dict(model=model, region=regions.of(r["layer"]), n=n, rate=max(clean, s["score"]) if r["probe"] == "skip" else s["score"], low=s["low"], high=s["high"], clean_error=clean, floor=0.)
        if r["probe"] == "skip": r |= dict(zip(("rate", "low", "high"), share(round(r["rate"] * n), n)))
    return pd.DataFrame(rows)

def _compare(rng, regions, hidden=64):
    rows = []
    def add(step, parameter, section, kind, layer, size, shape, rank):
        s = size * np.exp(-np.arange(min(shape)) / rank) * rng.uniform(.95, 1.05) if min(shape) > 1 else None
        f = float(np.linalg.norm(s)) if s is not None else size
        p = s / s.sum() if size and s is not None else None
        rows.append(dict(step=step, parameter=parameter, section=section, kind=kind, layer=layer, region=regions.of(layer) if section == "decoder" and layer is not None else None,
                         rows=shape[0], cols=shape[1], frobenius=f, norm=9., relative=f / 9, sigma=None if s is None else list(s),
                         effective_rank=None if p is None else float(np.exp(-(p * np.log(p)).sum())), stable_rank=None if p is None else float((s**2).sum() / s[0]**2)))
    for step, size in (("IN-Base", 1.), ("RL-IN", .08)):
        rl = step == "RL-IN"
        for l in range(2): add(step, f"vision.blocks.{l}.attn.qkv.weight", "vision", "attention", l, 0 if rl else size / 5, (hidden, hidden), 8)
        add(step, "projector.mlp.0.weight", "projector", "other", None, 0 if rl else size / 3, (hidden, hidden), 8)
        add(step, "embeddings.weight", "rest", "other", None, 0 if rl else size, (hidden, hidden), 8)
        for l in range(regions.n):
            for kind, stems in STEMS.items():
                for stem in stems: add(step, f"decoder.layers.{l}.{stem}.weight", "decoder", kind, l, size * (1 + (.3 * l if rl else .1)) * rng.uniform(.9, 1.1), (hidden, hidden), max(1., 6 - .5 * l) if rl else 12)
            add(step, f"decoder.layers.{l}.input_layernorm.weight", "decoder", "norm", l, size / 20, (hidden, 1), 1)
    return pd.DataFrame(rows)

def _graft(rng, n=500):
    rows = []
    for a, (lo, hi) in zip((*ABILITIES, "overall"), ((.88, .86), (.43, .85), (.25, .62), (.52, .78))):
        for e in ("in", "rl"):
            for m in ("in", "rl"):
                for l in ("in", "rl"):
                    w = .5 * (e == "rl") + .2 * (m == "rl") + .3 * (l == "rl")
                    s = _share(rng, lo + (hi - lo) * w, n)
                    same = w == 0
                    rows.append(dict(early=e, mid=m, late=l, rest="in", ability=a, **s, gain=0. if same else s["score"] - lo, gain_low=None if same else s["score"] - lo - .05,
                                     gain_high=None if same else s["score"] - lo + .05, p=None if same else .01))
    return pd.DataFrame(rows)

def _freeze(rng, seeds=3, n=500):
    level = dict(all=(.88, .43, .25), none=(.86, .85, .62), early=(.86, .78, .5), mid=(.86, .8, .55), late=(.87, .79, .52))
    return pd.DataFrame([dict(frozen=f, recipe="grpo", seed=s, ability=a, n=n, score=p + rng.normal(0, .02)) for f, ps in level.items() for s in range(seeds) for a, p in zip(ABILITIES, ps)])

def invent(seed=0, layers=6, cuts="thirds") -> dict[str, pd.DataFrame]:
    rng, regions = np.random.default_rng(seed), Regions.named(cuts, layers)
    tables = dict(abilities=_abilities(rng), attend=_attend(rng, regions), localize=pd.concat([_localize(rng, regions, m) for m in ("base", "rl")]), compare=_compare(rng, regions), graft=_graft(rng), freeze=_freeze(rng))
    return {name: tidy(df, name) for name, df in tables.items()}

def store(folder, seed=0, **settings):
    "Write invented tables into a folder."
    for name, df in invent(seed, **settings).items():
        write_table(df, folder, name, trio="invented", fingerprints=dict(base="00aa", **{"in": "11bb"}, rl="22cc"), seed=seed, n=int(df.n.max()) if "n" in df else None, dtype="float32", device="cpu")

if __name__ == "__main__":
    import sys
    from pathlib import Path
    root = Path(sys.argv[1])
    for seed, name in enumerate(("organism", "organism-1", "organism-2")): store(root / name, seed)
    (root / "organism" / "freeze.parquet").rename(root / "freeze.parquet")
    for name in ("organism-1", "organism-2"): (root / name / "freeze.parquet").unlink()

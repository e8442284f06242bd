"An update is what was added: its norm, its spectrum, and nothing that is not there."
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trio import modern, rewrite, save

from franken.comparison import How, by_layer, by_region, compare, decay, grouped, in_budget, measure, measure_reference, moments, position, referenced
from franken.errors import UserError
from franken.organism import build_model, build_processor
from franken.spectra import effective_rank, stable_rank
from franken.tables import read_table
from franken.trio import Checkpoint, load_trio
from franken.weights import open_weights


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    "Three random organisms: IN moved everywhere but in the vision tower, RL by rank 2 in the decoder's matrices."
    root = tmp_path_factory.mktemp("trio")
    model, g = build_model(layers=3, seed=0), torch.Generator().manual_seed(1)
    save(model, root / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "visual" not in name: p += .01 * torch.randn(p.shape, generator=g)
        save(model, root / "in")
        for name, p in model.named_parameters():
            if "language_model.layers" in name and p.ndim == 2: p += .005 * torch.randn(p.shape[0], 2, generator=g) @ torch.randn(2, p.shape[1], generator=g)
        save(model, root / "rl")
    return load_trio(base=root / "base", in_=root / "in", rl=root / "rl")


@pytest.fixture(scope="module")
def both(trio): return compare(trio)


def test_squared_norm_is_the_sum_of_squared_singular_values(both):
    matrices = both[both["cols"].notna()]
    assert np.allclose(matrices["frobenius"]**2, [np.nansum(np.square(s)) for s in matrices["sigma"]], rtol=1e-12)
    for s, r, c in zip(matrices["sigma"], matrices["rows"], matrices["cols"]):
        known = [x for x in s if x == x]
        assert len(s) == min(r, c) and list(s[:len(known)]) == known == sorted(known, reverse=True)  # what is not resolved comes last
    assert both[both["cols"].isna()]["sigma"].isna().all()


def test_ranks():
    for n in (1, 5, 40): assert np.isclose(effective_rank(np.ones(n)), n) and np.isclose(stable_rank(np.ones(n)), n)
    s = np.random.default_rng(0).random(20)
    assert 1 <= stable_rank(s) <= 20 and 1 <= effective_rank(s) <= 20 and np.isclose(effective_rank(3 * s), effective_rank(s))
    assert np.isclose(effective_rank(np.r_[s, 0, 0]), effective_rank(s))


def test_low_rank_update_is_seen_as_such(both):
    matrices = both[(both["section"] == "decoder") & both["cols"].notna()]
    rank = matrices.groupby("step")["effective_rank"].mean()
    assert 1 < rank["RL-IN"] < 2.1 < 20 < rank["IN-Base"]


def test_what_did_not_move_is_zero_and_has_no_rank(both):
    vision = both[both["section"] == "vision"]
    assert len(vision) and (vision["frobenius"] == 0).all() and (vision["relative"] == 0).all()
    assert vision["effective_rank"].isna().all() and vision["stable_rank"].isna().all()
    assert not any(any(s) for s in vision["sigma"].dropna())
    assert vision["method"].isna().all() and vision["energy_top"].isna().all() and (vision["changed"] == 0).all()


def test_what_was_born_of_nothing_has_no_relative_norm(tmp_path):
    for i in range(2): save_file({"w": torch.full((3,), float(i))}, tmp_path / f"{i}.safetensors")
    [[born]] = measure([[open_weights(tmp_path / f"{i}.safetensors")["w"] for i in range(2)]], How())
    assert born["frobenius"] == 3**.5 and np.isnan(born["relative"]) and born["changed"] == 1


def test_old_and_new_layouts_are_the_same_checkpoint(trio, tmp_path):
    new = rewrite(trio.in_.folder, tmp_path / "new", modern)
    df = compare(trio.in_, str(new))
    assert len(df) == len(trio.in_.names()) and (df["frobenius"] == 0).all()
    df = compare(trio.base, str(new), step="IN-Base")
    moved = compare(trio)
    assert np.array_equal(df["frobenius"], moved[moved["step"] == "IN-Base"]["frobenius"])


def test_layers_and_regions_add_up(both):
    decoder = both[both["section"] == "decoder"]
    total = (decoder["frobenius"]**2).groupby(decoder["step"]).sum()
    layers, regions = by_layer(both), by_region(both)
    assert np.allclose((layers[layers["section"] == "decoder"].set_index("step")["frobenius"]**2).groupby("step").sum(), total)
    assert np.allclose((regions.set_index("step")["frobenius"]**2).groupby("step").sum(), total) and np.allclose(regions.groupby("step")["share"].sum(), 1)
    assert set(position(both).dropna()) == {-2, -1, 0, 1, 2, 3} and set(regions["region"]) == {"early", "mid", "late"}
    matrices = decoder[decoder["cols"].notna() & (decoder["kind"] != "norm") & (decoder["layer"] == 1) & (decoder["step"] == "RL-IN")]
    mean = by_layer(both, "mean").query("step == 'RL-IN' and section == 'decoder' and layer == 1")["frobenius"].item()
    assert len(matrices) == 7 and np.isclose(mean, matrices["frobenius"].mean())


def test_decay_starts_at_zero_and_falls(both):
    for _, part in decay(both).groupby(["step", "layer"]):
        assert part["log_ratio"].iloc[0] == 0 and part["log_ratio"].is_monotonic_decreasing and part["rank"].max() <= 50


def test_table_is_written_and_the_same_twice(trio, tmp_path):
    df = compare(trio, out=tmp_path / "a")
    compare(trio, out=tmp_path / "b")
    assert (tmp_path / "a/compare.parquet").read_bytes() == (tmp_path / "b/compare.parquet").read_bytes()
    assert read_table(tmp_path / "a", "compare")["frobenius"].equals(df["frobenius"])


def test_strays_are_named(trio, tmp_path):
    lacking = rewrite(trio.rl.folder, tmp_path / "lacking", drop=["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="2 of 69.*decoder.layers.2.mlp.up_proj.weight .only in .*in.; norm.weight.*--partial"): compare(trio.in_, str(lacking))
    extra = shutil.copytree(trio.rl.folder, tmp_path / "extra")
    save_file(load_file(extra / "model.safetensors") | {"adapter.weight": torch.ones(2)}, extra / "model.safetensors")
    with pytest.raises(UserError, match="adapter.weight .only in .*extra"): compare(trio.in_, str(extra))
    df = compare(trio.in_, str(lacking), partial=True).set_index("parameter")
    assert list(df.index[df["present"] != "both"]) == ["decoder.layers.2.mlp.up_proj.weight", "norm.weight"]
    assert df.loc["norm.weight", "present"] == "before" and df.loc["norm.weight", ["frobenius", "rows", "sigma", "changed"]].isna().all()
    whole = compare(trio.in_, trio.rl).set_index("parameter")
    assert df["frobenius"].dropna().equals(whole["frobenius"][df["frobenius"].notna()])


def independent(trio, name, a, b):
    "A difference as anyone would take it."
    return trio.members[b].tensor(name).double() - trio.members[a].tensor(name).double()


def test_every_measure_by_plain_torch(trio, both):
    "Against one line of torch for each measure."
    for row in both.itertuples():
        a, b = dict(zip(("IN-Base", "RL-IN"), (("base", "in"), ("in", "rl"))))[row.step]
        delta, before = independent(trio, row.parameter, a, b), trio.members[a].tensor(row.parameter).double()
        assert np.isclose(row.frobenius, delta.norm(), rtol=1e-6) and np.isclose(row.norm, before.norm(), rtol=1e-6) and row.size == delta.numel()
        assert row.changed == (delta != 0).double().mean() and row.stored == "F32"
        halves = [trio.members[m].tensor(row.parameter).bfloat16() for m in (a, b)]
        assert row.changed16 == (halves[0] != halves[1]).double().mean()
        if not row.frobenius or delta.ndim < 2: continue
        delta = delta.flatten(1)
        s = torch.linalg.svdvals(delta)
        known = ~np.isnan(row.sigma)
        assert np.allclose(np.asarray(row.sigma)[known], s.numpy()[known], rtol=1e-5, atol=1e-7 * s[0].item())
        assert np.isclose(row.energy_top, (s[:16]**2).sum() / (s**2).sum(), rtol=1e-3) and np.isclose(row.stable_rank, (s**2).sum() / s[0]**2, rtol=1e-5)
        u, _, vh = torch.linalg.svd(before.flatten(1))
        k = min(16, *delta.shape)
        assert np.isclose(row.weights_left, (u[:, :k].mT @ delta).square().sum() / delta.square().sum(), atol=2e-3)
        assert np.isclose(row.weights_right, (delta @ vh[:k].mT).square().sum() / delta.square().sum(), atol=2e-3)


def test_two_updates_of_one_matrix(trio, both):
    rl = both[(both["step"] == "RL-IN") & (both["frobenius"] > 0)]
    assert len(rl) and both[both["step"] == "IN-Base"]["cosine"].isna().all() and rl["cosine"].notna().all()
    for row in rl.itertuples():
        d = [independent(trio, row.parameter, *pair).flatten() for pair in (("base", "in"), ("in", "rl"))]
        assert np.isclose(row.cosine, torch.nn.functional.cosine_similarity(*d, dim=0), atol=1e-5)
    assert rl["overlap_left"].between(0, 1).all() and rl["overlap_right"].between(0, 1).all()
    same = compare(trio.base, trio.in_, then=trio.in_)
    assert same[same["step"] == "RL-IN"]["cosine"].isna().all()  # no second update


def test_an_update_repeated_is_parallel_to_itself(trio, tmp_path):
    "Base, Base + D, Base + 2D: cosine 1 and the same directions; back again: cosine -1."
    double = rewrite(trio.in_.folder, tmp_path / "double")
    base = load_file(trio.base.folder / "model.safetensors")
    save_file({n: (2 * t.double() - base[n].double()).float() for n, t in load_file(trio.in_.folder / "model.safetensors").items()}, double / "model.safetensors")
    on = compare(trio.base, trio.in_, then=str(double)).query("step == 'RL-IN' and frobenius > 0")
    assert np.allclose(on["cosine"], 1, atol=1e-5) and np.allclose(on["overlap_left"].dropna(), 1, atol=1e-2)
    back = compare(trio.base, trio.in_, then=trio.base).query("step == 'RL-IN' and frobenius > 0")
    assert np.allclose(back["cosine"], -1, atol=1e-6) and np.allclose(back["frobenius"], compare(trio.base, trio.in_).query("frobenius > 0")["frobenius"])


def test_only_the_top_or_nothing(trio, both):
    top, none = compare(trio, spectra="top", top=4), compare(trio, spectra="none")
    for df in (top, none): assert df["frobenius"].equals(both["frobenius"]) and df["changed"].equals(both["changed"]) and df["effective_rank"].isna().all()
    assert none["sigma"].isna().all() and none["method"].isna().all()
    moved = top[top["sigma"].notna()]
    assert set(moved["method"]) == {"lanczos"} and (moved["top_error"] <= 1e-4).all()
    for s, full, rank in zip(moved["sigma"], both.loc[moved.index, "sigma"], moved["stable_rank"]):
        assert len(s) == 4 and np.allclose(s, full[:4], rtol=1e-3, atol=1e-4 * full[0])


def planted(folder, dtype, rank, shape=(300, 280), seed=0):
    "A weight of integers, and the same with a difference of that rank, which every dtype holds exactly."
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *size: torch.randint(low, high, size, generator=g).float()
    before, delta = draw(-64, 65, *shape), draw(-1, 2, shape[0], rank) @ draw(-1, 2, rank, shape[1])
    for name, w in (("before", before), ("after", before + delta)): save_file({"w": (w / 1024).to(dtype)}, folder / f"{name}.safetensors")
    return [open_weights(folder / f"{name}.safetensors")["w"] for name in ("before", "after")], delta.double() / 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 7])
def test_planted_rank_is_found_in_every_dtype(tmp_path, dtype, rank):
    chain, delta = planted(tmp_path, dtype, rank)
    [[row]] = measure([chain], How())
    assert row["method"] == "gram" and np.isfinite(row["sigma"]).sum() == rank
    assert np.allclose(row["sigma"][:rank], torch.linalg.svdvals(delta)[:rank], rtol=1e-5)
    assert row["frobenius"] == pytest.approx(delta.norm().item(), rel=1e-7) and row["changed"] == (delta != 0).double().mean()
    assert row["energy_top"] == pytest.approx(1, abs=1e-6) and row["top_error"] < 1e-4


def test_a_stack_is_its_matrices(tmp_path):
    "What a GPU does with several matrices at once, on the CPU: torch's path and numpy's, together and one by one."
    groups = []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        groups.append(planted(tmp_path / str(i), torch.bfloat16, 3 + i, seed=i)[0])
    alone, together = [measure([g], How())[0][0] for g in groups], [r[0] for r in measure(groups, How())]
    from franken.spectra import singular_values
    for a, b, g in zip(alone, together, groups):
        assert np.allclose(a["sigma"], b["sigma"], rtol=1e-5, equal_nan=True) and all(np.isclose(a[k], b[k], rtol=1e-4) for k in ("frobenius", "stable_rank", "energy_top", "weights_left", "weights_right"))
        by_torch, _ = singular_values(torch.stack([g[1].tensor().float() - g[0].tensor().float()]))
        assert np.allclose(by_torch[0], a["sigma"], rtol=1e-5, equal_nan=True)


def test_work_is_grouped_by_shape_on_a_gpu_only(trio):
    members, names = list(trio.members.values()), trio.base.names()
    alone, gpu = grouped(names, members, How()), grouped(names, members, type("Gpu", (), dict(device="cuda"))())
    assert [len(g) for g in alone] == [1] * len(names) and sorted(sum(gpu, [])) == sorted(sum(alone, [])) == names
    assert all(len({trio.base.shape(n) for n in g}) == 1 for g in gpu) and len(gpu) < len(alone) / 3
    downs = [n for n in names if "down_proj" in n and "decoder" in n]
    assert any({*downs} <= {*g} for g in gpu) and max(len(g) for g in grouped(names, members, type("Gpu", (), dict(device="cuda"))(), budget=4 * 128 * 256 * 2) if set(g) & set(downs)) == 2


def test_the_budget_is_kept():
    import threading
    now, most, lock = [0], [0], threading.Lock()
    def run(task):
        with lock: now[0] += task; most[0] = max(most[0], now[0])
        threading.Event().wait(.01)
        with lock: now[0] -= task
    assert sorted(t for t, _ in in_budget([30, 4, 4, 4, 4, 4], lambda t: t, run, workers=4, budget=9)) == [4, 4, 4, 4, 4, 30] and most[0] == 30
    most[0] = 0
    list(in_budget([4] * 8, lambda t: t, run, workers=4, budget=9))
    assert most[0] == 8


def test_a_fault_in_one_task_is_raised():
    with pytest.raises(ZeroDivisionError): list(in_budget([1, 0, 2], lambda t: 1, lambda t: 1 / t, workers=2))


def test_an_interrupted_run_ends_in_the_same_table(trio, tmp_path):
    compare(trio, out=tmp_path / "whole")
    compare(trio, out=tmp_path / "cut")
    samples = tmp_path / "cut/compare.samples.jsonl"
    data = samples.read_bytes()
    samples.write_bytes(data[:len(data) // 3])  # in the middle of a line
    (tmp_path / "cut/compare.parquet").unlink()
    compare(trio, out=tmp_path / "cut")
    assert (tmp_path / "cut/compare.parquet").read_bytes() == (tmp_path / "whole/compare.parquet").read_bytes()
    lines = len(samples.read_text().splitlines())
    compare(trio, out=tmp_path / "cut")
    assert len(samples.read_text().splitlines()) == lines == 69
    compare(trio, out=tmp_path / "cut", top=3)
    assert len(samples.read_text().splitlines()) == 2 * lines  # other measures are other samples


def test_unresolved_values_are_null_on_disk(tmp_path, trio):
    import pyarrow.parquet as pq
    df = compare(trio, out=tmp_path)
    column = pq.read_table(tmp_path / "compare.parquet")["sigma"]
    assert not any(v != v for row in column.to_pylist() if row for v in row if v is not None)
    assert all((a is None and b is None) or np.array_equal(a, b, equal_nan=True) for a, b in zip(read_table(tmp_path, "compare")["sigma"], df["sigma"]))


def bad(folder, out, name, change):
    return rewrite(folder, out, change=lambda t: t) if name is None else _put(rewrite(folder, out), name, change)

def _put(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["before", "after"])
def test_weights_that_are_no_numbers(trio, tmp_path, value, side):
    def spoil(t):
        t[-1, -1] = value
        return t
    folder = bad(trio.rl.folder, tmp_path / "spoilt", "model.layers.1.mlp.down_proj.weight", spoil)
    pair = (str(folder), trio.rl) if side == "before" else (trio.rl, str(folder))
    with pytest.raises(UserError, match="spoilt/model.safetensors, parameter model.layers.1.mlp.down_proj.weight: 1 of 32,768 elements are NaN or infinite"): compare(*pair, out=tmp_path / "out")
    assert not (tmp_path / "out/compare.parquet").exists()


def test_quantised_weights_and_other_shapes(trio, tmp_path):
    folder = bad(trio.rl.folder, tmp_path / "int8", "model.layers.0.mlp.up_proj.weight", lambda t: (100 * t).to(torch.int8))
    with pytest.raises(UserError, match="int8/model.safetensors, parameter model.layers.0.mlp.up_proj.weight: dtype I8, quantised"): compare(trio.in_, str(folder))
    folder = bad(trio.rl.folder, tmp_path / "cut", "model.norm.weight", lambda t: t[:5].contiguous())
    for partial in (False, True):
        with pytest.raises(UserError, match=r"parameter norm.weight: shape \(128,\) in .*\(5,\) in .*cut"): compare(trio.in_, str(folder), partial=partial)


def test_bad_options(trio):
    for options, said in ((dict(spectra="some"), "spectra: 'some'.*all, top or none"), (dict(top=0), "top: 0"), (dict(convention="ours"), "convention: 'ours'")):
        with pytest.raises(UserError, match=said): compare(trio, **options)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device: 'cuda'.*no GPU"): compare(trio, device="cuda")


def test_shards_and_ties_make_no_difference(trio, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration
    sharded = tmp_path / "sharded"
    Qwen2_5_VLForConditionalGeneration.from_pretrained(trio.rl.folder).save_pretrained(sharded, max_shard_size="300KB")
    df = compare(trio.rl, str(sharded))  # a tokenizer is not asked for
    assert len(df) == 69 and (df["frobenius"] == 0).all() and (df["changed"] == 0).all()
    assert compare(trio.in_, str(sharded), step="RL-IN").drop(columns="sigma").equals(compare(trio.in_, trio.rl, step="RL-IN").drop(columns="sigma"))


def test_a_tied_head_compares_as_the_embeddings(trio, tmp_path):
    import json
    tied, untied = rewrite(trio.rl.folder, tmp_path / "tied", drop=["lm_head.weight"]), rewrite(trio.rl.folder, tmp_path / "untied")
    config = json.loads((tied / "config.json").read_text())
    for where in (config, config["text_config"]): where["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    _put(untied, "lm_head.weight", lambda t: load_file(untied / "model.safetensors")["model.embed_tokens.weight"].clone())
    assert len(compare(str(tied), str(tied))) == 68
    for pair in ((tied, untied), (untied, tied)):
        df = compare(*map(str, pair))
        assert len(df) == 69 and (df["frobenius"] == 0).all()


def reference_code(trio, folder_of):
    "The paper's numbers as its code takes them, from whole state dicts in float16: its selection, its arithmetic, its svd."
    from transformers import Qwen2_5_VLForConditionalGeneration
    base, in_, rl = (Qwen2_5_VLForConditionalGeneration.from_pretrained(folder_of(m), dtype=torch.float16).state_dict() for m in ("base", "in", "rl"))
    rows = {}
    for n in in_:
        if "weight" not in n or "norm" in n.lower() or not ("layers." in n or "blocks." in n or "merger" in n): continue
        for step, delta in (("IN-Base", in_[n] - base[n]), ("RL-IN", rl[n] - in_[n])):
            fro = torch.norm(delta.float()).item()
            rows[step, n] = dict(frobenius=fro, relative=fro / (torch.norm(in_[n].float()).item() + 1e-8), sigma=torch.linalg.svdvals(delta.float())[:50].numpy() if "down_proj" in n else None)
    return rows


def test_the_papers_code_is_reproduced(trio):
    from franken.weights import canonical
    df = compare(trio, convention="reference")
    want = reference_code(trio, lambda m: trio.members[m].folder)
    ours = {(r.step, r.parameter): r for r in df.itertuples()}
    assert {(s, canonical(n)) for s, n in want} == set(ours)
    for (step, n), row in want.items():
        got = ours[step, canonical(n)]
        assert np.isclose(got.frobenius, row["frobenius"], rtol=1e-5) and np.isclose(got.relative, row["relative"], rtol=1e-5)
        assert (got.sigma is None) == (row["sigma"] is None)
        if got.sigma is not None: assert len(got.sigma) == len(row["sigma"]) and np.allclose(np.nan_to_num(got.sigma), row["sigma"], rtol=1e-4, atol=1e-5 * row["sigma"].max())
    means = by_layer(df, "mean").query("step == 'RL-IN' and section == 'decoder' and layer == 2")
    layer = [r for (step, n), r in want.items() if step == "RL-IN" and "layers.2." in n]
    assert np.isclose(means["frobenius"].item(), np.mean([r["frobenius"] for r in layer]), rtol=1e-5) and np.isclose(means["relative"].item(), np.mean([r["relative"] for r in layer]), rtol=1e-5)

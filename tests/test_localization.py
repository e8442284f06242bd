"The localize table: scores as defined, intervals around them, and the same table however often the run was killed."
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, built, picture
from invented import invent

from franken import organism, plot, scenes, tables
from franken.errors import UserError
from franken.localization import Case, _wide, box_of, effects, gist, hits, iou, layer_rows, localize, paper_hit, peaks, profile, skip_batch, skip_cases, swap_batch, swap_cases, tabulate
from franken.regions import REGIONS, Regions
from franken.tables import SCHEMA, provenance, read_table
from franken.vlm import Prompt, Vlm

VFL = Path(os.environ.get("FRANKEN_VFL") or Path(__file__).resolve().parent.parent / "../shared/vfl")
LAYERS = 4
SMALL = dict(n=5, functions=["ocr", "recognition", "reasoning"], batch=3, max_new_tokens=4)

@pytest.fixture(scope="module")
def vlm():
    model = organism.build_model(LAYERS, seed=1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim == 2 else None
    return Vlm(model, organism.build_processor(), "base")

@pytest.fixture(scope="module")
def whole(vlm, tmp_path_factory):
    "A run of its own, (table, folder)."
    out = tmp_path_factory.mktemp("whole")
    return localize(vlm, out, **SMALL), out


# The table

def test_the_table(vlm, whole):
    df, out = whole
    pd.testing.assert_frame_equal(df, read_table(out, "localize"))
    assert list(df)[:len(SCHEMA["localize"])] == list(SCHEMA["localize"])
    assert len(df) == LAYERS * (2 * 3 + 3) and set(df.n) == {5} and set(df.region) == set(REGIONS)
    assert set(zip(df.probe, df["mode"])) == {("swap", "residual"), ("swap", "kv_from"), ("swap", "kv_at"), ("skip", "skip")}
    assert ((df.low <= df.rate) & (df.rate <= df.high)).all() and df.p.between(0, 1).all()
    assert (df.query("probe == 'swap'").floor == 0).all() and df.query("probe == 'skip'").floor.isna().all()
    assert df.query("probe == 'skip'").adopts.isna().all() and df.query("probe == 'swap'").adopts.notna().all()
    assert provenance(out, "localize")["fingerprints"] == {"base": vlm.fingerprint}

def test_outcomes_agree_with_the_rates(whole):
    df, out = whole
    outcomes, keys = read_table(out, "localize.outcomes"), ["model", "probe", "mode", "function", "layer"]
    assert len(outcomes) == 5 * len(df) and outcomes.groupby([*keys, "id"]).size().max() == 1
    pd.testing.assert_series_equal(outcomes.groupby(keys).hit.mean().astype(float), df.set_index(keys).rate.sort_index(), check_names=False)
    again = tabulate(outcomes, "thirds")
    pd.testing.assert_frame_equal(again, df[list(again)], check_dtype=False)

def test_residual_and_kv_from_are_one_function(whole):
    one, other = (whole[0].query("mode == @mode").drop(columns="mode").reset_index(drop=True) for mode in ("residual", "kv_from"))
    pd.testing.assert_frame_equal(one, other)
    assert not one.rate.equals(whole[0].query("mode == 'kv_at'").rate.reset_index(drop=True))

def test_at_layer_0_it_is_the_other_image_and_at_the_last_layer_one_is_all_that_is_left(vlm):
    cases = swap_cases("counting", 4)
    rows = swap_batch(vlm, cases, 4)
    clean, source = (vlm.generate([getattr(c, side) for c in cases], 4) for side in ("target", "source"))
    for row, c, s in zip(rows, clean, source):
        assert row["clean"] == row["again"] == c and row["said"]["residual"][0] == s
        assert row["said"]["kv_at"][-1] == row["said"]["kv_from"][-1]

def test_the_same_image_in_changes_nothing(vlm):
    cases = [replace(c, source=c.target, source_answer=c.answer) for c in swap_cases("ocr", 4)]
    df = localize(vlm, pairs=cases, probes=("swap",), max_new_tokens=4)
    assert len(df) == 3 * LAYERS and (df.rate == 0).all() and (df.floor == 0).all() and (df.p == 1).all()

def test_skip_of_no_layer_is_the_model_itself(vlm):
    rows = skip_batch(vlm, cases := skip_cases("reasoning", 3), 4)
    assert [r["clean"] for r in rows] == vlm.generate([c.target for c in cases], 4) and all(len(r["said"]["skip"]) == LAYERS for r in rows)


# Resuming

def test_twice_and_after_a_kill(vlm, whole, tmp_path):
    df, out = whole
    log, calls = (out / "localize.samples.jsonl").read_bytes(), []
    handle = vlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try: pd.testing.assert_frame_equal(localize(vlm, out, **SMALL), df)
    finally: handle.remove()
    assert not calls and (out / "localize.samples.jsonl").read_bytes() == log, "nothing runs twice"
    rows = lambda data: {r["key"]: r for r in map(json.loads, data.splitlines())}
    for cut in (len(log) // 3, len(log) - 40):  # in the middle of a line
        (part := tmp_path / f"cut{cut}").mkdir()
        (part / "localize.samples.jsonl").write_bytes(log[:cut])
        pd.testing.assert_frame_equal(localize(vlm, part, **SMALL), df)
        assert rows((part / "localize.samples.jsonl").read_bytes()) == rows(log)
        pd.testing.assert_frame_equal(read_table(part, "localize.outcomes"), read_table(out, "localize.outcomes"))

def test_samples_of_one_model_are_not_taken_for_anothers(vlm, tmp_path):
    some = dict(n=2, functions=["ocr"], probes=("swap",))
    localize(vlm, tmp_path, **some)
    other = Vlm(organism.build_model(LAYERS, seed=2), organism.build_processor(), "base")
    assert len((tmp_path / "localize.samples.jsonl").read_text().splitlines()) == 2
    fresh = localize(other, None, **some)
    pd.testing.assert_frame_equal(localize(other, tmp_path, **some)[list(fresh)], fresh, check_dtype=False)
    assert len((tmp_path / "localize.samples.jsonl").read_text().splitlines()) == 4

def test_several_models_in_one_table(vlm):
    df = localize({"a": vlm, "b": vlm}, n=2, functions=["ocr"], probes=("swap",), modes=("kv_at",))
    assert len(df) == 2 * LAYERS and set(df["mode"]) == {"kv_at"}


# Scores

def swapped(clean, said, again=None): return dict(clean=clean, again=again or clean, said=dict(residual=[said]))

def scored(rows, case): return layer_rows(pd.DataFrame([h for i, r in enumerate(rows) for h in hits(replace(case, id=str(i)), r)]), Regions.named("thirds", 6))[0]

def test_swap_scores():
    case, traced = Case("grounding", Prompt("where ?"), "a1", Prompt("where ?"), "b2"), "<think> x </think> <answer> b2 </answer>"
    got = scored([swapped(clean, said) for clean, said in (("a1", "b2"), ("a1", "c3"), ("a2", "a2"), ("a1", traced))], case)
    assert (got["rate"], got["paper_rate"], got["adopts"], got["clean_error"], got["floor"]) == (.75, .5, .5, .25, 0)

def test_skip_scores():
    rows = [dict(clean=clean, said=dict(skip=[said])) for clean, said in (("3", "3"), ("3", "4"), ("1", "3"))]
    got = scored(rows, Case("counting", Prompt("count ?"), "3"))
    assert got["rate"] == pytest.approx(1 / 3) == got["clean_error"] and np.isnan(got["adopts"]) and np.isnan(got["floor"]) and got["p"] == 1

def test_what_could_not_be_graded_is_missing_not_wrong():
    case = Case("reasoning", Prompt("?"), "3", right=lambda said: None if said == "?" else said == "3")
    rows = [dict(clean="3", said=dict(skip=[said])) for said in ("3", "4", "?", "?")]
    assert [h["hit"] for r in rows for h in hits(case, r)] == [False, True, None, None]
    got = scored(rows, case)
    assert got["n"] == 2 and got["rate"] == .5
    assert np.isnan((none := scored(rows[2:], case))["rate"]) and none["n"] == 0 and np.isnan(none["p"])

def test_p_compares_with_the_floor_on_the_same_cases():
    case = Case("ocr", Prompt("digit ?"), "1", Prompt("digit ?"), "2")
    p = lambda moved, changed, n=40: scored([swapped("1", "2" if i < changed else "1", "3" if i < moved else "1") for i in range(n)], case)["p"]
    assert p(0, 0) == p(20, 20) == 1 and p(0, 1) == 1 and p(0, 30) < 1e-6
    assert p(10, 30) > p(0, 30), "a high floor explains part of it"

def test_papers_rates():
    assert paper_hit("recognition", "yes", "No", "no") and not paper_hit("recognition", "yes", "3", "no")
    assert paper_hit("counting", "3", "4", "2") and not paper_hit("ocr", "3", "3", "2")
    assert paper_hit("grounding", "a1", "[16, 16, 32, 33]", "b2") and not paper_hit("grounding", "b1", "b1", "b2")

def test_iou():
    cells = [scenes.box(c) for c in scenes.CELLS]
    for i, a in enumerate(cells):
        for j, b in enumerate(cells): assert iou(a, b) == (i == j)
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7) and iou(None, (0, 0, 1, 1)) == 0
    assert box_of("red") is None and box_of("b2") == scenes.box("b2")


# Peaks and profiles

def outcomes(rates, mode="kv_at", n=60, floor=0., seed=0):
    "Outcomes of n cases with these rates a layer; in residual, those of a layer are among those of the layer before."
    draws = np.random.default_rng(seed).random((n, 1 if mode == "residual" else len(rates)))
    return pd.DataFrame([dict(model="base", probe="skip" if mode == "skip" else "swap", mode=mode, function="ocr", id=str(i), layer=layer, hit=int(draws[i, layer % draws.shape[1]] < rate), moved=i < floor * n, wrong=i < floor * n)
                         for layer, rate in enumerate(rates) for i in range(n)])

def test_a_peak_lies_in_its_interval():
    for seed in range(10):
        row = peaks(outcomes(np.random.default_rng(seed).random(6), seed=seed)).iloc[0]
        assert row.low <= row.peak <= row.high and row.n == 60
    sure, unsure = peaks(outcomes([0, .1, .9, .1])).iloc[0], peaks(outcomes([.5, .5, .5, .5])).iloc[0]
    assert (sure.peak, sure.low, sure.high) == (2, 2, 2) and unsure.low < unsure.high

def test_a_peak_of_a_swap_from_a_layer_on_is_where_the_rate_falls():
    row = peaks(found := outcomes([1, 1, .9, .1, 0], "residual")).iloc[0]
    rates = found.groupby("layer").hit.mean()
    assert row.peak == 2 and row.effect == pytest.approx(rates[2] - rates[3])
    assert effects(found).sum(axis=1).equals(_wide(found)[0]), "all falls together are the swap from layer 0 on"
    assert peaks(outcomes([.8, .8, .8], "residual")).iloc[0].peak == 2, "what is left at the end is read in the last layer"

def test_a_peak_is_measured_from_the_floor():
    found = outcomes([.2, .9, .2], "skip", floor=.5)
    assert peaks(found).iloc[0].effect == pytest.approx(found.groupby("layer").hit.mean()[1] - .5)
    assert peaks(outcomes([0, 0, 0])).empty and peaks(outcomes([.1, .2, .1], "skip", floor=.5)).empty

def test_a_profile_is_the_mean_of_a_regions_layers():
    found = outcomes([.1, .3, .9, .7, .2, .4])
    rates = found.groupby("layer").hit.mean()
    rows = profile(found).set_index("region")
    assert np.allclose(rows.rate[list(REGIONS)], rates.to_numpy().reshape(3, 2).mean(1))
    assert ((rows.low <= rows.rate) & (rows.rate <= rows.high)).all() and set(rows.n) == {60}
    assert (profile(outcomes([1, 1, 1])).low < 1).all() and (profile(outcomes([0, 0, 0])).high > 0).all(), "sixty cases that agree are still sixty cases"
    assert np.allclose(profile(found, (1, 5)).rate, [rates[0], rates[1:5].mean(), rates[5]])


# Cases from elsewhere

def test_own_cases(vlm):
    picture = [scenes.image(p.question.scene) for p in scenes.pairs("ocr", 2, 0)]
    mine = [Case("smell", Prompt("digit a1 ?", picture[0]), "3", Prompt("digit a1 ?", picture[1]), "4")]
    df = localize(vlm, pairs=mine, questions=mine, max_new_tokens=4, parse=str.upper)
    assert set(df.function) == {"smell"} and len(df) == 4 * LAYERS and set(df.n) == {1}
    assert len(localize(vlm, pairs=mine, probes=("swap",), functions=["smell"], modes=("kv_from",), max_new_tokens=4)) == LAYERS

def test_drawn_pairs_for_a_model_that_does_not_know_our_words():
    df = localize(built("qwen2_5_vl"), pairs="drawn", n=2, max_new_tokens=3)
    assert set(df.function) == {"recognition", "ocr", "counting", "grounding"} and set(df.probe) == {"swap"} and set(df.n) == {2} and (df.floor == 0).all()
    same = localize(built("qwen2_5_vl"), n=2, max_new_tokens=3, probes=("swap",))
    pd.testing.assert_frame_equal(same, df)

def pair_folder(root, sizes):
    "One counting pair as the reference data set has it, its images of these sizes."
    (folder := root / "counting").mkdir(parents=True)
    for seed, (side, size) in enumerate(sizes.items()): picture(seed, *size).save(folder / f"{side}.png")
    row = dict(id="c0", task="counting", prompt="<image>how many ?", target_image="target.png", source_image="source.png", meta=dict(target_answer="1", source_answer="2"))
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return root

def test_a_folder_of_pairs(tmp_path):
    vlm, some = built("qwen2_5_vl"), dict(max_new_tokens=3, modes=("kv_at",))
    df = localize(vlm, pairs=pair_folder(tmp_path / "equal", dict(target=(32, 32), source=(32, 32))), **some)
    assert set(df.function) == {"counting"} and set(df.probe) == {"swap"} and set(df.n) == {1}
    odd = str(pair_folder(tmp_path / "odd", dict(target=(32, 32), source=(64, 32))))
    with pytest.raises(UserError, match="visual tokens.*resize"): localize(vlm, pairs=odd, **some)
    assert len(localize(vlm, pairs=odd, resize="source", **some)) == vlm.n_layers

@pytest.mark.skipif(not VFL.is_dir(), reason="the sample of the paper's pairs is not here")
@pytest.mark.filterwarnings("ignore:sweep")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_pairs_on_each_family(family):
    df = localize(built(family), pairs=VFL, n=1, functions=["counting", "grounding"], resize="source", max_new_tokens=3)
    rate = df.set_index(["mode", "function", "layer"]).rate
    assert len(rate) == 3 * 2 * built(family).n_layers and rate["residual"].equals(rate["kv_from"]) and (df.floor == 0).all()

def test_user_errors(vlm):
    with pytest.raises(UserError, match="functions.*smell"): localize(vlm, functions=["smell"])
    with pytest.raises(UserError, match="probes.*poke"): localize(vlm, probes=("poke",))
    with pytest.raises(UserError, match="modes.*sideways"): localize(vlm, modes=("sideways",))
    with pytest.raises(UserError, match="resize.*target"): localize(vlm, resize="target")
    with pytest.raises(UserError, match="functions.*reasoning"): localize(vlm, functions=["reasoning"], probes=("swap",))
    with pytest.raises(UserError, match="no such folder"): localize(vlm, pairs="nowhere")


# Figures

def test_a_figure_has_one_column_for_what_is_one_function(whole):
    df = whole[0]
    assert list(plot.panels(df)) == ["residual", "kv_at", "skip"]
    other = df.assign(rate=df.rate.where(df["mode"] != "kv_from", 1 - df.rate))
    assert list(plot.panels(other)) == ["residual", "kv_from", "kv_at", "skip"]
    assert len(plot.localize(df, peaks(read_table(whole[1], "localize.outcomes"))).axes) == 3

def test_a_skip_is_drawn_for_the_first_model_that_can():
    df = invent()["localize"]  # there, Base can see and not reason
    drawn = plot.whose(df.query("probe == 'skip'"))
    assert drawn["reasoning"] == "rl" and drawn["ocr"] == "base"
    assert set(plot.whose(df.query("probe == 'skip' and model == 'base'")).values()) == {"base"} == set(plot.whose(df.query("probe == 'swap'")).values())

def test_a_sample_as_a_picture():
    case = swap_cases("ocr", 1)[0]
    fig = plot.sample(dict(residual=[case.source_answer] * 2 + [case.answer] * 2, kv_at=[case.answer, "seven", "", case.answer]), case, case.answer)
    right = fig.axes[2]
    assert len(right.patches) == 6 and [t.get_text() for t in right.texts][:2] == [case.source_answer, case.answer]
    assert len({p.get_facecolor() for p in right.patches}) == 3

def test_a_skip_as_a_picture():
    said = dict(whole="it is 4", without_0="", without_1="it is 5 " * 40)
    shown = [plot.skipped(said, "2 + 2 ?", lambda answer: "4" in answer, image) for image in (None, swap_cases("ocr", 1)[0].target.image)]
    assert [len(fig.axes) for fig in shown] == [1, 2]
    for fig in shown:
        fields = fig.axes[-1]
        colors = [p.get_facecolor() for p in fields.patches]
        assert colors[0] != colors[1] == colors[2] and fields.texts[1].get_text() == "(nothing)" and fields.texts[2].get_text().endswith("…")


def test_a_peak_does_not_hear_its_neighbours():
    outcomes = tables.stored("organism")["localize.outcomes"].query("model == 'base' and mode == 'residual'")
    together = peaks(outcomes, draws=200).set_index("function")
    for function in ("ocr", "relation"): assert peaks(outcomes.query("function == @function"), draws=200).set_index("function").loc[function].equals(together.loc[function])

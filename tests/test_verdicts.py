"The verdicts say yes where a claim was built in, no where its opposite was, and nothing where nothing was measured."
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from invented import invent

from franken import paper, tables
from franken.regions import REGIONS
from franken.stats import mean_ci, paired, share
from franken.verdicts import CLAIMS, DEEP, c7, claims, contrast, judge, matrices, outcomes, rule, runs, steepness, verdicts

NEEDS = dict(C1="abilities", C2="attend", C3="localize", C4="compare", C5="compare", C6="graft", C7="freeze")
FUNCTIONS = ("recognition", "ocr", "counting", "grounding")

def of(table, claim): return table.set_index("claim").loc[claim]

def judged(claim, *there): return SimpleNamespace(**judge(next(c for c in CLAIMS if c.id == claim), *there))

def sums(df, by, value, names=("score", "low", "high")):
    rows = [dict(zip(by, k)) | dict(n=g[value].notna().sum(), **dict(zip(names, share(g[value].sum(), g[value].notna().sum())))) for k, g in df.groupby(by)]
    return pd.DataFrame(rows)

def asked(seed=0, n=150, effect=1.):
    "Tables and outcomes of a six-layer trio in which all seven claims hold, or with effect = 0 nothing differs from anything. The same questions are hard for all."
    rng, t = np.random.default_rng(seed), {}
    def right(p, hard): return ((hard < .4 + effect * (p - .4)) ^ (rng.random(n) < .02)).astype(int)
    up, ids, rows = dict(base=.2, rl=.75, **{"in": .45}), [f"{i:04}" for i in range(n)], []
    for ability in ("vision", *DEEP):
        hard, black = rng.random(n), rng.random(n) < .05
        for m, p in up.items():
            x = right(p, hard)
            cells = dict(vision=dict(image=x, black=(black | (rng.random(n) < (m == "rl") * .6 * effect)) & x), vision_to_reasoning=dict(image=x, described=x), reasoning=dict(text=x))[ability]
            rows.append(pd.DataFrame(dict.fromkeys(("image", "black", "described", "text")) | dict(model=m, ability=ability, id=ids) | cells))
    o = t["abilities.outcomes"] = pd.concat(rows, ignore_index=True).astype(dict.fromkeys(("image", "black", "described", "text"), "Int64"))
    value = np.where(o.ability == "vision", o.image * (1 - o.black), np.where(o.ability == "reasoning", o.text, o.image))
    t["abilities"] = pd.concat([sums(o.assign(v=value), ["model", "ability"], "v"), sums(o.assign(v=o.image.fillna(o.text), ability="overall"), ["model", "ability"], "v")])
    mass = rng.normal(.15, .05, n)
    seen = t["attend.outcomes"] = pd.concat([pd.DataFrame(dict(model=m, trace="own", id=ids, layer=l, mass=mass + effect * .03 * (m == "rl" and l > 1) + rng.normal(0, .003, n))) for m in ("in", "rl") for l in range(6)])
    rise = seen.pivot(index=["layer", "id"], columns="model", values="mass").eval("rl - `in`")
    t["attend"] = pd.DataFrame([dict(model="rl", trace="own", layer=l, region=REGIONS[l // 2], n=n, n_both=n, mass=.15, mean=.1, low=.1, high=.2, **dict(zip(("over_in", "over_in_low", "over_in_high"), mean_ci(rise[l])))) for l in range(6)])
    curve = {("swap", "residual", "recognition"): (1, .95, .1, .05, 0, 0), ("skip", "skip", "reasoning"): (.3, .3, .3, .3, .8, .8)} | {("swap", "residual", f): (1, 1, .9, .4, .05, 0) for f in FUNCTIONS[1:]}
    hards = {k: rng.random(n) for k in curve}
    hit = t["localize.outcomes"] = pd.concat([pd.DataFrame(dict(model="base", probe=k[0], mode=k[1], function=k[2], layer=l, id=ids, hit=right(effect * y + (1 - effect) * .4 * (k[0] == "skip"), hards[k]) * (effect > 0 or k[0] == "skip")))
                                               for k, ys in curve.items() for l, y in enumerate(ys)])
    t["localize"] = sums(hit, ["model", "probe", "mode", "function", "layer"], "hit", ("rate", "low", "high")).assign(region=lambda d: [REGIONS[l // 2] for l in d.layer], clean_error=.2)
    hards = {a: rng.random(n) for a in DEEP}
    gr = t["graft.outcomes"] = pd.concat([pd.DataFrame(dict(early=e, mid=m, late=l, rest="in", ability=a, id=ids, correct=right(.4 + .2 * (m == "rl") + .2 * (l == "rl"), hards[a])))
                                           for a in DEEP for e in ("in", "rl") for m in ("in", "rl") for l in ("in", "rl")])
    t["graft"] = sums(gr, ["early", "mid", "late", "rest", "ability"], "correct")
    updates = [(s, l, stem, effect * .6 * (l // 2 == 1), .1 + effect * .2 * (s == "RL-IN")) for s in ("IN-Base", "RL-IN") for l in range(6) for stem in "qkvogud"]
    noise = {(l, stem): rng.uniform(.98, 1.02) if effect else 1. for l in range(6) for stem in "qkvogud"}
    t["compare"] = pd.DataFrame([dict(step=s, parameter=f"decoder.layers.{l}.{stem}.weight", section="decoder", kind="mlp", layer=l, region=REGIONS[l // 2], rows=20, cols=20, frobenius=(1 + more) * noise[l, stem],
                                      sigma=np.exp(-decay * noise[l, stem] * np.arange(20))) for s, l, stem, more, decay in updates])
    level = dict(all=.4, none=.8, early=.8, late=.45)
    t["freeze"] = pd.DataFrame([dict(frozen=f, recipe="grpo", seed=s, ability=a, n=n, score=.4 + effect * (p - .4 + .005 * s)) for f, p in level.items() for a in DEEP for s in range(3)])
    return t

def bare(t): return {k: v for k, v in t.items() if not k.endswith(".outcomes")}

def test_nothing_measured_nothing_said():
    v = verdicts({})
    assert list(v.claim) == [f"C{i}" for i in range(1, 8)] and set(v.verdict) == {"not tested"}
    assert v[["estimate", "low", "high", "n"]].isna().all().all() and (v.seeds == 0).all()

@pytest.mark.parametrize("claim", NEEDS)
def test_a_missing_table_leaves_only_its_claims_untested(claim):
    t = invent()
    del t[NEEDS[claim]]
    v = verdicts(t)
    assert set(v.claim[v.verdict == "not tested"]) == {c for c, need in NEEDS.items() if need == NEEDS[claim]} and NEEDS[claim] in of(v, claim).why

def test_it_is_a_table_of_the_contract(tmp_path):
    v = verdicts(invent(), [invent(1)])
    tables.write_table(v, tmp_path, "verdicts")
    pd.testing.assert_frame_equal(tables.read_table(tmp_path, "verdicts")[list(tables.SCHEMA["verdicts"])], v[list(tables.SCHEMA["verdicts"])])

@pytest.mark.parametrize("seed", range(5))
def test_an_estimate_lies_in_its_interval(seed):
    v = verdicts(invent(seed))
    assert (v.low <= v.estimate).all() and (v.estimate <= v.high).all()

def test_the_rule():
    assert rule(.1, .3, [.2]) == "supported" and rule(-.3, -.1, [-.2]) == "contradicted" and rule(-.1, .3, [.1]) == "not supported"
    assert rule(.1, .3, [.2, .1, -.01]) == "not supported" and rule(-.3, -.1, [-.2, .1]) == "not supported"  # trios disagree

def test_other_trios_count_and_can_take_support_away():
    t = invent()
    assert judged("C2", t).verdict == "supported" and judged("C2", t).seeds == 1
    flipped = t["attend"].copy()
    flipped[["over_in", "over_in_low", "over_in_high"]] *= -1
    v = verdicts(t, [invent(1), t | dict(attend=flipped)])
    assert of(v, "C2").seeds == 3 and of(v, "C2").verdict == "not supported" and len(of(v, "C2").across) == 3
    assert judged("C2", t, [{}]).seeds == 1  # a trio without the table does not count

def swapped(t, name, column, values): return t | {name: t[name].assign(**{column: t[name][column].replace(values)})}

def test_c5_changes_sign_with_the_updates():
    t = invent()
    back = swapped(t, "compare", "step", {"IN-Base": "RL-IN", "RL-IN": "IN-Base"})
    assert judged("C5", t).estimate == pytest.approx(-judged("C5", back).estimate)

def test_c4_is_zero_for_a_flat_update_and_one_for_a_doubled_mid():
    t = invent()
    flat = t["compare"].assign(frobenius=1.)
    doubled = flat.assign(frobenius=np.where(flat.region == "mid", 2., 1.))
    assert judged("C4", t | dict(compare=flat)).estimate == 0
    assert judged("C4", t | dict(compare=doubled)).estimate == pytest.approx(1)

def test_c5_leaves_out_what_did_not_move():
    t = invent()
    df = t["compare"]
    still = df.parameter.str.contains("q_proj")
    df = df.assign(sigma=[[0.] * 64 if s else x for s, x in zip(still, df.sigma)])
    assert steepness(matrices(dict(compare=df))).slope.isna().sum() == still.sum()
    assert judged("C5", t | dict(compare=df)).n == judged("C5", t).n * 6 // 7

def test_c6_needs_the_gain_to_sit_where_the_paper_says():
    t = invent()
    def built(score):
        g = t["graft"].copy()
        g["score"] = [score(r.early == "rl", r.mid == "rl", r.late == "rl") for r in g.itertuples()]
        return judged("C6", t | dict(graft=g.assign(low=g.score - .02, high=g.score + .02))).verdict
    assert built(lambda e, m, l: .4 + .2 * m + .2 * l) == "supported"
    assert built(lambda e, m, l: .4 + .4 * e) == "contradicted"
    assert built(lambda e, m, l: .8 if e or m or l else .4) == "not supported"  # a switch that any region throws
    assert built(lambda e, m, l: .4) == "not supported"  # no gain, nothing to keep

def test_c7_without_a_cold_start_in_the_table_takes_the_one_of_abilities():
    t = invent()
    t["freeze"] = t["freeze"][t["freeze"].frozen != "all"]
    assert judged("C7", t).verdict != "not tested"
    assert judged("C7", {"freeze": t["freeze"]}).verdict == "not tested"

def test_c3_asks_the_first_model_that_reasons():
    t = invent()
    only_base = t | dict(localize=t["localize"][t["localize"].model == "base"])
    assert judged("C3", t).verdict != "not tested"
    assert "reasoning" in judged("C3", only_base).why
    able = only_base["localize"].assign(clean_error=.1)
    assert judged("C3", dict(localize=able)).verdict != "not tested"

def test_every_claim_is_data():
    assert len(claims()) == 7 and claims().notna().all().all()
    for c in CLAIMS: assert c.statement.endswith(".") and c.rule.endswith(".") and c.paper and c.quantity

def test_the_numbers_of_the_paper_are_those_of_its_tables():
    for trio in paper.TABLE_2:
        g = paper.graft(trio).set_index([*REGIONS, "ability"]).score * 100
        for a in DEEP: assert " / ".join(f"{g[(*name.split(':'), a)]:.0f}" for name in ("in:in:in", "in:rl:rl", "rl:rl:rl", "rl:in:in")) in CLAIMS[5].paper
    f = paper.freeze().set_index(["frozen", "ability"]).score * 100
    for a in DEEP: assert " / ".join(f"{f[frozen, a]:.0f}" for frozen in ("all", "none", "early", "late")) in CLAIMS[6].paper

@pytest.fixture(scope="module")
def trios(): return [asked(seed) for seed in range(3)]

def test_what_was_planted_is_found_by_either_way(trios):
    for there in (trios, [bare(t) for t in trios]):
        v = verdicts(there[0], there[1:])
        assert set(v.verdict) == {"supported"} and (v.seeds == 3).all()
    assert (verdicts(trios[0]).how == ["paired"] * 6 + ["unpaired"]).all()

def test_pairing_keeps_the_estimate_and_narrows_the_interval(trios):
    with_, without = verdicts(trios[0]), verdicts(bare(trios[0]))
    assert with_.estimate.to_numpy(float) == pytest.approx(without.estimate.to_numpy(float)) and with_.n.tolist() == without.n.tolist()
    for claim in ("C1", "C3", "C6"): assert of(with_, claim).low > of(without, claim).low

@pytest.mark.parametrize("seed", range(2))
def test_where_nothing_differs_nothing_is_supported(seed):
    t = [asked(seed + 10 * k, effect=0.) for k in range(3)]
    for there in (t, [bare(x) for x in t]): assert "supported" not in set(verdicts(there[0], there[1:]).verdict)

def test_one_gain_of_one_trio_is_the_paired_gain(trios):
    o = trios[0]["abilities.outcomes"].query("ability == 'reasoning'").pivot(index="id", columns="model", values="text").astype(float)
    found = contrast(trios[0], "abilities", (1, dict(ability="reasoning", model="rl")), (-1, dict(ability="reasoning", model="in")))
    assert found.interval == tuple(paired(o["in"], o.rl)[k] for k in ("gain", "low", "high"))

def test_the_order_of_questions_does_not_matter(trios):
    shuffled = {k: v.sample(frac=1, random_state=1) if k.endswith(".outcomes") else v for k, v in trios[0].items()}
    pd.testing.assert_frame_equal(verdicts(shuffled, trios[1:2]), verdicts(trios[0], trios[1:2]))

def test_an_ungraded_answer_drops_its_question_and_is_not_wrong(trios):
    o = trios[0]["abilities.outcomes"].copy()
    o.loc[(o.model == "rl") & (o.ability == "reasoning") & (o.id < "0010"), "text"] = pd.NA
    o.loc[(o.model == "rl") & (o.ability == "vision") & (o.id < "0010"), "black"] = pd.NA
    for ability in ("reasoning", "vision"):
        gain = (1, dict(model="rl", ability=ability)), (-1, dict(model="in", ability=ability))
        left, whole = (contrast(trios[0] | {"abilities.outcomes": x}, "abilities", *gain) for x in (o, o[o.id >= "0010"]))
        assert left.n == 140 and left.estimate == whole.estimate

def test_a_layer_that_was_not_measured_is_not_zero(trios):
    seen = trios[0]["attend.outcomes"].copy()
    seen.loc[seen.id < "0010", "mass"] = math.nan  # no trace
    assert judged("C2", trios[0] | {"attend.outcomes": seen}).n == 140
    value = outcomes(trios[0] | {"attend.outcomes": seen}, "attend").set_index("id").value
    assert value["0003"].isna().all() and value["0100"].notna().all()

def test_outcomes_of_other_models_leave_the_table(trios):
    o = trios[0]["abilities.outcomes"]
    v, without = (verdicts(t) for t in (trios[0] | {"abilities.outcomes": o[o.model == "base"]}, bare(trios[0])))
    assert of(v, "C1").how == "unpaired" and of(v, "C1").low == of(without, "C1").low

@pytest.mark.parametrize("model", ["base", "in", "rl"])
def test_a_missing_member_is_said(trios, model):
    without = {k: v[v.model != model] if "model" in v else v for k, v in trios[0].items()}
    v = verdicts(without)
    assert of(v, "C1").verdict == "not tested" and f"model {model}" in of(v, "C1").why
    assert of(v, "C3").verdict == ("not tested" if model == "base" else "supported") and of(v, "C2").verdict == ("not tested" if model == "rl" else "supported")

def test_a_run_is_compared_with_its_own_cold_start():
    levels = [dict(all=.2, none=.6, early=.6, late=.25), dict(all=.5, none=.9, early=.9, late=.55)]
    df = pd.DataFrame([dict(frozen=f, recipe="grpo", seed=s, trio=f"t{s}", ability=a, n=500, score=p) for s, at in enumerate(levels) for f, p in at.items() for a in DEEP])
    found = runs(dict(freeze=df))
    assert len(found) == 2 and judged("C7", dict(freeze=df)).across == pytest.approx([.15, .15])
    once = df[(df.frozen != "all") | (df.seed == 0)].assign(trio="one")  # IN measured once, trained twice
    assert [r["freeze"].query("frozen == 'all'").score.tolist() for r in runs(dict(freeze=once))] == [[.2, .2]] * 2
    torn = df[(df.frozen != "late") | (df.seed == 0)]
    assert judged("C7", dict(freeze=torn)).seeds == 1
    assert "Late frozen" in judged("C7", dict(freeze=df[df.frozen != "late"])).why

def test_c7_of_other_abilities_is_the_same_rule():
    t = dict(freeze=pd.DataFrame([dict(frozen=f, recipe="grpo", seed=s, ability=a, n=500, score=x + .01 * s) for f, x in dict(all=.4, none=.8, early=.8, late=.45).items() for a in DEEP for s in (0, 1)]))
    renamed = dict(freeze=t["freeze"].assign(ability=t["freeze"].ability.map(dict(zip(DEEP, ("faint", "large"))))))
    asked = replace(next(c for c in CLAIMS if c.id == "C7"), parts=partial(c7, abilities=("faint", "large")), witnesses=partial(runs, abilities=("faint", "large")))
    found, usual = judge(asked, renamed), judged("C7", t)
    assert found["across"] == usual.across and (found["low"], found["high"], found["verdict"]) == (usual.low, usual.high, usual.verdict)
    assert judge(asked, t)["verdict"] == "not tested"

def test_what_can_not_be_is_cut_off_and_changes_no_verdict():
    given = tables.stored(), [tables.stored(name) for name in tables.siblings()]
    for claim in CLAIMS:
        cut, uncut = judge(claim, *given), judge(replace(claim, limits=(-math.inf, math.inf)), *given)
        assert cut["verdict"] == uncut["verdict"] and claim.limits[0] <= cut["low"] <= cut["estimate"] <= cut["high"] <= claim.limits[1]
        assert uncut["low"] <= cut["low"] and cut["high"] <= uncut["high"]

def test_every_claim_is_reached_from_the_stored_tables():
    v = verdicts(tables.stored(), [tables.stored(name) for name in tables.siblings()])
    assert "not tested" not in set(v.verdict) and (v.seeds >= 2).all() and (v.why == "").all()

def test_a_swap_at_one_layer_only_is_read_without_differences(trios):
    layer = {0: .6, 1: .5, 2: .4, 3: .3, 4: .1, 5: .1}
    rows = [dict(model="base", probe="swap", mode="kv_at", function=f, layer=l, region=REGIONS[l // 2], n=400, clean_error=.2, **dict(zip(("rate", "low", "high"), share(400 * p, 400)))) for f in FUNCTIONS for l, p in layer.items()]
    t = trios[0]["localize"]
    v = judged("C3", dict(localize=pd.concat([t[t.probe == "skip"], pd.DataFrame(rows)])))
    assert v.verdict == "supported" and v.estimate == pytest.approx(.2)  # recognition, Early less Mid

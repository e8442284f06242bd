"The verdicts say yes where a claim was built in, no where its opposite was, and nothing where nothing was measured."
import numpy as np
import pandas as pd
import pytest
from invented import invent

from franken import tables
from franken.verdicts import CLAIMS, matrices, rule, steepness, verdicts

NEEDS = dict(C1="abilities", C2="attend", C3="localize", C4="compare", C5="compare", C6="graft", C7="freeze")

def of(table, claim): return table.set_index("claim").loc[claim]

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
    assert of(verdicts(t), "C2").verdict == "supported" and of(verdicts(t), "C2").seeds == 1
    flipped = t["attend"].copy()
    flipped[["over_in", "over_in_low", "over_in_high"]] *= -1
    v = verdicts(t, [invent(1), t | dict(attend=flipped)])
    assert of(v, "C2").seeds == 3 and of(v, "C2").verdict == "not supported" and len(of(v, "C2").across) == 3
    assert of(verdicts(t, [{}]), "C2").seeds == 1  # a trio without the table does not count

def swapped(t, name, column, values): return t | {name: t[name].assign(**{column: t[name][column].replace(values)})}

def test_c5_changes_sign_with_the_updates():
    t = invent()
    back = swapped(t, "compare", "step", {"IN-Base": "RL-IN", "RL-IN": "IN-Base"})
    assert of(verdicts(t), "C5").estimate == pytest.approx(-of(verdicts(back), "C5").estimate)

def test_c4_is_zero_for_a_flat_update_and_one_for_a_doubled_mid():
    t = invent()
    flat = t["compare"].assign(frobenius=1.)
    doubled = flat.assign(frobenius=np.where(flat.region == "mid", 2., 1.))
    assert of(verdicts(t | dict(compare=flat)), "C4").estimate == 0
    assert of(verdicts(t | dict(compare=doubled)), "C4").estimate == pytest.approx(1)

def test_c5_leaves_out_what_did_not_move():
    t = invent()
    df = t["compare"]
    still = df.parameter.str.contains("q_proj")
    df = df.assign(sigma=[[0.] * 64 if s else x for s, x in zip(still, df.sigma)])
    assert steepness(matrices(dict(compare=df))).slope.isna().sum() == still.sum()
    assert of(verdicts(t | dict(compare=df)), "C5").n == of(verdicts(t), "C5").n * 6 // 7

def test_c6_needs_the_gain_to_sit_where_the_paper_says():
    t = invent()
    def built(score):
        g = t["graft"].copy()
        g["score"] = [score(r.early == "rl", r.mid == "rl", r.late == "rl") for r in g.itertuples()]
        return of(verdicts(t | dict(graft=g.assign(low=g.score - .02, high=g.score + .02))), "C6").verdict
    assert built(lambda e, m, l: .4 + .2 * m + .2 * l) == "supported"
    assert built(lambda e, m, l: .4 + .4 * e) == "contradicted"
    assert built(lambda e, m, l: .8 if e or m or l else .4) == "not supported"  # a switch that any region throws
    assert built(lambda e, m, l: .4) == "not supported"  # no gain, nothing to keep

def test_c7_without_a_cold_start_in_the_table_takes_the_one_of_abilities():
    t = invent()
    t["freeze"] = t["freeze"][t["freeze"].frozen != "all"]
    assert of(verdicts(t), "C7").verdict != "not tested"
    assert of(verdicts({"freeze": t["freeze"]}), "C7").verdict == "not tested"

def test_c3_asks_the_first_model_that_reasons():
    t = invent()
    only_base = t | dict(localize=t["localize"][t["localize"].model == "base"])
    assert of(verdicts(t), "C3").verdict != "not tested"
    assert "reasoning" in of(verdicts(only_base), "C3").why
    able = only_base["localize"].assign(clean_error=.1)
    assert of(verdicts(dict(localize=able)), "C3").verdict != "not tested"

def test_every_claim_says_what_it_measures(): assert all(c.statement.endswith(".") and c.quantity for c in CLAIMS)

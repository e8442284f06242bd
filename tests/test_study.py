"Many runs: complete grids, partners in every condition, folders that resume, tables that say what the runs did."
from dataclasses import asdict, replace

import pandas as pd
import pytest

from franken import plot, study, tables, upbringing
from franken.errors import UserError
from franken.study import Run


def test_every_run_has_a_partner_in_every_condition():
    for name, runs in study.STUDIES.items():
        condition = lambda r: (r.family, replace(r, start="", seed=0))
        conditions = {condition(r) for r in runs}
        partners = [{(q.start[len(q.family):], q.seed) for q in runs if condition(q) == c} for c in conditions]
        assert all(p == partners[0] for p in partners) and len(partners[0]) == 6 and len(runs) == 6 * len(conditions), name


def test_a_name_is_a_run():
    runs = study.find_study("all")
    assert len({r.name for r in runs}) == len(set(runs)) == len(runs)


def test_a_run_practises_what_it_says():
    assert Run("organism-0", 10).practice == upbringing.LIVES["organism"].rl
    faint = Run("organism-refine-1", 1, lesson="faint", goal="steps", reuse=2).practice
    assert [w.ink for w, _ in faint.worlds] == [.4] and faint.goal == "steps" and faint.reuse == 2 and faint.mix == (1, 9, 0)


@pytest.mark.parametrize("call", [lambda out: study.find_study("freeze"), lambda out: study.conduct("lessons", out, "3"), lambda out: study.conduct("lessons", out, "1/0"), lambda out: study.conduct("lessons", out, "3/2"), lambda out: study.conduct("lessons", out, only="["), lambda out: study.conduct("lessons", out, only="nowhere"), lambda out: study.collect(out)])
def test_bad_input_is_refused(call, tmp_path):
    with pytest.raises(UserError): call(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch):
    "Studies of two runs, of two updates."
    short = {name: replace(life, rl=replace(life.rl, steps=2, prompts=2, rollouts=4, warmup=1)) for name, life in upbringing.LIVES.items()}
    monkeypatch.setattr(study, "LIVES", short)
    monkeypatch.setattr(study, "FEW", dict(scores=6, abilities=6, attend=4, graft=4, reflect=4))
    monkeypatch.setattr(study, "STUDIES", {"small": [Run("organism", 2, "dapo", reuse=2), Run("organism", 2, "dapo", "late", reuse=2)]})


def test_a_study_is_done_once_and_told(small, tmp_path):
    study.conduct("small", tmp_path, "1/2")
    assert study.done(study.STUDIES["small"][0], tmp_path) and not study.done(study.STUDIES["small"][1], tmp_path)
    study.conduct("small", tmp_path)
    model = (tmp_path / "organism" / "dapo-none-x2-2" / "model" / "model.safetensors")
    written = model.stat().st_mtime_ns
    study.conduct("small", tmp_path)
    assert model.stat().st_mtime_ns == written
    found = study.collect(tmp_path, "small")
    assert set(found) == set(tables.STUDIES) and all(len(t) for n, t in found.items() if n not in ("study.curves", "study.reflections"))
    matched = found["study.matched"]
    assert set(matched.frozen) == {"late"} and (matched.alpha < 1).all() and {"vision_to_reasoning", "reasoning"} <= set(matched.ability)
    changes = found["study.changes"].set_index(["frozen", "region"]).frobenius
    assert changes["late", "late"] == 0 < changes["late", "early"] and changes["none", "late"] > 0
    assert set(found["study.scores"].frozen) == {"none", "late", "all"} and {"C4", "C5"} <= set(found["study.claims"].claim)
    credit = found["study.credit"].query("frozen == 'late' and player == 'late'").value
    assert len(credit) and (credit == 0).all()  # what did not move has no credit
    assert not list(tmp_path.rglob("state")) and len(pd.read_parquet(tmp_path / "organism" / "in.scores.parquet")) == 4


def test_where_judging_was_taught_reflection_is_measured(small, tmp_path):
    model = study.load_trio("organism").in_.folder
    study.examine(Run("organism-judging", 2, "spark"), model, tmp_path)
    found = pd.read_parquet(tmp_path / "reflections.parquet").set_index("ability")
    assert list(found.index) == ["vision_to_reasoning", "reasoning"] and (found.n == 4).all()
    assert found.drop(columns="rounds").apply(lambda c: c.dropna().between(0, 1 if c.name != "n" else 4).all()).all()
    # the organism's own IN was never taught to judge: it gives no verdict, and so nothing is asked again
    assert (found["judged"] == 0).all() and (found["rounds"] == 0).all() and (found["first"] == found["final"]).all()


def told(runs, value, weights="w"):
    "The tables of runs, as `collect` makes them."
    starts = {r.start for r in runs}
    rows = pd.DataFrame([asdict(r) | dict(world="organism", ability=a, n=1, score=value, low=0., high=1., faithful=1., explained=1.) for r in runs for a in ("vision_to_reasoning", "reasoning")])
    return {"study.scores": rows, "study.claims": rows.assign(claim="C0", estimate=value), "study.starts": pd.DataFrame([dict(start=s, fingerprint=weights) for s in sorted(starts)])}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    "A folder of stored results of its own, and `keep`: what is collected is stored there."
    monkeypatch.setattr(study, "results", lambda: tmp_path)
    def keep(*given):
        monkeypatch.setattr(study, "collect", lambda out: told(*given))
        study.store(tmp_path / "runs")
        return tables.load(tmp_path)
    return keep


def test_stored_runs_stay_beside_new_ones(kept):
    run = lambda seed: Run("organism-refine", seed)
    kept([run(2), run(12)], 0.)
    found = kept([run(12), run(22)], 1.)
    assert found["study.claims"].groupby("seed").estimate.agg(["first", "size"]).to_dict("index") == {2: dict(first=0, size=2), 12: dict(first=1, size=2), 22: dict(first=1, size=2)}
    assert "freeze" not in found


def test_a_run_that_is_done_again_leaves_nothing_of_the_old_one(kept, monkeypatch):
    older = told([Run("organism", 2, frozen="late")], 0.)
    newer = told([Run("organism", 2, frozen="late")], 1.)
    newer["study.claims"] = newer["study.claims"].head(0)
    assert study.joined(newer, older)["study.claims"].empty


def test_runs_from_other_weights_are_not_mixed(kept):
    kept([Run("organism-0", 0)], 0., "one")
    with pytest.raises(UserError, match="organism-0.*other"): kept([Run("organism-0", 10)], 1., "other")


def test_the_table_of_freezing_is_written_when_all_its_runs_are_there(kept):
    runs = study.STUDIES["freezing"] + [study.unlearned(r) for r in study.STUDIES["freezing"][::4][:3]]
    assert len({(r.start, r.seed, r.frozen) for r in runs}) == 27
    assert "freeze" not in kept(runs[1:], 0.)
    found = kept(runs[:1], 1.)["freeze"]
    assert len(found) == 54 and set(found.frozen) == {"all", *study.REGIONAL} and set(found.trio) == {"organism", "organism-0", "organism-1"}


def test_of_the_table_of_freezing_conditions_are_replaced_together(kept, tmp_path):
    runs = study.STUDIES["freezing"] + [study.unlearned(r) for r in study.STUDIES["freezing"][::4][:3]]
    def again(some, value):
        "The stored `freeze` table after some runs have been done again, and nothing is known of how the others were."
        for file in tmp_path.glob("study.*"): file.unlink()
        return kept(some, value)["freeze"]
    kept(runs, 0.)
    assert (again(runs[1:4], 1.).score == 0).all()  # without plain RL of the same code they have no partner
    new = told([*runs[:4]], 1.)["study.scores"]
    ins = told([study.unlearned(runs[0])], 0.)["study.scores"]
    found = study.frozen(pd.concat([new, ins]), tables.load(tmp_path)["freeze"])
    assert len(found) == 54 and set(found[found.score == 1].trio) == {"organism"} and set(found[found.score == 1].seed) == {2} and (found.score == 1).sum() == 8
    with pytest.raises(UserError, match="the IN of organism"): study.frozen(pd.concat([new, ins.assign(score=.5)]), tables.load(tmp_path)["freeze"])


def table(values):
    "Rows of runs: {(start, seed, condition): value}."
    return pd.DataFrame([dict(start=s, seed=k, frozen=f, score=v) for (s, k, f), v in values.items()])


def test_what_starts_differ_in_drops_out_of_a_comparison():
    made = table({(s, k, f): .1 * i + .02 * k + (.05 if f == "late" else 0) for i, s in enumerate("abc") for k in (0, 1) for f in ("none", "late")})
    gap, alone = study.against(made, "score", dict(frozen="late"), dict(frozen="none")), study.over_starts(study.runs_of(made, "score", frozen="late"))
    assert gap["mean"] == pytest.approx(.05) and gap["high"] - gap["low"] < 1e-9 and gap["more"] == gap["runs"] == 6 and gap["starts"] == 3
    assert alone["low"] < alone["mean"] < alone["high"] and alone["high"] - alone["low"] > .3  # three starts a tenth apart


def test_a_run_without_a_partner_does_not_count():
    made = table({("a", 0, "none"): .1, ("a", 0, "late"): .2, ("b", 0, "late"): .9, ("b", 1, "none"): .3, ("b", 1, "late"): .3})
    gap = study.against(made, "score", dict(frozen="late"), dict(frozen="none"))
    assert gap["runs"] == 2 and gap["mean"] == pytest.approx(.05) and gap["more"] == 1


def test_a_condition_that_is_not_one_row_a_run_is_refused():
    with pytest.raises(ValueError, match="frozen"): study.runs_of(table({("a", 0, "none"): .1, ("a", 0, "late"): .2}), "score")


def test_the_curve_of_the_policys_own_answers_is_drawn(tmp_path):
    import json
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(r) for r in (
        {"step": 10, "reward": 1.5, "rewards/right/mean": .9, "students/right": .4}, {"step": 20, "reward": .6, "rewards/right/mean": .5})))
    assert list(study._curve(tmp_path).right) == [.4, .5]


def test_figures_of_a_study_leave_its_tables_alone():
    rng = iter(range(10**6))
    curves = pd.DataFrame([dict(start=s, seed=k, lesson=l, step=t, right=.3 + .01 * (next(rng) % 7), entropy=.1, flat=None if l == "large" else .5, tokens=1e4 * t, moved=.1 * t) for s in "abc" for k in (0, 1) for l in ("faint", "large") for t in (10, 20, 30)])
    places = pd.DataFrame([dict(start=s, seed=k, lesson=l, region=r, value=.1 * (next(rng) % 5)) for s in "abc" for k in (0, 1) for l in ("faint", "large") for r in ("early", "mid", "late")])
    before = curves.copy(), places.copy()
    for x in ("step", "moved", "tokens"):
        fig = plot.learning(curves, "lesson", ("right", "flat"), x)
        assert "6 runs a condition" in fig._supxlabel.get_text() and len(fig.axes[0].lines) == 2 * (6 + 1) and len(fig.axes[1].lines) == 6 * 2 + 1  # a value that is missing is not drawn as zero
    assert "from 3 starts" in plot.places(places, "lesson", "t", "y")._supxlabel.get_text()
    assert curves.equals(before[0]) and places.equals(before[1])
    dashed = plot.learning(pd.concat([curves.assign(goal=g) for g in ("answer", "steps")]), "lesson", ("right", "entropy", "flat", "moved", "right"), dashed=("goal", "steps"))
    drawn = [a for a in dashed.axes if a.axison]
    assert len(drawn) == 5 and "Dashed: goal steps" in dashed._supxlabel.get_text()
    assert {line.get_color() for line in drawn[0].lines if line.get_linestyle() == "--"} == {line.get_color() for line in drawn[0].lines if line.get_linestyle() == "-"}  # a goal is a dash, not a colour
    with pytest.raises(UserError, match="learning"): plot.learning(curves[:0], "lesson")


def test_a_claim_holds_in_a_condition_if_it_holds_in_each_run():
    made = pd.DataFrame([dict(start=s, seed=k, recipe=r, claim="C4", estimate=e + .01 * k + .02 * i) for i, s in enumerate("abc") for k in (0, 1) for r, e in (("grpo", .5), ("dapo", -.5), ("gspo", -.03))])
    found = study.ruled(made).set_index("recipe")
    assert found.verdict.to_dict() == dict(grpo="supported", dapo="contradicted", gspo="not supported") and set(found.runs) == {6}
    assert len(plot.across(made, study.ruled(made)).axes) == 1


def test_a_curve_is_read_between_its_points_and_not_beyond():
    curves = pd.DataFrame([dict(start="a", seed=0, tokens=100 * t, right=.1 * t, moved=t) for t in (1, 2, 3)] + [dict(start="b", seed=0, tokens=50 * t, right=.2, moved=t) for t in (1, 2, 3)])
    assert study.at(curves, 250).round(6).to_dict()["a", 0] == .25 and pd.isna(study.at(curves, 250)["b", 0]) and study.at(curves, 2, "moved")["b", 0] == pytest.approx(.2)


def test_the_price_of_freezing_is_taken_run_by_run():
    rows = [dict(trio=f"s{i}", seed=k, frozen=f, ability=a, n=1000, score=.3 + .2 * i + .01 * k - .05 * (f == "late")) for i in range(3) for k in range(2) for f in ("none", "late") for a in ("vision_to_reasoning", "reasoning")]
    paired = plot.lost(pd.DataFrame(rows))["reasoning"]["late"]
    alone = plot.lost(pd.DataFrame(rows).drop(columns=["trio", "seed"]))["reasoning"]["late"]
    assert paired == pytest.approx((.05, .05, .05)) and alone[0] == pytest.approx(.05) and alone[1] < -.1 < .2 < alone[2]  # what starts differ in drops out
    both = pd.concat([pd.DataFrame(rows), pd.DataFrame(rows).assign(recipe="dapo")])  # two recipes of one start and seed are no error
    assert plot.lost(both)["reasoning"]["late"] == pytest.approx(paired)
    assert plot.lost(pd.DataFrame(rows).query("frozen != 'none'")) == {}  # without plain RL there is no price

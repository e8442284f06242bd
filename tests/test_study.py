"Many runs: complete grids, partners in every condition, folders that resume, tables that say what the runs did."
from dataclasses import replace

import pandas as pd
import pytest

from franken import study, tables, upbringing
from franken.errors import UserError
from franken.study import Run


def test_every_run_has_a_partner_in_every_condition():
    for name, runs in study.STUDIES.items():
        conditions = {replace(r, start="", seed=0) for r in runs}
        partners = [{(q.start, q.seed) for q in runs if replace(q, start="", seed=0) == c} for c in conditions]
        assert all(p == partners[0] for p in partners) and len(partners[0]) == 6 and len(runs) == 6 * len(conditions), name


def test_a_name_is_a_run():
    runs = study.find_study("all")
    assert len({r.name for r in runs}) == len(set(runs)) == len(runs)


def test_a_run_practises_what_it_says():
    assert Run("organism-0", 10).practice == upbringing.LIVES["organism"].rl
    faint = Run("organism-refine-1", 1, lesson="faint", goal="steps", reuse=2).practice
    assert [w.ink for w, _ in faint.worlds] == [.4] and faint.goal == "steps" and faint.reuse == 2 and faint.mix == (1, 9, 0)


@pytest.mark.parametrize("call", [lambda out: study.find_study("freeze"), lambda out: study.conduct("lessons", out, "3"), lambda out: study.conduct("lessons", out, "1/0"), lambda out: study.collect(out)])
def test_bad_input_is_refused(call, tmp_path):
    with pytest.raises(UserError): call(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch):
    "Studies of two runs, of two updates."
    short = {name: replace(life, rl=replace(life.rl, steps=2, prompts=2, rollouts=4, warmup=1)) for name, life in upbringing.LIVES.items()}
    monkeypatch.setattr(study, "LIVES", short)
    monkeypatch.setattr(study, "FEW", dict(abilities=6, attend=4, graft=4))
    monkeypatch.setattr(study, "STUDIES", {"small": [Run("organism", 2, "dapo", reuse=2), Run("organism", 2, "grpo", "late")]})


def test_a_study_is_done_once_and_told(small, tmp_path):
    study.conduct("small", tmp_path, "1/2")
    assert study.done(study.STUDIES["small"][0], tmp_path) and not study.done(study.STUDIES["small"][1], tmp_path)
    study.conduct("small", tmp_path)
    model = (tmp_path / "organism" / "dapo-none-x2-2" / "model" / "model.safetensors")
    written = model.stat().st_mtime_ns
    study.conduct("small", tmp_path)
    assert model.stat().st_mtime_ns == written
    found = study.collect(tmp_path, "small")
    assert set(found) == set(tables.STUDIES) and all(len(t) for n, t in found.items() if n != "study.curves")
    changes = found["study.changes"].set_index(["frozen", "region"]).frobenius
    assert changes["late", "late"] == 0 < changes["late", "early"] and changes["none", "late"] > 0
    assert set(found["study.scores"].frozen) == {"none", "late", "all"} and {"C4", "C5"} <= set(found["study.claims"].claim)
    credit = found["study.credit"].query("frozen == 'late' and player == 'late'").value
    assert len(credit) and (credit == 0).all()  # what did not move has no credit
    assert not list(tmp_path.rglob("state")) and len(pd.read_parquet(tmp_path / "organism" / "in.parquet")) == 4

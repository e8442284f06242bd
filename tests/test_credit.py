"Credit is shared without rest, sweeps hang together, and what was asked is not asked again."
import json

import numpy as np
import pandas as pd
import pytest
from test_comparison import trio  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from franken import plot, tables
from franken.cli import app
from franken.credit import ALPHAS, coalitions, contributions, cross, crossings, fine, layer_trials, other_trials, try_graft, whole, write_credit
from franken.errors import UserError
from franken.grafting import answers, graft
from franken.plans import Graft, assign, eight


def score(vlm, who, parent):
    "Ten 'questions' whose answers say whose layers a model has."
    moved = [vlm.layers[l].mlp.up_proj.weight.sum().item() for l in range(3)]
    return pd.DataFrame([dict(ability=ability, id=str(i), correct=round(1e6 * moved[i % 3]) % (i + 2) == 0) for ability in ("vision_to_reasoning", "reasoning") for i in range(10)])


@pytest.fixture(scope="module")
def done(trio, tmp_path_factory):
    out = tmp_path_factory.mktemp("credit")
    graft(trio, out, score=score), fine(trio, out, score=score)
    return tables.load(out)


def test_sweeps_agree_where_they_meet(done):
    g = done["grafts"].query("ability == 'reasoning'").set_index(["sweep", "layer"]).sort_index()
    one = lambda sweep, layer: g.loc[[(sweep, layer)]].score.iloc[0]
    rl = g[(g.index.get_level_values(0) == "whole") & (g.what == "rl")].score.iloc[0]
    assert one("alone", 0) == one("bottom", 0) and one("alone", 2) == one("top", 2) and one("bottom", 2) == one("top", 0) == rl
    assert one("removed", 0) == one("top", 1) and one("removed", 2) == one("bottom", 1)
    table = done["graft"].query("ability == 'reasoning'").set_index(["early", "mid", "late"]).score  # three layers: a region is a layer
    assert table["rl", "in", "in"] == one("alone", 0) and table["rl", "in", "rl"] == one("removed", 1) and table["rl", "rl", "rl"] == rl
    outcomes = done["grafts.outcomes"].query("ability == 'reasoning'").groupby("graft").correct.mean()
    assert all(outcomes[r.graft] == pytest.approx(r.score) for r in g.itertuples())


def test_null_players_get_nothing_and_regions_the_same(done):
    credit = done["credit"].query("quantity == 'shapley' and ability == 'reasoning'").set_index(["game", "player"]).value
    assert credit["parts", "vision"] == credit["parts", "projector"] == 0
    assert np.allclose(*(credit[game].reindex(["early", "mid", "late"]) for game in ("regions", "parts")))
    assert set(done["credit"].query("quantity == 'interaction' and game == 'regions'").player) == {"early & mid", "early & late", "mid & late"}


def test_every_trial_has_one_owner_for_each_tensor(trio):
    for t in (*layer_trials(3), *other_trials(), *whole("rl"), *crossings(["rl", "other", "third"])):
        owners = assign(t["plan"], trio.in_.names(), 3)
        assert set(owners) == set(trio.in_.names()) and (not t["plan"].pieces or Graft.parse(t["plan"].name) == t["plan"])
    names = [t["plan"].name for t in crossings(["rl", "other", "third"])]
    assert len(set(names)) == len(names) == 3 * 7 and len(coalitions()) == 32 and 1 not in ALPHAS


def test_other_games_and_other_models(trio, tmp_path):
    table = contributions(answers(trio, eight(), score))
    about = dict(fingerprints=dict(rl="00"), seed=0, rest="in")
    write_credit(table, tmp_path, about)
    assert set(write_credit(table.assign(game="parts"), tmp_path, about).game) == {"regions", "parts"}
    assert set(write_credit(table, tmp_path, about).game) == {"regions", "parts"}
    assert set(write_credit(table, tmp_path, about | dict(fingerprints=dict(rl="11"))).game) == {"regions"}


def test_averages_of_two_differ_by_what_they_are_of(trio):
    table = cross(trio, {"other": trio.base}, score=score)
    assert table.query("sweep == 'cross'").graft.nunique() == 6 and table.query("sweep == 'whole'").what.unique().tolist() == ["", "rl", "other"]
    same = cross(trio, {"other": trio.rl}, score=score)  # a run mixed with itself is that run
    assert same[same.sweep != "whole"].groupby("ability").score.nunique().max() == 1 and set(same[same.sweep == "average"].rest) == {"rl"}


def test_figures(done):
    for draw, name in ((plot.credit, "credit"), (plot.grafts, "grafts"), (plot.strength, "grafts")):
        before = done[name].copy(deep=True)
        draw(done[name])
        pd.testing.assert_frame_equal(done[name], before)
        with pytest.raises(UserError, match="empty"): draw(done[name].head(0))


def test_a_fine_run_resumes(trio, tmp_path):
    fine(trio, tmp_path, n=2, alphas=(.5,))
    size, written = (tmp_path / "graft.samples.jsonl").stat().st_size, (tmp_path / "grafts.parquet").read_bytes()
    fine(trio, tmp_path, n=2, alphas=(.5,))
    assert (tmp_path / "graft.samples.jsonl").stat().st_size == size and (tmp_path / "grafts.parquet").read_bytes() == written


def run(trio, *words):
    sides = ["--base", str(trio.base), "--in", str(trio.in_), "--rl", str(trio.rl)]
    return CliRunner().invoke(app, ["graft", *sides, *map(str, words)])


def test_command(trio, tmp_path):
    planned = run(trio, "--take", "late attention=rl@0.5", "--take", "layer 0=mine", "--parent", f"mine={trio.base}", "--save", tmp_path / "a", "--plan")
    assert planned.exit_code == 0 and "interpolated" in planned.output and "the rest" in planned.output and not (tmp_path / "a").exists()
    saved = run(trio, "--take", "late attention=rl@0.5", "--save", tmp_path / "a", "--mergekit", tmp_path / "a.yaml")
    assert saved.exit_code == 0 and (tmp_path / "a/config.json").exists() and json.loads((tmp_path / "a.yaml").read_text())["merge_method"] == "linear"
    measured = run(trio, "--take", "late=rl", "--n", 2, "--out", tmp_path / "out")
    assert measured.exit_code == 0 and set(tables.read_table(tmp_path / "out", "grafts").sweep) == {"whole", "own"}
    all_eight = run(trio, "--n", 2)
    assert all_eight.exit_code == 0 and "shapley" in all_eight.output and "rl:in:rl" in run(trio, "--plan").output
    for words, said in ((("--take", "late=x"), "parent 'x'"), (("--parent", "rl=a"), "--parent: 'rl=a'"), (("--take", "late=rl", "--early", "in"), "early given beside pieces"), (("--mergekit", tmp_path / "b"), "none given")):
        refused = run(trio, *words)
        assert refused.exit_code == 2 and said in refused.output and "Traceback" not in refused.output, refused.output
    assert not (tmp_path / "b").exists()

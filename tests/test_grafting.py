"A hybrid is made of its parents and of nothing else."
import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_comparison import trio  # noqa: F401 (a fixture)
from test_trio import modern, rewrite
from transformers import Qwen2_5_VLForConditionalGeneration

from franken.errors import UserError
from franken.grafting import EIGHT, Plan, answers, contributions, differing, eight, graft, gray, identity, plan_table, regraft, save_hybrid, shapley, tabulate, transplanted
from franken.organism import build_model, build_processor
from franken.regions import REGIONS
from franken.trio import Checkpoint, load_trio
from franken.weights import canonical
from franken.vlm import Prompt, load_vlm


def raw(folder): return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}

def weights(folder): return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


@pytest.mark.parametrize("name, rest", list(product(EIGHT, ["in", "rl", "early"])))
def test_every_tensor_has_exactly_one_owner(trio, name, rest):
    plan = Plan.parse(name, rest=rest)
    table = plan_table(plan, trio)
    assert table["parameter"].is_unique and set(table["parameter"]) == set(trio.in_.names())
    owners = table.groupby("region")["owner"].unique().map(list).to_dict()
    assert owners == {r: [getattr(plan, r)] for r in REGIONS} | {"rest": [plan.early if rest == "early" else rest]}


@pytest.mark.parametrize("name", EIGHT)
def test_merging_in_with_itself_gives_in(trio, tmp_path, name):
    same = load_trio(base=trio.base, in_=trio.in_, rl=trio.in_)
    assert raw(save_hybrid(Plan.parse(name), same, tmp_path / "out")) == raw(trio.in_.folder)


@pytest.mark.parametrize("parent", ["in", "rl"])
def test_a_hybrid_of_one_parent_is_that_parent(trio, tmp_path, parent):
    whole = save_hybrid(Plan(parent, parent, parent, rest=parent), trio, tmp_path / "whole")
    assert raw(whole) == raw(trio.members[parent].folder)
    assert {p.name: p.read_bytes() for p in Checkpoint(str(whole)).settings} == {p.name: p.read_bytes() for p in trio.members[parent].settings}
    assert Checkpoint(str(whole)).fingerprint == trio.members[parent].fingerprint


def test_saved_hybrid_loads_and_holds_its_owners_tensors(trio, tmp_path):
    plan = Plan("rl", "in", "rl", rest="early", cuts=(1, 2))
    folder = save_hybrid(plan, trio, tmp_path / "deep" / "hybrid")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items(): assert torch.equal(value, trio.members[plan.owner(canonical(name), 3)].tensor(canonical(name)))
    assert [p.name for p in folder.parent.iterdir()] == ["hybrid"]
    record = json.loads((folder / "graft.json").read_text())
    assert record["mid"] == "in" and record["rest"] == "early" and record["parents"]["rl"]["fingerprint"] == trio.rl.fingerprint
    assert len(load_vlm(folder).generate([Prompt("3 + 4 ?")], 4)) == 1


def test_parents_in_other_layouts_and_shards(trio, tmp_path):
    "The layout is that of the parent that owns the rest; the content does not depend on it."
    new = rewrite(trio.in_.folder, tmp_path / "new", modern)
    sharded = tmp_path / "sharded"
    Qwen2_5_VLForConditionalGeneration.from_pretrained(trio.rl.folder).save_pretrained(sharded, max_shard_size="500KB")
    build_processor().save_pretrained(sharded)
    mixed, plan = load_trio(base=trio.base, in_=new, rl=sharded).check(), "in:rl:in"
    want = weights(save_hybrid(Plan.parse(plan), trio, tmp_path / "want"))
    for rest in ("in", "rl"):
        folder = save_hybrid(Plan.parse(plan, rest=rest), mixed, tmp_path / rest)
        got = weights(folder)
        assert set(raw(folder)) == set(raw(mixed.members[rest].folder)) and set(got) == set(weights(mixed.members[rest].folder))
        decoder = {canonical(n): t for n, t in got.items() if canonical(n).startswith("decoder")}
        assert all(torch.equal(decoder[canonical(n)], t) for n, t in want.items() if canonical(n).startswith("decoder"))
        Checkpoint(str(folder)).check()
        assert not Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]


def test_in_memory_is_what_is_saved(trio, tmp_path):
    differ, now = differing(trio), frozenset()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(trio.in_.folder)
    for plan in gray(eight()):
        now = regraft(model, trio, now, transplanted(plan, differ, 3))
        saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(save_hybrid(plan, trio, tmp_path / plan.name.replace(":", "-"))).state_dict()
        assert all(torch.equal(t, saved[n]) for n, t in model.state_dict().items())


def test_only_differences_are_moved(trio):
    differ = differing(trio)
    assert differ and all(n.startswith("decoder.") for n in differ)
    walk = gray(eight())
    assert len({p.name for p in walk}) == 8
    assert all(sum(getattr(a, r) != getattr(b, r) for r in REGIONS) == 1 for a, b in zip(walk, walk[1:]))
    assert identity(Plan.parse("in:in:in"), trio, differ) == (trio.in_.fingerprint, "in")
    assert identity(Plan.parse("rl:rl:rl"), trio, differ) == (trio.rl.fingerprint, "rl")  # the rest is the same in both
    assert len({identity(p, trio, differ)[0] for p in eight()}) == 8
    assert identity(Plan.parse("in:rl:in"), trio, differ) == identity(Plan.parse("in:rl:in", rest="rl"), trio, differ)


def score(vlm, who, parent):
    "Ten 'questions' whose answers say whose layers a model has."
    moved = [vlm.layers[l].mlp.up_proj.weight.sum().item() for l in range(3)]
    return pd.DataFrame([dict(ability="reasoning", id=str(i), correct=round(1e6 * moved[i % 3]) % (i + 2) == 0) for i in range(10)])


@pytest.mark.parametrize("rest", ["in", "rl", "early"])
def test_each_hybrid_is_measured_on_its_own_weights(trio, tmp_path, rest):
    answered = answers(trio, eight(rest), score)
    assert list(answered["plan"].unique()) == list(EIGHT)
    for plan in eight(rest):
        alone = score(load_vlm(save_hybrid(plan, trio, tmp_path / plan.name.replace(":", "-"))), "", None)
        assert list(answered[answered["plan"] == plan.name]["correct"]) == list(alone["correct"])


def test_table(trio, tmp_path):
    table = graft(trio, out=tmp_path, score=score)
    again = graft(trio, score=score)
    pd.testing.assert_frame_equal(table, again)
    base = table.iloc[0]
    assert len(table) == 8 and base["gain"] == 0 and np.isnan(base["p"]) and (table["score"] - base["score"]).round(9).equals(table["gain"].round(9))
    assert (tmp_path / "graft.parquet").exists()
    assert graft(trio, early="in", mid="rl", late="rl", save=tmp_path / "saved") is None and (tmp_path / "saved/config.json").exists()
    assert len(graft(trio, early="in", mid="rl", late="rl", score=score)) == 2


def test_shapley_values_add_up_to_the_gain():
    rng = np.random.default_rng(0)
    for _ in range(20):
        value = {name: rng.random(50) for name in EIGHT}
        assert np.allclose(sum(shapley(value).values()), value["rl:rl:rl"] - value["in:in:in"])
        assert np.isclose(shapley({k: v.mean() for k, v in value.items()})["mid"], shapley(value)["mid"].mean())
    additive = {name: 3. * (name[0] == "r") + (name.split(":")[1] == "rl") for name in EIGHT}  # late is a null player
    assert np.allclose([shapley(additive)[r] for r in REGIONS], [3, 1, 0])
    late_only = pd.DataFrame([dict(plan=p, ability="vision", id=str(i), correct=p.endswith("rl")) for p in EIGHT for i in range(9)])
    assert list(contributions(late_only)["value"]) == [0, 0, 1]
    assert list(tabulate(late_only, "in").query("late == 'rl'")["gain"]) == [1] * 4


def test_bad_input(trio, tmp_path):
    with pytest.raises(UserError, match="mid: 'base'.*in, rl"): Plan("in", "base", "rl")
    with pytest.raises(UserError, match="rest: 'late'.*early"): Plan("in", "rl", "rl", rest="late")
    with pytest.raises(UserError, match="in:rl:rl"): Plan.parse("in:rl")
    with pytest.raises(UserError, match="early given.*all three"): graft(trio, early="rl")
    with pytest.raises(UserError, match="none given"): graft(trio, save=tmp_path / "x")
    with pytest.raises(UserError, match="exists.*another name"): save_hybrid(Plan("in", "rl", "rl"), trio, tmp_path)
    with pytest.raises(UserError, match="cuts"): plan_table(Plan("in", "rl", "rl", cuts=(2, 2)), trio)


def test_parents_answers_are_shared_and_a_killed_run_resumes(trio, tmp_path):
    from franken.ability import abilities
    scores = abilities(trio, out=tmp_path, n=2)
    size = lambda name: (tmp_path / f"{name}.samples.jsonl").stat().st_size
    known = size("abilities")
    table = graft(trio, out=tmp_path, n=2)
    assert size("abilities") == known
    for parent, rows in (("in", table.query("early == 'in' and mid == 'in' and late == 'in'")), ("rl", table.query("early == 'rl' and mid == 'rl' and late == 'rl'"))):
        assert list(rows["score"]) == list(scores[scores["model"] == parent]["score"])
    written, samples = (tmp_path / "graft.parquet").read_bytes(), tmp_path / "graft.samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:size("graft") // 2 - 3])
    graft(trio, out=tmp_path, n=2)
    assert (tmp_path / "graft.parquet").read_bytes() == written

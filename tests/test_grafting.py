"A hybrid is made of its parents and of nothing else."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import combinations, permutations, product

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_comparison import trio  # noqa: F401 (a fixture)
from test_trio import modern, rewrite
from transformers import Qwen2_5_VLForConditionalGeneration

from franken.credit import contributions, interactions, shapley
from franken.errors import UserError
from franken.grafting import Nursery, answers, check_room, differing, graft, identity, regraft, save_hybrid, tabulate, walk
from franken.organism import build_model, build_processor
from franken.plans import EIGHT, Graft, Plan, eight, formulas, mergekit, plan_table, select, summary
from franken.regions import REGIONS
from franken.trio import Checkpoint, load_trio
from franken.vlm import Prompt, load_vlm
from franken.weights import canonical


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
    owner = plan_table(plan, trio).set_index("parameter").owner
    for name, value in model.state_dict().items(): assert torch.equal(value, trio.members[owner[canonical(name)]].tensor(canonical(name)))
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


MIXED = ("late attention=rl@0.3 + layer 0=rl + vision=base", "decoder=rl-base@0.5", "mlp=rl@1.25 + embeddings=base@0.5")

@pytest.mark.parametrize("plans", [eight(), [*map(Graft.parse, MIXED)]], ids=["eight", "mixed"])
def test_in_memory_is_what_is_saved(trio, tmp_path, plans):
    nursery = Nursery(trio, *plans)
    made, now = [nursery.formulas(p) for p in plans], nursery.whole("in")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(trio.in_.folder)
    for i in walk(made, now):
        assert regraft(model, nursery, now, made[i]) == sum(now[n] != made[i][n] for n in now)
        now = made[i]
        saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(save_hybrid(plans[i], trio, tmp_path / str(i))).state_dict()
        assert all(torch.equal(t, saved[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("n, cuts", [(3, "thirds"), (28, "thirds"), (28, "paper"), (28, (8, 20))])
def test_neighbours_on_the_walk_differ_in_one_region(n, cuts):
    names = [f"decoder.layers.{l}.mlp.up_proj.weight" for l in range(n)] + ["head.weight"]
    plans = eight(cuts=cuts)
    order = walk([formulas(p, names, n) for p in plans], dict.fromkeys(names, ("in",)))
    assert sorted(order) == list(range(8)) and plans[order[0]].name == "in:in:in"
    assert all(sum(getattr(plans[a], r) != getattr(plans[b], r) for r in REGIONS) == 1 for a, b in zip(order, order[1:]))


def test_the_same_content_has_the_same_key(trio):
    plans = [*eight(), *eight("rl"), Graft.parse("layers 1-2=rl"), Graft.parse("late=rl + mid=rl + vision=rl")]
    nursery = Nursery(trio, *plans)
    differ = differing(trio)
    assert differ and all(n.startswith("decoder.") for n in differ)
    known = [identity(p, nursery) for p in plans]
    assert known[0] == (trio.in_.fingerprint, "in") and known[7] == (trio.rl.fingerprint, "rl")  # the rest is the same in both
    assert len({who for who, _ in known[:8]}) == 8 and known[:8] == known[8:16]
    assert known[16] == known[17] == known[1]  # in:rl:rl; the vision tower did not move


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
    assert list(contributions(late_only).query("quantity == 'shapley'")["value"]) == [0, 0, 1]
    assert list(tabulate(late_only, "in").query("late == 'rl'")["gain"]) == [1] * 4


def test_credit_is_the_mean_over_all_orders():
    value = {frozenset(c): np.random.default_rng(len(c)).random() + len(c) for k in range(6) for c in combinations("abcde", k)}
    orders, added = list(permutations("abcde")), lambda order, p: value[frozenset(order[:order.index(p) + 1])] - value[frozenset(order[:order.index(p)])]
    assert np.allclose([shapley(value)[p] for p in "abcde"], [np.mean([added(o, p) for o in orders]) for p in "abcde"])
    pairs = interactions(value)
    both = lambda s: value[s | {"a", "b"}] - value[s | {"a"}] - value[s | {"b"}] + value[s]
    merged = [frozenset(o[:o.index("ab")]) for o in permutations(["ab", "c", "d", "e"])]  # the pair comes as one
    assert np.isclose(pairs["a", "b"], np.mean([both(s) for s in merged])) and len(pairs) == 10
    assert np.allclose([*interactions({name: name.count("rl") for name in EIGHT}).values()], 0)  # additive: nobody needs anybody


# Bytes

@pytest.mark.parametrize("text", ["late=rl@0.3", "decoder=rl@0.5", "attention=rl-base@0.7 + vision=rl", "mlp=rl@1.25"])
def test_merging_a_with_itself_gives_a_at_any_strength(trio, tmp_path, text):
    same = dict.fromkeys(("base", "in", "rl"), trio.rl)
    assert raw(save_hybrid(Graft.parse(text), same, tmp_path / "out")) == raw(trio.rl.folder)


def test_alpha_zero_and_one_are_the_parents(trio, tmp_path):
    everything = " + ".join(f"{part}=rl@{{0}}" for part in ("decoder", "vision", "projector", "embeddings", "head", "final"))
    for alpha, parent in ((0, "in"), (1, "rl")):
        assert raw(save_hybrid(Graft.parse(everything.format(alpha)), trio, tmp_path / parent)) == raw(trio.members[parent].folder)


def test_half_way_is_rounded_once(trio, tmp_path):
    "A checkpoint in float16: computed in float32, rounded to what lies on disk."
    small = {m: rewrite(c.folder, tmp_path / m, change=lambda t: t.half()) for m, c in trio.members.items()}
    mixed = weights(save_hybrid(Graft.parse("decoder=rl@0.3 + embeddings=rl-base@2"), load_trio(base=small["base"], in_=small["in"], rl=small["rl"]), tmp_path / "out"))
    base, in_, rl = (weights(small[m]) for m in ("base", "in", "rl"))
    for name, t in mixed.items():
        wide = lambda of: of[name].float()
        want = wide(in_) + .3 * (wide(rl) - wide(in_)) if ".layers." in name and "visual" not in name else wide(in_) + 2 * (wide(rl) - wide(base)) if "embed_tokens" in name else wide(in_)
        assert t.dtype == torch.float16 and torch.equal(t, want.half()), name


def test_a_parent_of_another_dtype_keeps_its_bytes(trio, tmp_path):
    half = Checkpoint(str(rewrite(trio.rl.folder, tmp_path / "half", change=lambda t: t.half())))
    folder = save_hybrid(Graft.parse("late=other + early attention=other@0.5"), dict({"in": trio.in_}, other=half), tmp_path / "out")
    got = {canonical(n): t for n, t in weights(folder).items()}
    assert all(torch.equal(got[n], half.tensor(n)) and got[n].dtype == torch.float16 for n in select("late", got, 3))
    assert all(got[n].dtype == torch.float32 for n in select("early attention", got, 3))
    assert not Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]


def sharded(trio, member, folder, seed):
    "The checkpoint in shards of a size and an order that the seed draws."
    tensors, rng = list(load_file(trio.members[member].folder / "model.safetensors").items()), random.Random(seed)
    rng.shuffle(tensors)
    shutil.copytree(trio.members[member].folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    for i, name in enumerate(names): save_file(dict(tensors[i::4]), folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={n: names[i % 4] for i, (n, _) in enumerate(tensors)})))
    return Checkpoint(str(folder))


def test_order_of_shards_does_not_matter(trio, tmp_path):
    plan = Graft.parse("mid attention=rl + late=rl@0.4")
    want = weights(save_hybrid(plan, trio, tmp_path / "want"))
    for seed in range(2):
        mixed = {m: sharded(trio, m, tmp_path / f"{m}{seed}", seed) for m in ("in", "rl")}
        folder = save_hybrid(plan, mixed, tmp_path / f"out{seed}")
        got = weights(folder)
        assert set(got) == set(want) and all(torch.equal(got[n], t) for n, t in want.items())
        Checkpoint(str(folder)).check()


def test_an_old_pickle_becomes_safetensors(trio, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(trio.in_.folder, old, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(trio.in_.folder / "model.safetensors"), old / "pytorch_model.bin")
    plan = Plan("in", "rl", "rl")
    got, want = (weights(save_hybrid(plan, t, tmp_path / n)) for n, t in (("a", load_trio(base=trio.base, in_=old, rl=trio.rl)), ("b", trio)))
    assert all(torch.equal(got[n], t) for n, t in want.items()) and len(got) == len(want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")
def test_killed_at_any_moment_nothing_looks_complete(trio, tmp_path):
    "SIGKILL at the k-th time that a file is opened, copied or renamed, for all k."
    for k in range(0, 400, 7):
        at = tmp_path / str(k)
        if not (child := os.fork()):
            count = iter(range(10**6))
            sys.addaudithook(lambda event, args: event in ("open", "os.rename", "shutil.copyfile", "os.chmod") and next(count) >= k and os.kill(os.getpid(), signal.SIGKILL))
            try: save_hybrid(Plan("in", "rl", "rl"), trio, at / "hybrid"); os._exit(0)
            except BaseException as e: os.write(2, repr(e).encode())
            finally: os._exit(1)  # whatever happens, the fork must not go on with the tests
        end = os.waitpid(child, 0)[1]
        if end == 0: break
        assert os.WIFSIGNALED(end)
        assert not (at / "hybrid").exists()
        for left in at.glob(".*"):
            if (left / "config.json").exists(): Checkpoint(str(left)).check()  # all but the name was there
    else: pytest.fail("it never came to an end")
    assert k > 50 and Checkpoint(str(at / "hybrid")).check()


# What is refused

@pytest.mark.parametrize("text, said", [
    ("late=rl + layer 2=rl", "both take decoder.layers.2"), ("attention=rl + early=rl@0.5", "both take decoder.layers.0.self_attn"), ("late=teacher", "parent 'teacher'.*one of base, in, rl"),
    ("layers 1-7=rl", "no layer 3 there.*0 to 2"), ("vision layers 2=rl", "no layer 2 there.*0 to 1"), ("=rl", "empty selection"), ("head mlp=rl", "no such parameter"), ("tail=rl", "'tail'.*early, mid, late"),
    ("early late=rl", "two layers"), ("late=rl@x", "not readable"), ("late", "not readable"), ("layers x=rl", "layers 'x'"), ("late=rl@inf", "not readable")])
def test_refused_by_name_with_nothing_written(trio, tmp_path, text, said):
    with pytest.raises(UserError, match=said): save_hybrid(Graft.parse(text), trio, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parents_that_do_not_fit(trio, tmp_path):
    deep = tmp_path / "deep"
    build_model(layers=4, seed=0).save_pretrained(deep), build_processor().save_pretrained(deep)
    lost = rewrite(trio.rl.folder, tmp_path / "lost", drop=("model.layers.1.mlp.up_proj.weight",))
    words = shutil.copytree(trio.rl.folder, tmp_path / "words")
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text().replace('"circle"', '"ellipse"'))
    for other, said in ((deep, "decoder.layers.3"), (lost, "decoder.layers.1.mlp.up_proj.weight"), (words, "tokens differ")):
        with pytest.raises(UserError, match=said): save_hybrid(Graft.parse("late=other"), {"in": trio.in_, "other": Checkpoint(str(other))}, tmp_path / "out")
    with pytest.raises(UserError, match="GB free"): check_room(tmp_path, 10**18)
    assert not (tmp_path / "out").exists()


def test_settings_of_the_stated_parent(trio, tmp_path):
    styled = rewrite(trio.rl.folder, tmp_path / "styled")
    (styled / "chat_template.jinja").write_text("{# mine #}" + (styled / "chat_template.jinja").read_text())
    among = {"in": trio.in_, "rl": Checkpoint(str(styled))}
    for settings, mine in ((None, False), ("rl", True)):
        folder = save_hybrid(Graft.parse("late=rl"), among, tmp_path / str(settings), settings)
        assert (folder / "chat_template.jinja").read_text().startswith("{# mine #}") == mine
        text = (folder / "README.md").read_text()
        assert all(c.fingerprint in text for c in among.values()) and "| late | rl | taken |" in text


def test_the_summary_counts_each_byte_once(trio):
    for plan in (*eight(), *map(Graft.parse, MIXED)):
        about = summary(plan, trio)
        assert about["share"].sum() == pytest.approx(1) and about["tensors"].sum() == len(trio.in_.names())


# mergekit, which is not a dependency: it is asked if it is there

MERGEKIT = os.environ.get("FRANKEN_MERGEKIT") or shutil.which("mergekit-yaml")

@pytest.mark.skipif(not MERGEKIT, reason="needs mergekit-yaml on the PATH or in $FRANKEN_MERGEKIT: pip install mergekit")
@pytest.mark.parametrize("kind", ["organism", "text-only Qwen2"])
@pytest.mark.parametrize("text, exact", [("early=in + mid=rl + late=rl", True), ("layer 1 attention=rl + late mlp=rl + embeddings=rl + final=rl", True), ("decoder=rl@0.3", False), ("late=rl-base@0.5", False)])
def test_mergekit_gives_the_same(trio, tmp_path, kind, text, exact):
    among = trio.members if kind == "organism" else text_only(tmp_path)
    (tmp_path / "merge.yaml").write_text(json.dumps(mergekit(Graft.parse(text), among)))
    run = subprocess.run([MERGEKIT, tmp_path / "merge.yaml", tmp_path / "theirs"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs, ours = ({canonical(n): t for n, t in weights(f).items()} for f in (tmp_path / "theirs", save_hybrid(Graft.parse(text), among, tmp_path / "ours")))
    assert set(theirs) == set(ours)
    for n in ours: assert torch.equal(ours[n], theirs[n]) if exact else torch.allclose(ours[n], theirs[n], rtol=1e-6, atol=1e-7), n


def text_only(folder):
    "Three tiny Qwen2, a language model alone."
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(build_processor().tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    for member in ("base", "in", "rl"): Qwen2ForCausalLM(config).save_pretrained(folder / member), build_processor().tokenizer.save_pretrained(folder / member)
    return {m: Checkpoint(str(folder / m)) for m in ("base", "in", "rl")}


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

"What is frozen: named exactly, out of the optimizer's reach, and proven from the bytes on disk."
import json
import re

import pytest
import torch

from franken import freezing, organism, practice, reinforcement, teaching
from franken.errors import UserError
from franken.trio import Checkpoint
from families import FAMILIES, build


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]


@pytest.mark.parametrize("what, count", [("none", 0), ("early", 24), ("late", 24), (r"layers\.1\.", 12), ("layers.1", 12), ("mlp", 3 * 6), ("late attention", 2 * 7), ("layers 0,2-3", 36), ("early + late norms", 24 + 4),
                                         (r"mlp\.(up|down) + layer 0", 12 + 10), ("early + layers 0-1", 24)])
def test_freezing_by_name(what, count):
    model = organism.build_model(6)
    rest = len(freezing.freeze(model, "none"))
    assert rest == 105 - 72 and len(freezing.freeze(model, what)) - rest == count
    assert freezing.plan(model).stay.sum() == rest + count == sum(not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("what", ["layers.1", "layers.1 + layers.1", "layer 1", r"layers\.1$|layers\.1\."])
def test_layer_1_is_never_layer_10(what):
    names = freezing.own_names(organism.build_model(12))
    assert {int(re.search(r"layers\.(\d+)", n)[1]) for n in freezing.chosen(what, names, 12)} == {1}


@pytest.mark.parametrize("what, layers", [(r"layers\.(1|10)", {1, 10}), (r"decoder\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)", set(range(12))), (r"decoder.layers.1\d?", {1, 10, 11}), (r"(?i)DECODER.LAYERS.1", {1}), (r"decoder.layers.[0-9]", set(range(10)))])
def test_alternatives_are_tried_before_a_number_is_cut(what, layers):
    names = freezing.own_names(organism.build_model(12))
    assert {int(m[1]) for n in freezing.chosen(what, names, 12) if (m := re.search(r"decoder\.layers\.(\d+)", n))} == layers


@pytest.mark.parametrize("what, says", [("layer_7", "no parameter has such a name"), ("layers.[", "not a regular expression"), ("early + ", "empty selection"), ("layers 5-6", "no layer 6"),
                                        ("decoder", "nothing is left to train"), ("vision", "do not learn anyway"), ("early mid", "two layers"), ("early + layer_7", "no parameter has such a name")])
def test_a_name_that_cannot_be_meant_is_refused(what, says):
    with pytest.raises(UserError, match=says): freezing.freeze(organism.build_model(6), what)


def test_a_refused_name_leaves_the_model_as_it_was():
    model = organism.build_model(3)
    with pytest.raises(UserError): freezing.freeze(model, "layer_7")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_regions_are_found_in_other_families(family):
    model = build(family).model
    n = freezing.layer_count(model)
    frozen = set(freezing.freeze(model, "late"))
    table = freezing.plan(model)
    assert table.loc["late", "stay"] == table.loc["late", "tensors"] > 0 and table.loc["early", "stay"] == 0 and n >= 3
    assert {name for name in freezing.own_names(model) if name.startswith("decoder.layers.0.")}.isdisjoint(frozen)


@pytest.mark.parametrize("more", [dict(), dict(accumulate=2), dict(reuse=2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_tensors_keep_their_bytes_in_rl_with_weight_decay(tmp_path, more, checkpointing):
    start = teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path / "start")
    settings = practice.Practice(steps=2, lr=1e-2, prompts=2, rollouts=4, warmup=1, longest=6, weight_decay=.1, **more)
    end = reinforcement.reinforce(start, tmp_path / "run", settings, frozen="late", seed=3, functions=[spread], extra=dict(gradient_checkpointing=checkpointing))
    before, after = (dict(Checkpoint(str(f)).tensors()) for f in (start, end))
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {n for n in before if not re.search(r"decoder\.layers\.[01]\.", n)}  # the layers below the frozen one learnt
    shown = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert shown["moved"] == 24 and shown["still"] == [] and all((a == b) == (n in still) for n, (a, b) in shown["hashes"].items())


def test_a_frozen_tensor_that_moved_ends_the_run():
    model = organism.build_model(3)
    frozen, before = freezing.freeze(model, "late"), freezing.hashes(model)
    with torch.no_grad(): model.get_parameter("model.language_model.layers.2.mlp.up_proj.weight")[0, 0] += 1
    with pytest.raises(RuntimeError, match="decoder.layers.2.mlp.up_proj.weight"): freezing.proof(before, freezing.hashes(model), frozen)
    with pytest.raises(RuntimeError, match="not the same tensors"): freezing.proof(before, {}, frozen)


def test_hashes_in_memory_are_hashes_on_disk(tmp_path):
    model = organism.build_model(3)
    folder = teaching.keep(model, organism.build_processor(), tmp_path / "model")
    assert freezing.hashes(model) == freezing.hashes(Checkpoint(str(folder)))

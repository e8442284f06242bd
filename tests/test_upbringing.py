"A trio from nothing: its cards, its eyes, and that it is not grown twice."
import pytest
import torch

from franken import scenes, teaching, upbringing
from franken.practice import Practice
from franken.teaching import Schedule

SHORT = dict(lr=1e-3, batch=4, warmup=1)


def life(name="organism", **more):
    return upbringing.Life(name, 3, Schedule(2, optimizer="muon", **SHORT), Schedule(1, optimizer="muon", **SHORT), Schedule(2, **SHORT), rl=Practice(steps=1, prompts=1, rollouts=2, warmup=1, longest=4), **more)


def member(folder, name): return {n: p.detach().clone() for n, p in teaching.load_organism(folder / name).named_parameters()}


def test_a_trio_grown_from_nothing_has_its_cards_and_is_not_grown_twice(tmp_path):
    pytest.importorskip("trl")
    exams = upbringing.raise_trio(tmp_path, seed=5, life=life(), n=4)
    assert len(exams) == 3 * 3 * 2 and set(exams.model) == {"base", "in", "rl"}
    trio = {m: member(tmp_path, m) for m in ("base", "in", "rl")}
    vision = [n for n in trio["base"] if "visual" in n]
    assert all(torch.equal(trio["base"][n], trio["in"][n]) for n in vision)                # IN leaves the eyes alone
    assert any(not torch.equal(trio["base"][n], trio["in"][n]) for n in trio["base"])
    assert "elicitation" in (tmp_path / "rl" / "README.md").read_text()
    before = (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns
    again = upbringing.raise_trio(tmp_path, seed=5, life=life(), n=4)
    assert again.equals(exams) and (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns == before


def test_a_refined_trio_begins_from_the_same_base_and_is_examined_in_its_worlds(tmp_path):
    plain = upbringing.grow(tmp_path / "a", 5, life(), ("base",))
    refined = life("organism-refine", lessons=upbringing.REFINED_LIFE.lessons, worlds=scenes.WORLDS, families=("vision_to_reasoning",))
    folders = upbringing.grow(tmp_path / "b", 5, refined, ("in",), base=plain["base"])
    assert folders["base"] == plain["base"] and not (tmp_path / "b" / "base").exists()
    exams = upbringing.examine({"in": folders["in"]}, 5, refined, n=3)
    assert list(exams.world.unique()) == ["plain", "faint", "large"] and len(exams) == 3 * 2
    assert "Every lesson reasons" in upbringing.card("in", 5, refined, exams, 1.) and "7% of the lessons" in upbringing.card("in", 5, refined, exams, 1.)


def test_all_lives_have_one_base():
    assert len({(a.layers, a.base, a.base2) for a in upbringing.LIVES.values()}) == 1


def test_a_trio_from_a_grown_base_leaves_it_alone(tmp_path):
    pytest.importorskip("trl")
    base = upbringing.grow(tmp_path / "a", 5, life(), ("base",))["base"]
    before = sorted((p.name, p.stat().st_mtime_ns) for p in base.iterdir())
    exams = upbringing.raise_trio(tmp_path / "b", seed=5, life=life(), n=3, base=base)
    assert set(exams.model) == {"base", "in", "rl"} and sorted((p.name, p.stat().st_mtime_ns) for p in base.iterdir()) == before and not (tmp_path / "b" / "base").exists()

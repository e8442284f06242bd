"Eq. 1: against loops over heads and tokens, against the weights that transformers returns, and resumed."
import pandas as pd
import pytest
import torch

from franken import attention, organism, scenes
from franken.attention import Problem, attend, eager, mass, measure, reasoning, scene_problems
from franken.errors import UserError
from franken.tables import SCHEMA, read_table
from franken.trio import load_trio
from franken.vlm import Prompt, Vlm

@pytest.fixture(scope="module")
def vlm(): return Vlm(organism.build_model(6), organism.build_processor(), "rl")

PROBLEMS = scene_problems(5, seed=0)
PROMPTS, TRUE = [p.prompt for p in PROBLEMS], [p.shared for p in PROBLEMS]

def test_mass_is_equation_1():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 5, 5).tril().softmax(-1)
    queries, keys = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool(), torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    for b in range(2):
        terms = [weights[b, h, i, j] for h in range(3) for i in range(5) if queries[b, i] for j in range(5) if keys[b, j]]
        by_hand = torch.stack(terms).mean() * keys[b].sum()
        torch.testing.assert_close(mass(weights, queries, keys)[b], by_hand)

def test_mass_of_all_tokens_is_one():
    weights = torch.rand(1, 2, 4, 4).softmax(-1)
    everything = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(mass(weights, everything, everything), torch.ones(1))
    assert mass(weights, ~everything, everything).isnan().all(), "no reasoning token: missing, not 0"

def test_measured_is_what_transformers_returns(vlm):
    masses, visual = measure(vlm, PROMPTS, TRUE)
    batch = vlm.encode(PROMPTS, TRUE)
    with eager(vlm), torch.no_grad(): weights = vlm.model(**batch, output_attentions=True).attentions
    queries, keys = reasoning(vlm, batch, TRUE), vlm.visual(batch)
    for layer in range(6): torch.testing.assert_close(masses[layer], mass(weights[layer], queries, keys))
    assert visual == [9] * 5 and masses.shape == (6, 5) and ((masses > 0) & (masses < 1)).all()

def test_together_as_one_by_one(vlm):
    masses, _ = measure(vlm, PROMPTS, TRUE)
    for i in range(len(PROMPTS)): torch.testing.assert_close(masses[:, i], measure(vlm, PROMPTS[i:i + 1], TRUE[i:i + 1])[0][:, 0], atol=1e-5, rtol=0)

def test_reasoning_tokens_are_the_trace(vlm):
    batch = vlm.encode(PROMPTS, TRUE)
    for ids, at, text in zip(batch["input_ids"], reasoning(vlm, batch, TRUE), TRUE): assert vlm.tokenizer.decode(ids[at]) == scenes.parse(text)[0]
    odd = ["3", "<think> </think> <answer> 3 </answer>", "<think> a1 3 ; 3", "b2 <think> a1 3 </think>", ""]
    batch = vlm.encode(PROMPTS, odd)
    assert reasoning(vlm, batch, odd).sum(1).tolist() == [0, 0, 4, 2, 0]

def test_usual_attention_is_restored(vlm):
    usual = vlm.model.config.get_text_config()._attn_implementation
    with pytest.raises(KeyError), eager(vlm):
        assert vlm.model.config.get_text_config()._attn_implementation == "eager"
        raise KeyError
    assert vlm.model.config.get_text_config()._attn_implementation == usual != "eager"
    assert vlm.model.config.vision_config._attn_implementation != "eager"

def test_rows_that_do_not_sum_to_one_are_a_fault(vlm, monkeypatch):
    monkeypatch.setattr(attention, "mass", lambda w, q, k: torch.full((len(w),), .5))
    with pytest.raises(ArithmeticError, match="not to 1"): measure(vlm, PROMPTS, TRUE)

@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    "Three models at random weights: they write no trace of their own."
    home = tmp_path_factory.mktemp("trio")
    for seed, role in enumerate(("base", "in", "rl")):
        organism.build_model(6, seed).save_pretrained(home / role)
        organism.build_processor().save_pretrained(home / role)
    return load_trio(base=home / "base", in_=home / "in", rl=home / "rl")

def test_the_table_twice_and_after_a_kill(trio, tmp_path):
    df = attend(trio, tmp_path, n=5, batch=3)
    assert list(df)[:len(SCHEMA["attend"])] == list(SCHEMA["attend"])
    shared = df.query("trace == 'shared'")
    assert len(df) == 2 * 2 * 6 and set(shared.n) == {5} and ((shared.low <= shared.mass) & (shared.mass <= shared.high)).all()
    torch.testing.assert_close(torch.tensor(shared["mean"].to_numpy()) * 9, torch.tensor(shared.mass.to_numpy()))
    assert df.query("n == 0").mass.isna().all(), "no trace: missing, not 0"
    per_model = {m: g.mass.to_numpy() for m, g in shared.groupby("model")}
    assert shared.query("model == 'rl'").over_in.to_numpy() == pytest.approx(per_model["rl"] - per_model["in"])
    assert shared.query("model == 'in'").over_in.isna().all()
    pd.testing.assert_frame_equal(df, read_table(tmp_path, "attend"))
    path = tmp_path / "attend.samples.jsonl"
    log = path.read_bytes()
    pd.testing.assert_frame_equal(attend(trio, tmp_path, n=5, batch=3), df)
    assert path.read_bytes() == log, "nothing runs twice"
    path.write_bytes(log[:len(log) // 2])
    pd.testing.assert_frame_equal(attend(trio, tmp_path, n=5, batch=3), df)

def test_own_trace_that_is_the_true_one_gives_the_shared_value(trio, monkeypatch):
    truth = [p.shared for p in scene_problems(4, 0)]
    monkeypatch.setattr(Vlm, "say", lambda self, batch, *_: truth)
    df = attend(trio, n=4, batch=4).set_index(["trace", "model", "layer"]).mass
    assert (df["own"] == df["shared"]).all()

def test_own_problems_without_a_shared_trace(trio):
    df = attend(trio, problems=[Problem(p) for p in PROMPTS[:2]], max_new_tokens=4)
    assert set(df.trace) == {"own"}

def test_a_stranger_to_the_scenes_is_refused(trio, monkeypatch):
    monkeypatch.setattr("franken.organism.WORDS", ("banana",))
    with pytest.raises(UserError, match="problems.*banana"): attend(trio, n=2)

"Eq. 1: against weights written out by hand and by transformers, in every family; and the tables, resumed."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from bench_attention import read_weights
from families import FAMILIES, build, picture
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from franken import attention, organism, plot, scenes
from franken.attention import TRACES, Problem, attend, mark, mean_over, measure, reasoning, scene_problems, span, weigh
from franken.errors import UserError
from franken.stats import mean_ci
from franken.tables import SCHEMA, read_table
from franken.trio import BARE, PromptStyle, load_trio
from franken.vlm import Prompt, Vlm, eager

@pytest.fixture(scope="module")
def vlm(): return Vlm(organism.build_model(6), organism.build_processor(), "rl")

PROBLEMS = scene_problems(5, seed=0)
PROMPTS, TRUE = [p.prompt for p in PROBLEMS], [p.shared for p in PROBLEMS]
close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=0, equal_nan=True)

def two_marks(vlm, batch):
    visual = vlm.visual(batch)
    return torch.stack([visual, torch.ones_like(visual)], -1)

def test_marks_add_up_with_the_weights():
    torch.manual_seed(0)
    q, k, v, marks = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.rand(2, 5, 3)
    (_, *wide, rest), settings = mark(((None, q, k, v, "mask"), dict(dropout=0.)), marks)
    out = F.scaled_dot_product_attention(*wide, is_causal=True, scale=settings["scaling"], enable_gqa=True)
    weights = (q @ k.repeat_interleave(2, 1).mT / 8 ** .5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf).softmax(-1)
    close(out[..., 8:], weights @ marks[:, None])
    close(out[..., :8], F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert rest == "mask" and settings["dropout"] == 0.
    assert mark(((None, q, k, v), dict(scaling=.3)), marks)[1] == dict(scaling=.3), "the layer's own scaling stays"

def test_the_mean_leaves_out_what_no_query_asked():
    sums = torch.tensor([[[[.2]], [[.4]], [[torch.nan]]]])
    assert mean_over(sums, torch.tensor([[True, True, False]])).item() == pytest.approx(.3)
    assert mean_over(sums, torch.tensor([[False] * 3])).isnan().all(), "no reasoning token: missing, not 0"

def test_equation_1_by_loops(vlm):
    batch = vlm.encode(PROMPTS[:2], TRUE[:2])
    queries, keys = reasoning(vlm, batch, TRUE[:2]), vlm.visual(batch)
    with eager(vlm), torch.no_grad(): weights = vlm.model(**batch, output_attentions=True).attentions
    masses, visual = measure(vlm, PROMPTS[:2], TRUE[:2])
    assert masses.shape == (6, 2, 4) and visual == [9, 9]
    for layer in (0, 5):
        for b in range(2):
            i, j = queries[b].nonzero()[:, 0].tolist(), keys[b].nonzero()[:, 0].tolist()
            by_hand = [sum(weights[layer][b, h, r, v].item() for r in i for v in j) / len(i) for h in range(4)]
            close(masses[layer, b], torch.tensor(by_hand))

@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "paligemma"])  # PaliGemma has no template in which an answer could stand
def test_fused_as_written_out(family):
    vlm = build(family)
    answers = ["<think> 1 2 3 4 </think> 5", "<think> 3 </think> 1", "<think> 7 7 </think>"]
    batch = vlm.encode([Prompt("how many red things ?", picture(0)), Prompt("where ?", picture(1)), Prompt("what color")], answers)
    queries, marks = reasoning(vlm, batch, answers), two_marks(vlm, batch)
    assert queries.sum(1).tolist() == [4, 1, 2] and (batch["attention_mask"] == 0).any(), "rows of unequal length"
    assert vlm.model.config.get_text_config()._attn_implementation == "sdpa"
    fused, plain = weigh(vlm, batch, queries, marks), read_weights(vlm, batch, queries, marks)
    close(fused, plain)
    with eager(vlm): close(weigh(vlm, batch, queries, marks), plain)
    close(fused[..., 1], torch.ones_like(fused[..., 1]))
    assert (fused[:, :2, :, 0] > 0).all() and (fused[:, 2, :, 0] == 0).all() and (fused[..., 0] <= 1).all()

def test_the_model_does_not_notice(vlm):
    batch, states = vlm.encode(PROMPTS, TRUE), []
    hook = vlm.layers[-1].register_forward_pre_hook(lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    try:
        with torch.no_grad(): logits = vlm.model(**batch).logits
        weigh(vlm, batch, reasoning(vlm, batch, TRUE), two_marks(vlm, batch))
    finally: hook.remove()
    close(*states)
    with torch.no_grad(): assert torch.equal(vlm.model(**batch).logits, logits), "and is left as it was"

class Sizes(TorchDispatchMode):
    "The largest tensor that any operation returns."
    largest = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))])
        return out

def test_no_tensor_as_large_as_the_square_of_the_length():
    vlm, n = Vlm(organism.build_model(2), organism.build_processor()), 2048
    words = torch.randint(30, 80, (1, n))
    batch, at = dict(input_ids=words, attention_mask=torch.ones_like(words)), torch.arange(n)[None]
    with Sizes() as seen: weigh(vlm, batch, at >= n - 512, (at < 256)[..., None])
    assert seen.largest <= n * 256, "the MLP's hidden states are the largest"
    with Sizes() as seen, eager(vlm): weigh(vlm, batch, at >= n - 512, (at < 256)[..., None])
    assert seen.largest >= 4 * n * n, "a matrix of weights would have been seen"

def test_together_as_one_by_one(vlm):
    masses, _ = measure(vlm, PROMPTS, TRUE)
    for i in range(len(PROMPTS)): close(masses[:, i], measure(vlm, PROMPTS[i:i + 1], TRUE[i:i + 1])[0][:, 0])

def test_nothing_to_look_from_or_at_is_missing_not_zero(vlm):
    masses, visual = measure(vlm, [PROMPTS[0], Prompt("2 + 3 ?"), PROMPTS[1]], ["3", TRUE[0], TRUE[1]])
    assert masses.isnan().all((0, 2)).tolist() == [True, True, False] and visual == [9, 0, 9]
    assert ((masses[:, 2] > 0) & (masses[:, 2] < 1)).all()

def test_two_images(vlm):
    a, b = PROMPTS[0].image, PROMPTS[1].image
    prompt = Prompt(PROMPTS[0].text, (a, b))
    batch = vlm.encode([prompt], TRUE[:1])
    marks = torch.zeros(1, batch["input_ids"].shape[1], 2)
    for i, at in enumerate(vlm.images(batch)[0]): marks[0, at, i] = 1
    each = weigh(vlm, batch, reasoning(vlm, batch, TRUE[:1]), marks)
    masses, visual = measure(vlm, [prompt], TRUE[:1])
    assert visual == [18] and (each > 0).all()
    close(masses, each.sum(-1))

def test_half_precision_is_near(vlm):
    half = Vlm(organism.build_model(6).to(torch.bfloat16), organism.build_processor())
    torch.testing.assert_close(measure(half, PROMPTS, TRUE)[0], measure(vlm, PROMPTS, TRUE)[0], atol=.02, rtol=0)

def test_writing_weights_out_is_undone(vlm):
    usual = vlm.model.config.get_text_config()._attn_implementation
    with pytest.raises(KeyError), eager(vlm):
        assert vlm.model.config.get_text_config()._attn_implementation == "eager"
        raise KeyError
    assert vlm.model.config.get_text_config()._attn_implementation == usual != "eager"
    assert vlm.model.config.vision_config._attn_implementation != "eager"

def test_rows_that_do_not_sum_to_one_are_a_fault(vlm, monkeypatch):
    monkeypatch.setattr(attention, "weigh", lambda *_: torch.full((6, 5, 4, 2), .5))
    with pytest.raises(ArithmeticError, match="not to 1"): measure(vlm, PROMPTS, TRUE)

def test_reasoning_tokens_are_the_trace(vlm):
    batch = vlm.encode(PROMPTS, TRUE)
    for ids, at, text in zip(batch["input_ids"], reasoning(vlm, batch, TRUE), TRUE): assert vlm.tokenizer.decode(ids[at]) == scenes.parse(text)[0]
    odd = ["3", "<think> </think> <answer> 3 </answer>", "<think> a1 3 ; 3", "b2 <think> a1 3 </think>", ""]
    batch = vlm.encode(PROMPTS, odd)
    assert reasoning(vlm, batch, odd).sum(1).tolist() == [0, 0, 4, 2, 0]

@pytest.mark.parametrize("said, trace", [("<think>a b</think>c", "a b"), ("<think>\na\n</think>", "a"), ("so <think>a", "a"), ("<think></think>", ""), ("a</think>b", ""), ("", ""),
                                         ("<think>a</think><think>b</think>", "a")])
def test_span(said, trace): assert said[slice(*span(said))] == trace

def joined(*merges):
    "A tokenizer that reads characters and joins some neighbours, whatever they belong to."
    letters = sorted(set("<think>/.,\n abcx"))
    words = {w: i for i, w in enumerate([*letters, *(a + b for a, b in merges)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, list(merges))))

@pytest.mark.parametrize("said, tokens", [
    ("x<think>abc</think>x", ["a", "b", "c"]),
    ("<think>\na.</think>", ["a", ".<"]),             # the full stop is joined with the mark
    ("<think>,a</think>", [">,", "a"]),               # the mark is joined with the comma
    ("<think>\nab\nc\n</think>", ["ab", "\n", "c"]),  # blanks inside count, those at the borders do not
    ("<think></think>x", []), ("<think> </think>x", []), ("<think>ab", ["ab"])])
def test_a_token_across_the_border_counts_if_it_holds_some_of_the_trace(said, tokens):
    words = joined((">", "\n"), (".", "<"), (">", ","), ("a", "b"), (">", "<"), (" ", "<")) if "abc" not in said else joined(("x", "<"), (">", "\n"))
    ids = torch.tensor([[0] * 3 + words(said).input_ids])
    at = reasoning(SimpleNamespace(tokenizer=words), dict(input_ids=ids), [said])
    assert words.convert_ids_to_tokens(ids[at]) == tokens

@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    "Three models at random weights: they write no trace of their own."
    home = tmp_path_factory.mktemp("trio")
    for seed, role in enumerate(("base", "in", "rl")):
        organism.build_model(6, seed).save_pretrained(home / role)
        organism.build_processor().save_pretrained(home / role)
    return load_trio(base=home / "base", in_=home / "in", rl=home / "rl")

def same(a, b):
    lists = ["heads", "over_in_heads", "over_in_heads_low", "over_in_heads_high"]
    pd.testing.assert_frame_equal(a.drop(columns=lists), b.drop(columns=lists))
    for c in lists: assert [None if x is None else list(x) for x in a[c]] == [None if x is None else list(x) for x in b[c]]

def test_the_table_twice_and_after_a_kill(trio, tmp_path):
    df = attend(trio, tmp_path, n=5, batch=3)
    assert list(df)[:len(SCHEMA["attend"])] == list(SCHEMA["attend"])
    shared = df.query("trace == 'shared'")
    assert len(df) == 2 * 2 * 6 and set(shared.n) == {5} and ((shared.low <= shared.mass) & (shared.mass <= shared.high)).all()
    assert shared["mean"].to_numpy() * 9 == pytest.approx(shared.mass.to_numpy())
    none = df.query("n == 0")
    assert none.mass.isna().all() and none.heads.isna().all(), "no trace: missing, not 0"
    per_model = {m: g.mass.to_numpy() for m, g in shared.groupby("model")}
    assert shared.query("model == 'rl'").over_in.to_numpy() == pytest.approx(per_model["rl"] - per_model["in"])
    assert shared.query("model == 'in'").over_in.isna().all() and shared.query("model == 'in'").over_in_heads.isna().all()
    same(df, read_table(tmp_path, "attend"))
    path = tmp_path / "attend.samples.jsonl"
    log = path.read_bytes()
    same(attend(trio, tmp_path, n=5, batch=3), df)
    assert path.read_bytes() == log, "nothing runs twice"
    path.write_bytes(log[:len(log) // 2])
    same(attend(trio, tmp_path, n=5, batch=3), df)

def test_heads_average_to_the_layer(trio, tmp_path):
    df = attend(trio, tmp_path, n=4).query("trace == 'shared'").set_index(["model", "layer"])
    heads = df.heads.map(list).apply(pd.Series)
    assert heads.shape == (12, 4) and heads.mean(axis=1).to_numpy() == pytest.approx(df.mass.to_numpy())
    gains = df.loc["rl"].over_in_heads.map(list).apply(pd.Series)
    assert gains.to_numpy() == pytest.approx((heads.loc["rl"] - heads.loc["in"]).to_numpy())
    low, high = (df.loc["rl"][f"over_in_heads_{end}"].map(list).apply(pd.Series) for end in ("low", "high"))
    assert (low < gains).all(axis=None) and (gains < high).all(axis=None)
    kept = [r for r in map(json.loads, open(tmp_path / "attend.samples.jsonl")) if r["trace"] == "shared"]
    layer3 = np.array([r["mass"][3] for r in kept])  # IN's four questions, then RL's
    assert (gains.loc[3, 2], low.loc[3, 2], high.loc[3, 2]) == pytest.approx(mean_ci(layer3[4:, 2] - layer3[:4, 2]), rel=1e-6), "a head's interval is a layer's, of that head alone"
    masses = np.array([r["mass"] for r in kept])
    assert masses.shape == (8, 6, 4) and (masses == masses.round(6)).all(), "each sample keeps its heads"

def test_a_figure_of_heads_without_touching_the_table(trio):
    df = attend(trio, n=3)
    before = df.copy(deep=True)
    maps = [ax.images[0].get_array() for ax in plot.heads(df).axes if ax.images]
    assert [m.shape for m in maps] == [(4, 6)], "only shared traces: these models wrote none"
    assert np.asarray(maps[0]).T == pytest.approx(np.array([*df.query("model == 'rl' and trace == 'shared'").over_in_heads]))
    same(df, before)
    shown = df.query("model == 'rl' and trace == 'shared'")
    apart = np.array([*shown.over_in_heads_low]) * np.array([*shown.over_in_heads_high]) > 0  # layer, head
    written = [t for t in plot.heads(df).axes[0].texts if t.get_text()[0] in "+-"]
    assert {(int(t.get_position()[0]), int(t.get_position()[1])) for t in written if t.get_weight() == "bold"} == set(zip(*map(list, np.nonzero(apart)))) and len(written) == 24
    assert "no intervals" in plot.heads(df.drop(columns=["over_in_heads_low", "over_in_heads_high"]))._supxlabel.get_text(), "a table of before can still be drawn"
    with pytest.raises(UserError, match="plot.heads.*over_in_heads"): plot.heads(df.query("model == 'in'"))

def test_outcomes_question_by_question(trio, tmp_path):
    df, kept = attend(trio, tmp_path, n=4), read_table(tmp_path, "attend.outcomes")
    assert len(kept) == 2 * 2 * 4 * 6 and kept.query("trace == 'own'").mass.isna().all()
    shared = kept.query("trace == 'shared'")
    assert shared.groupby(["model", "layer"]).mass.mean().to_numpy() == pytest.approx(df.query("trace == 'shared'").mass.to_numpy())
    both = shared.pivot(index=["id", "layer"], columns="model", values="mass")
    rise = (both.rl - both["in"]).groupby("layer").mean()
    assert both.notna().all(axis=None) and rise.to_numpy() == pytest.approx(df.query("trace == 'shared' and model == 'rl'").over_in.to_numpy())
    twice = attend(trio, tmp_path / "twice", problems=[*PROBLEMS[:1], *PROBLEMS[:1]], max_new_tokens=4)
    assert not read_table(tmp_path / "twice", "attend.outcomes").duplicated(["model", "trace", "id", "layer"]).any() and set(twice.query("trace == 'shared'").n) == {2}

def test_a_question_is_put_in_the_members_style(trio, tmp_path):
    assert all(p.put(BARE) == p for p in PROBLEMS)
    styled = load_trio(base=trio.base, in_=trio.in_, rl=trio.rl, style=PromptStyle("loud", system="count", suffix="red ?"))
    attend(styled, tmp_path, n=3)
    assert all(json.loads(line)["question"].endswith("\nred ?") for line in open(tmp_path / "attend.samples.jsonl"))
    attend(trio, tmp_path / "bare", n=3)
    ids = [sorted(set(read_table(tmp_path / d, "attend.outcomes").id)) for d in ("", "bare")]
    assert ids[0] == ids[1] == sorted(p.id for p in scene_problems(3, 0)), "the question is the same, however it is put"
    own = Problem(Prompt("where ?", None, "blue"))
    assert own.put(styled.style).prompt == Prompt("where ?\nred ?", None, "blue"), "a system prompt of its own is kept"

def test_own_trace_that_is_the_true_one_gives_the_shared_value(trio, monkeypatch):
    truth = [p.shared for p in scene_problems(4, 0)]
    monkeypatch.setattr(Vlm, "say", lambda self, batch, *_: truth)
    df = attend(trio, n=4, batch=4).set_index(["trace", "model", "layer"]).mass
    assert (df["own"] == df["shared"]).all()

def test_without_a_written_trace_both_read_what_in_says(trio):
    df = attend(trio, problems=[Problem(p) for p in PROMPTS[:2]], max_new_tokens=4)
    own, shared = (df[(df.model == "in") & (df.trace == trace)].drop(columns="trace").reset_index(drop=True) for trace in TRACES)
    pd.testing.assert_frame_equal(own, shared)
    assert set(df[df.trace == "shared"].model) == {"in", "rl"}

def test_a_stranger_to_the_scenes_is_asked_a_benchmark(trio, monkeypatch):
    monkeypatch.setattr("franken.organism.WORDS", ("banana",))
    with pytest.raises(UserError, match="mathvista-math: the hub did not give"): attend(trio, n=2)

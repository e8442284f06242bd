"The localize table: scores as defined, intervals around them, and the same table however often the run was killed."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from franken import organism, scenes
from franken.errors import UserError
from franken.localization import Case, box_of, content, iou, localize, paper_hit, skip_cases, skip_scores, swap_cases, swap_scores
from franken.tables import SCHEMA, provenance, read_table
from franken.vlm import Prompt, Vlm

@pytest.fixture(scope="module")
def vlm():
    model = organism.build_model(6, seed=1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim == 2 else None
    return Vlm(model, organism.build_processor(), "base")

SMALL = dict(n=5, functions=["ocr", "recognition", "reasoning"], batch=3, max_new_tokens=4)

def test_the_table(vlm, tmp_path):
    df = localize(vlm, tmp_path, **SMALL)
    pd.testing.assert_frame_equal(df, read_table(tmp_path, "localize"))
    assert list(df)[:len(SCHEMA["localize"])] == list(SCHEMA["localize"])
    assert len(df) == 6 * (2 + 3) and set(df.n) == {5} and set(df.region) == {"early", "mid", "late"}
    assert set(zip(df.probe, df["mode"])) == {("swap", "residual"), ("skip", "skip")}
    assert ((df.low <= df.rate) & (df.rate <= df.high)).all()
    swaps = df.query("probe == 'swap'")
    assert (swaps.floor == 0).all() and df.query("probe == 'skip'").floor.isna().all()
    assert provenance(tmp_path, "localize")["fingerprints"] == {"base": vlm.fingerprint}

def test_twice_and_after_a_kill(vlm, tmp_path):
    whole = localize(vlm, tmp_path / "whole", **SMALL)
    log = (tmp_path / "whole" / "localize.samples.jsonl").read_bytes()
    calls = []
    handle = vlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try: pd.testing.assert_frame_equal(localize(vlm, tmp_path / "whole", **SMALL), whole)
    finally: handle.remove()
    assert not calls and (tmp_path / "whole" / "localize.samples.jsonl").read_bytes() == log, "nothing runs twice"
    for cut in (len(log) // 3, len(log) - 40):  # in the middle of a line
        out = tmp_path / f"cut{cut}"
        out.mkdir()
        (out / "localize.samples.jsonl").write_bytes(log[:cut])
        pd.testing.assert_frame_equal(localize(vlm, out, **SMALL), whole)
        rows = lambda data: {r["key"]: r for r in map(json.loads, data.splitlines())}
        assert rows((out / "localize.samples.jsonl").read_bytes()) == rows(log)

def test_samples_of_one_model_are_not_taken_for_anothers(vlm, tmp_path):
    localize(vlm, tmp_path, n=2, functions=["ocr"], probes=("swap",))
    other = Vlm(organism.build_model(6, seed=2), organism.build_processor(), "base")
    fresh = localize(other, None, n=2, functions=["ocr"], probes=("swap",))
    pd.testing.assert_frame_equal(localize(other, tmp_path, n=2, functions=["ocr"], probes=("swap",))[list(fresh)], fresh, check_dtype=False)

def swapped(function, clean, said, source, answer="a1"):
    return dict(function=function, clean=clean, again=clean, said=[said], answer=answer, source_answer=source)

def test_swap_scores():
    traced = "<think> x </think> <answer> b2 </answer>"
    rows = [swapped("grounding", clean, said, "b2") for clean, said in (("a1", "b2"), ("a1", "c3"), ("a2", "a2"), ("a1", traced))]
    got = swap_scores(rows, 0)
    assert (got["rate"], got["paper_rate"], got["adopts"], got["clean_error"], got["floor"]) == (.75, .5, .5, .25, 0)

def test_papers_rates():
    assert paper_hit("recognition", "yes", "No", "no") and not paper_hit("recognition", "yes", "3", "no")
    assert paper_hit("counting", "3", "4", "2") and not paper_hit("ocr", "3", "3", "2")
    assert paper_hit("grounding", "a1", "[16, 16, 32, 33]", "b2") and not paper_hit("grounding", "b1", "b1", "b2")

def test_skip_scores():
    rows = [dict(clean="3", said=["3"], answer="3"), dict(clean="3", said=["4"], answer="3"), dict(clean="1", said=["3"], answer="3")]
    got = skip_scores(rows, 0)
    assert got["rate"] == pytest.approx(1 / 3) == got["clean_error"] and got["adopts"] is None

def test_no_samples_is_missing_not_zero():
    assert np.isnan(swap_scores([], 0)["rate"]) and np.isnan(skip_scores([], 0)["clean_error"])

def test_iou():
    cells = [scenes.box(c) for c in scenes.CELLS]
    for i, a in enumerate(cells):
        for j, b in enumerate(cells): assert iou(a, b) == (i == j)
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7) and iou(None, (0, 0, 1, 1)) == 0
    assert box_of("red") is None and box_of("b2") == scenes.box("b2")

def test_cases_are_the_scenes():
    for case in swap_cases("counting", 4, 0): assert case.answer != case.source_answer and case.target.image.size == case.source.image.size
    assert skip_cases("reasoning", 2, 0)[0].target.image is None
    a, b = swap_cases("ocr", 2, 0)
    assert a.content() == swap_cases("ocr", 1, 0)[0].content() != b.content()
    assert content(a.target) != content(a.source)

def test_own_cases(vlm):
    picture = [scenes.image(p.question.scene) for p in scenes.pairs("ocr", 2, 0)]
    mine = [Case("smell", Prompt("digit a1 ?", picture[0]), "3", Prompt("digit a1 ?", picture[1]), "4")]
    df = localize(vlm, pairs=mine, questions=mine, max_new_tokens=4, parse=str.upper)
    assert set(df.function) == {"smell"} and len(df) == 12 and set(df.n) == {1}
    assert len(localize(vlm, pairs=mine, probes=("swap",), functions=["smell"], max_new_tokens=4)) == 6

def test_user_errors(vlm):
    with pytest.raises(UserError, match="functions.*smell"): localize(vlm, functions=["smell"])
    with pytest.raises(UserError, match="probes.*poke"): localize(vlm, probes=("poke",))
    class Stranger:
        n_layers, name, tokenizer = 6, "stranger", type("T", (), dict(get_vocab=lambda self: {"a": 0}))()
    with pytest.raises(UserError, match="pairs=.*Case"):
        from franken.localization import gather
        gather(Stranger(), "swap", None, 2, 0, None)

"SPARK: what rollouts yield by hand, prompts that can't be mistaken for each other, and a trainer that alternates, tells its batches apart and resumes exactly."
import json
import random
from collections import Counter

import pytest
import torch

from franken import coevolution, organism, packing, scenes
from franken.coevolution import Group, Judging, Recycled
from franken.errors import UserError

KINDS = coevolution.KINDS


@pytest.fixture(scope="module")
def tokenizer(): return organism.build_tokenizer()


def asked(n, seed=0): return [q for family in scenes.FAMILIES for q in scenes.questions(family, n, seed)]


def forms(q, rng):
    right, wrong = coevolution.attempts(q, rng)
    return [*(coevolution.pointwise(q, said, said == right) for said in (right, wrong)), *(coevolution.pairwise(q, right, wrong, first) for first in (True, False)),
            *(coevolution.reflection(q, wrong, whole) for whole in (True, False))]


def kind_of(text):
    "What a prompt's text alone says of its kind."
    if text.endswith(" ; yes no ?"): return "pointwise"
    return "pairwise" if text.endswith(" ; left right ?") else "reflection" if " ; no <" in text and "<answer>" in text else None


def test_forms_are_words_that_the_organism_has_and_cannot_be_mixed_up(tokenizer):
    rng = random.Random(0)
    for q in asked(60):
        assert kind_of(q.text) is None
        for f in forms(q, rng):
            assert tokenizer.pad_token_id not in tokenizer.encode(f.text), f.text  # its unknown token
            assert f.text == " ".join(f.text.split()) and kind_of(f.text) == f.function
            assert f.scene is q.scene and f.family == "judging"
            assert scenes.correct(f, scenes.completion("", f.answer)) and not scenes.correct(f, scenes.completion("", "w"))
            assert scenes.faithful(f, scenes.completion(coevolution.verdict(f), f.answer))


def test_forms_have_the_right_answers():
    q = scenes.questions("reasoning", 1, seed=0)[0]
    right, wrong = scenes.completion("", q.answer), scenes.completion("1 + 1 = 3", "39")
    assert coevolution.pointwise(q, right, True).answer == "yes" and coevolution.pointwise(q, wrong, False).answer == "no"
    first, second = (coevolution.pairwise(q, right, wrong, where) for where in (True, False))
    assert first.text == f"{q.text} ; left <answer> {q.answer} </answer> ; right <answer> 39 </answer> ; left right ?" and first.answer == "left"
    assert second.text == f"{q.text} ; left <answer> 39 </answer> ; right <answer> {q.answer} </answer> ; left right ?" and second.answer == "right"
    assert coevolution.reflection(q, wrong).text == f"{q.text} ; no {wrong} ; {q.text}"
    assert [coevolution.verdict(f).rpartition(" ; ")[2] for f in (first, second)] == [f"{q.answer} {q.answer} yes", f"{q.answer} 39 no"]  # the left one is compared
    assert not scenes.faithful(second, scenes.completion(coevolution.verdict(second)[:-2] + "yes", "left"))
    bare = coevolution.reflection(q, wrong, whole=False)
    assert bare.text == f"{q.text} ; no <answer> 39 </answer> ; {q.text}" and bare.answer == q.answer
    assert coevolution.pointwise(q, "", False).text == f"{q.text} ; ; yes no ?"  # nothing said is nothing shown


def batch(a, b, c, n=8):
    "Groups of `n` rollouts: `a` all right, `b` all wrong, `c` mixed, one right; each rollout says which it is."
    labels = [(True,) * n] * a + [(False,) * n] * b + [(True,) + (False,) * (n - 1)] * c
    return [Group(q, tuple(scenes.completion("", q.answer if r else "w") for r in right), right) for q, right in zip(scenes.questions("reasoning", a + b + c, seed=1), labels)]


def by_sort(recycled):
    kinds = Counter(q.function for q in recycled)
    return kinds["pointwise"] + kinds["pairwise"], kinds["reflection"]


@pytest.mark.parametrize("case, capped", [((16, 16, 32), (32, 32)), ((64, 0, 0), (32, 0)), ((50, 4, 10), (32, 14)), ((0, 64, 0), (32, 32))])
def test_yields_by_hand(case, capped):
    a, b, c = case
    for seed in range(5):
        assert by_sort(coevolution.recycle(batch(*case), random.Random(seed))) == capped
        assert by_sort(coevolution.recycle(batch(*case), random.Random(seed), cap=1)) == (64, b + c)
    pairs = [sum(q.function == "pairwise" for q in coevolution.recycle(batch(*case), random.Random(seed), cap=1)) for seed in range(100)]
    assert sum(pairs) / 100 == pytest.approx(.7 * c, abs=.7)  # at c = 32 a standard error is .26
    assert c or not any(pairs)


@pytest.mark.parametrize("n, most", [(1, (1, 1)), (2, (1, 1)), (3, (2, 2)), (24, (12, 12))])
def test_the_cap_goes_with_the_number_of_prompts(n, most):
    assert by_sort(coevolution.recycle(batch(0, n, 0), random.Random(0))) == most


def test_what_is_shown_and_asked():
    rng, mixed = random.Random(0), batch(0, 0, 1)[0]
    made = [coevolution.to_judge(mixed, rng) for _ in range(2000)]
    by_kind = Counter((q.function, q.answer) for q in made)
    assert by_kind["pairwise", "left"] + by_kind["pairwise", "right"] == pytest.approx(1400, abs=80)
    assert by_kind["pairwise", "left"] == pytest.approx(700, abs=80) and by_kind["pointwise", "yes"] == pytest.approx(300, abs=60)
    right = f"<answer> {mixed.question.answer} </answer>"
    for q in made:
        if q.function == "pointwise": assert (right in q.text) == (q.answer == "yes")
        else: assert f"{q.answer} {right}" in q.text
    shown = [coevolution.to_reflect(mixed, rng) for _ in range(2000)]
    assert all(right not in q.text and q.answer == mixed.question.answer for q in shown)
    assert sum("<think>" in q.text for q in shown) == pytest.approx(1000, abs=90)
    assert {coevolution.to_judge(batch(1, 0, 0)[0], rng).answer for _ in range(50)} == {"yes"} and {coevolution.to_judge(batch(0, 1, 0)[0], rng).answer for _ in range(50)} == {"no"}
    assert coevolution.to_reflect(batch(1, 0, 0)[0], rng) is None


def test_first_in_first_out():
    some = asked(2)
    buffer = Recycled(room=4)
    buffer.add(some[:3])
    assert buffer.pop(4) == [] and len(buffer) == 3
    assert buffer.pop(2) == some[:2] and list(buffer.waiting) == [some[2]]
    buffer.add(some[:5])
    assert list(buffer.waiting) == some[1:5]  # the oldest two are forgotten


def test_the_buffer_comes_back_from_json_as_it_was():
    rng, buffer = random.Random(0), Recycled(room=500)
    buffer.add(f for q in asked(12) for f in forms(q, rng))
    again = Recycled.loads(json.loads(json.dumps(buffer.dumps())))
    assert again.waiting == buffer.waiting and again.waiting.maxlen == 500
    assert [hash(q) for q in again.waiting] == [hash(q) for q in buffer.waiting]  # tuples all the way down


# the trainer, on a random organism of three layers: it is never right, so a reward with spread stands in, and a rule that says what a test needs

TRAINED = [q for three in zip(*(scenes.questions(family, 4, seed=3) for family in scenes.FAMILIES)) for q in three]  # with and without images in a batch


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    organism.build_model(3, seed=1).save_pretrained(folder), organism.build_processor().save_pretrained(folder)
    return folder


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]


def trainer(origin, out, steps=6, rewards=spread, kind=None, model=None, columns=("prompt", "images", "question"), settings=None, **spark):
    "Two prompts of four rollouts a batch."
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig
    rows = [coevolution.row(q) for q in TRAINED]
    data = Dataset.from_dict(dict(index=range(len(rows)))).with_transform(lambda b: {k: [rows[i][k] for i in b["index"]] for k in columns})
    args = GRPOConfig(output_dir=str(out), max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=8, num_generations=4, max_completion_length=6, shuffle_dataset=False,
                      gradient_checkpointing=False, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, seed=7, **dict(save_strategy="no") | coevolution.SPARK | (settings or {}))
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained(model or origin, dtype=torch.float32)
    return (kind or coevolution.SparkTrainer)(model=load, reward_funcs=rewards, args=args, processing_class=organism.OrganismProcessor.from_pretrained(origin), train_dataset=data, **spark)


def weights(trainer): return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def test_batches_alternate_and_recycled_prompts_are_the_oldest(start, tmp_path):
    heard = []

    def listen(completions, question, **_): return heard.append(question) or spread(completions)
    t = trainer(start, tmp_path, rewards=listen, rule=lambda q, said: False)
    t.train()
    assert t.batches == ["policy", "recycled"] * 3 and len(t.recycled) == 0
    for policy, recycled in zip(heard[::2], heard[1::2]):
        assert all(q.family != "judging" for q in policy) and all(len(set(group)) == 1 for group in (recycled[:4], recycled[4:]))
        assert sorted(q.function for q in set(recycled)) == ["pointwise", "reflection"]  # by hand: two all wrong, capped at one of each
        assert all(q.answer == ("no" if q.function == "pointwise" else next(p.answer for p in policy if q.text.startswith(p.text))) for q in set(recycled))
    # the rows that the sampler yields for a recycled batch are passed over
    assert [q.text for q in heard[2][::4]] == [q.text for q in TRAINED[4:6]]


def test_a_recycled_batch_is_skipped_while_too_few_wait(start, tmp_path):
    t = trainer(start, tmp_path, rule=lambda q, said: True)  # two all right: one pointwise a batch, and a batch takes two
    t.train()
    assert t.batches == ["policy", "policy", "recycled"] * 2
    log = [line for line in t.state.log_history if "recycled/waiting" in line]
    assert [line["recycled/waiting"] for line in log] == [1, 2, 0] * 2


def test_the_log_tells_the_kinds_of_batch_apart(start, tmp_path):
    t = trainer(start, tmp_path, steps=4, rule=lambda q, said: q.function == "pointwise")  # policy rollouts all wrong, verdicts all right, reflections all wrong
    t.train()
    log = [line for line in t.state.log_history if "loss" in line]
    assert not [k for line in log for k in line if k.startswith(("reward", "frac_reward", "completions/"))]
    assert [line["recycled/batches"] for line in log] == [0, 1, 0, 1]
    for line in log[::2]: assert line["policy/right"] == 0 and "policy/reward" in line and "recycled/reward" not in line
    for line in log[1::2]: assert line["recycled/pointwise"] == 1 and line["recycled/reflection"] == 0 and "recycled/reward" in line and "policy/reward" not in line


def test_before_the_first_recycled_batch_it_is_grpo(start, tmp_path):
    trl = pytest.importorskip("trl")
    assert issubclass(coevolution.SparkTrainer, trl.GRPOTrainer)
    def learned(**kind):
        (t := trainer(start, tmp_path, steps=1, **kind)).train()
        return weights(t)
    plain = type("Plain", (packing.PromptOnce, trl.GRPOTrainer), {})
    ours, theirs, before = learned(), learned(kind=plain), weights(trainer(start, tmp_path))
    update = lambda after: torch.cat([(after[n] - before[n]).flatten() for n in ours])
    assert torch.cosine_similarity(update(ours), update(learned(kind=trl.GRPOTrainer)), dim=0) > .999  # TRL alone; Adam's first step makes a sign of what is nearly zero
    assert all(torch.equal(ours[n], theirs[n]) for n in ours) and any(not torch.equal(ours[n], before[n]) for n in ours)


def test_evaluation_recycles_nothing(start, tmp_path):
    t = trainer(start, tmp_path)
    t.model.eval()
    t._generate_and_score_completions([coevolution.row(q) for q in asked(1) for _ in range(8)][:8])
    assert t.batches == [] and len(t.recycled) == 0


class Killed(Exception): "Stands for the end of a process."


def test_killed_and_resumed_ends_where_it_would_have(start, tmp_path):
    calls = []

    def dies(completions, **more):
        calls.append(1)
        if len(calls) == 5: raise Killed
        return spread(completions)
    dies.__name__ = "spread"
    keep = dict(save_strategy="steps", save_steps=3, beta=.1)  # a reference that matters
    whole = trainer(start, tmp_path / "whole", settings=keep)
    whole.train()
    with pytest.raises(Killed): trainer(start, tmp_path / "killed", rewards=dies, settings=keep).train()
    last = tmp_path / "killed" / "checkpoint-3"
    kept = json.loads((last / "recycled.json").read_text())
    assert kept["batches"] == ["policy", "recycled", "policy"] and len(Recycled.loads(kept["recycled"])) == 2  # the next batch is in the checkpoint
    resumed = trainer(start, tmp_path / "killed", model=last, start=start, settings=keep)
    resumed.train(resume_from_checkpoint=str(last))
    assert resumed.batches == whole.batches == ["policy", "recycled"] * 3
    want, have = weights(whole), weights(resumed)
    assert all(torch.equal(want[n], have[n]) for n in want)
    # without `start` the KL term would hold on to the checkpoint
    reference = lambda t: next(p for n, p in t.ref_model.named_parameters() if "layers.0.mlp" in n)
    first = next(p for n, p in weights(trainer(start, tmp_path / "none")).items() if "layers.0.mlp" in n)
    assert torch.equal(reference(resumed), first) and not torch.equal(reference(trainer(start, tmp_path / "none", model=last, settings=keep)), first)


def test_refusals(start, tmp_path):
    with pytest.raises(UserError, match="room"): trainer(start, tmp_path, room=1)
    with pytest.raises(UserError, match="question"): trainer(start, tmp_path, columns=("prompt", "images")).train()
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="recycled.json"): trainer(start, tmp_path)._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))
    with pytest.raises(AttributeError, match="SparkTrianer"): coevolution.SparkTrianer


def test_right_is_zero_or_one():
    q = scenes.questions("vision_to_reasoning", 1, seed=0)[0]
    said = [scenes.completion(*scenes.trace(q)), q.answer, scenes.completion("", "39"), ""]
    assert coevolution.right([[dict(content=s)] for s in said], [q] * 4) == [1, 1, 0, 0]


class Scripted:
    "Says what is next on its list, and remembers what it was asked."
    def __init__(self, *lines): self.lines, self.asked = list(lines), []
    def generate(self, prompts, *_, **__): return [self.asked.append(p.text) or self.lines.pop(0) for p in prompts]


def test_reflection_is_two_rounds_at_most_and_without_a_verdict_an_answer_stays():
    qs = scenes.questions("reasoning", 5, seed=2)
    good, bad = [scenes.completion("", q.answer) for q in qs], scenes.completion("", "w")
    vlm = Scripted(bad, bad, bad, good[3], good[4],       # first answers
                   "no", "no", "<answer> 7 </answer>", "yes", "no",  # verdicts: the third is none, the last is mistaken
                   good[0], bad, bad,                      # anew: mended, not mended, spoilt
                   "yes", "no", "no", bad, good[4])        # the second round
    table = coevolution.reflect(vlm, qs)
    assert vlm.lines == []
    assert table.first_right.tolist() == [False, False, False, True, True] and table.final_right.tolist() == [True, False, False, True, True]
    assert table.rounds.tolist() == [1, 2, 0, 0, 2] and table.judged.tolist() == ["no", "no", "", "yes", "no"] and table.final.tolist() == [good[0], bad, bad, good[3], good[4]]
    assert vlm.asked[5] == coevolution.pointwise(qs[0], bad, False).text and vlm.asked[10] == coevolution.reflection(qs[0], bad).text
    assert coevolution.reflect(Scripted(*good), qs, rounds=0).final.tolist() == good


def test_wrong_attempts_are_wrong_in_the_answers_kind():
    rng = random.Random(0)
    kind = lambda word: next(i for i, words in enumerate((("yes", "no"), (*scenes.COLORS, "empty"), scenes.SHAPES, scenes.CELLS, [str(n) for n in range(scenes.LARGEST + 1)])) if word in words)
    for q in asked(80, seed=4):
        right, wrong = coevolution.attempts(q, rng, short=0)
        assert scenes.correct(q, right) and scenes.faithful(q, right) and scenes.well_formed(wrong)
        assert not scenes.correct(q, wrong) and kind(scenes.parse(wrong)[1]) == kind(q.answer) and not scenes.faithful(q, wrong)
        short = coevolution.attempts(q, rng, short=1)
        assert all(bool(scenes.parse(said)[0]) != bool(q.ops) for said in short)


def test_lessons_in_judging(tokenizer):
    rng, school = random.Random(0), Judging(share=1)
    kinds = Counter(school.ask(rng).function for _ in range(1500))
    assert all(kinds[k] == pytest.approx(500, abs=75) for k in KINDS)
    for kind, words in (("pointwise", ("yes", "no")), ("pairwise", ("left", "right"))):
        answers = Counter(school.ask(rng, kind).answer for _ in range(400))
        assert set(answers) == set(words) and answers[words[0]] == pytest.approx(200, abs=40)
    for _ in range(200):
        lesson = school.lesson(rng)
        (text, said), = lesson.turns
        assert kind_of(text) and scenes.well_formed(said) and tokenizer.pad_token_id not in organism.encode(lesson, tokenizer)[0]
    mixed = [Judging(share=.15, drill=0).example(rng) for _ in range(1000)]
    assert sum(kind_of(e.turns[0][0]) is not None for e in mixed) == pytest.approx(150, abs=45)
    drilled = [Judging(share=1).example(rng) for _ in range(1000)]
    assert sum(len(e.turns) > 1 for e in drilled) == pytest.approx(400, abs=60)
    turns = [turn for _ in range(200) for turn in coevolution.drill(rng).turns]
    for question, said in turns:
        one, other, mark = question.split()
        assert mark == "?" and scenes.parse(said) == (f"{one} {other} {(word := 'yes' if one == other else 'no')}", word)
    assert sum(scenes.parse(said)[1] == "yes" for _, said in turns) == pytest.approx(400, abs=60)
    plain = [Judging(share=0).example(rng) for _ in range(100)]
    assert not any(kind_of(e.turns[0][0]) for e in plain)

"Training: resumed equals uninterrupted, the loss is TRL's, what is frozen stays, and RL is reproducible."
import json
import random
import re

import pytest
import torch

from franken import organism, scenes, training
from franken.errors import UserError

SCHEDULE = training.Schedule(steps=4, lr=1e-3, batch=4, warmup=2)


@pytest.fixture(scope="module")
def processor(): return organism.build_processor()


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, processor, kind):
    schedule = training.Schedule(steps=4, lr=1e-3, batch=4, warmup=2, optimizer=kind)
    run = lambda out, stop=None: training.teach(organism.build_model(3, seed=1), lesson(stop), processor.tokenizer, schedule, seed=0, out=tmp_path / out, every=2)

    def lesson(stop):
        count = iter(range(10**6))

        def example(rng):
            if stop is not None and next(count) >= stop * schedule.batch: raise KeyboardInterrupt
            return organism.SEEING.example(rng)
        return example
    whole = weights(run("whole"))
    with pytest.raises(KeyboardInterrupt): run("broken", stop=3)  # dies after the state of step 2 was kept
    resumed = weights(run("broken"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()] == [2, 4]


def test_our_loss_is_the_loss_of_trl(tmp_path, processor):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    model = organism.build_model(3, seed=1)
    rng = random.Random(0)
    examples = [organism.SEEING.example(rng) for _ in range(6)]
    examples = [e for e in examples if e.image is None] or [organism.Example((("3 + 4 ?", "7"), ("9 - 2 ?", "7")))]
    messages = [[dict(role=role, content=text) for turn in e.turns for role, text in zip(("user", "assistant"), turn)] for e in examples]
    config = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None, assistant_only_loss=True, gradient_checkpointing=False,
                           per_device_train_batch_size=len(examples), dataset_kwargs=None)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict(dict(messages=messages)), processing_class=processor.tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch))
        ours = training.answer_loss(model, organism.collate(examples, processor.tokenizer))
    assert torch.allclose(theirs, ours, atol=1e-5), (theirs, ours)


def test_learning_in_parts_is_learning_at_once(processor):
    rng, grads = random.Random(0), []
    examples = [organism.SEEING.example(rng) for _ in range(8)]
    model = organism.build_model(3, seed=1)
    for parts in (1, 3):
        model.zero_grad()
        loss = training.learn(model, examples, processor.tokenizer, parts)
        grads.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0][1], grads[1][1]))


@pytest.mark.parametrize("what, count", [("none", 0), ("early", 12 * 2), ("late", 12 * 2), (r"layers\.1\.", 12), (r"mlp", 3 * 6)])
def test_freezing_by_name(what, count):
    model = organism.build_model(6)
    rest = len(training.freeze(model, "none"))
    assert len(training.freeze(model, what)) - rest == count


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="layer_7"): training.freeze(organism.build_model(3), "layer_7")
    with pytest.raises(UserError, match="regular expression"): training.freeze(organism.build_model(3), "layers.[")


def test_rl_moves_what_it_may_and_nothing_else(tmp_path, processor):
    pytest.importorskip("trl")
    start = training.keep(organism.build_model(3, seed=1), processor, tmp_path / "start")
    practice = training.Practice(steps=2, lr=1e-2, prompts=2, rollouts=4, warmup=1, longest=6)
    # a random model is never right: a reward with spread, so that there is a gradient
    out = [training.reinforce(start, tmp_path / f"run{i}", practice, frozen="mid", seed=3, rewards=spread) for i in (0, 1)]
    before, after, again = (weights(training.load_organism(f)) for f in (start, *out))
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {n for n in before if not re.search(r"layers\.[02]\.", n)}
    assert all(torch.equal(after[n], again[n]) for n in after)  # same seed, same model
    record = json.loads((tmp_path / "run0" / "proof.json").read_text())
    assert record["moved"] == 24 and record["still"] == []


def test_rl_killed_and_resumed_ends_where_it_would_have(tmp_path, processor):
    pytest.importorskip("trl")
    start = training.keep(organism.build_model(3, seed=1), processor, tmp_path / "start")
    practice = training.Practice(steps=4, lr=1e-2, prompts=2, rollouts=4, warmup=1, longest=6)
    calls = []

    def dies(**kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return spread(**kwargs)
    dies.__name__ = "spread"
    run = lambda out, rewards: training.reinforce(start, tmp_path / out, practice, seed=3, every=2, rewards=rewards)
    whole = weights(training.load_organism(run("whole", spread)))
    with pytest.raises(KeyboardInterrupt): run("killed", dies)
    assert (tmp_path / "killed" / "state" / "checkpoint-2").exists() and not (tmp_path / "killed" / "model").exists()
    resumed = weights(training.load_organism(run("killed", spread)))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]


def test_rewards_grade_the_answer_and_the_form():
    q = scenes.questions("vision_to_reasoning", 1, seed=0)[0]
    steps, answer = scenes.trace(q)
    said = [scenes.completion(steps, answer), answer, scenes.completion(steps, "39"), "<answer> </answer>"]
    assert training.reward([[dict(content=s)] for s in said], [q] * 4) == pytest.approx([1.1, 1., .1, 0.])


@pytest.mark.parametrize("name", ["ril", "spark", "ppo"])
def test_unknown_recipes_are_refused(name):
    with pytest.raises(UserError, match=name): training.recipe(name)


def test_a_trio_grown_from_nothing_has_its_cards_and_is_not_grown_twice(tmp_path):
    pytest.importorskip("trl")
    short = dict(lr=1e-3, batch=4, warmup=1)
    life = training.Life(3, training.Schedule(2, optimizer="muon", **short), training.Schedule(1, optimizer="muon", **short), training.Schedule(2, **short),
                         rl=training.Practice(steps=1, prompts=1, rollouts=2, warmup=1, longest=4))
    exams = training.raise_trio(tmp_path, seed=5, life=life, n=4)
    assert len(exams) == 3 * 3 * 2 and set(exams.model) == {"base", "in", "rl"}
    trio = {m: trio_member(tmp_path, m) for m in ("base", "in", "rl")}
    vision = [n for n in trio["base"] if "visual" in n]
    assert all(torch.equal(trio["base"][n], trio["in"][n]) for n in vision)                # IN leaves the eyes alone
    assert any(not torch.equal(trio["base"][n], trio["in"][n]) for n in trio["base"])
    assert "elicitation" in (tmp_path / "rl" / "README.md").read_text()
    before = (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns
    again = training.raise_trio(tmp_path, seed=5, life=life, n=4)
    assert again.equals(exams) and (tmp_path / "rl" / "model.safetensors").stat().st_mtime_ns == before


def trio_member(folder, member): return weights(training.load_organism(folder / member))

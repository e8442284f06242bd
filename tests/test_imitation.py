"RIL: groups of student and teachers, a discriminator that learns what can be learned and no more, cached teachers, and a run that is killed ends where it would have."
import math
import random
import shutil
import zlib

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from franken import imitation, organism, scenes
from franken.errors import UserError
from franken.imitation import Judge, Judging, RilTrainer, Teachers
from franken.vlm import Prompt, load_vlm

G, PROMPTS, LONGEST = 2, 2, 6


@pytest.fixture(scope="module")
def processor(): return organism.build_processor()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, processor):
    "Three random organisms on disk: a student and two teachers."
    at = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("student", "ann", "bob")):
        for part in (organism.build_model(3, seed=i), processor): part.save_pretrained(at / name)
    return {name: at / name for name in ("student", "ann", "bob")}


def load(folder): return load_vlm(folder, dtype=torch.float32).model


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows(family="vision", n=12):
    "Vision questions have images, those of the reasoning family have none; every third is of the latter kind."
    questions = scenes.questions(family, n, seed=0)
    for i in range(2, n, 3): questions[i] = scenes.questions("reasoning", n, seed=0)[i]
    return [dict(prompt=[dict(role="user", content=q.text)], images=[scenes.image(q.scene)] if q.scene else [], question=q) for q in questions]


def trainer(folders, out, *, policy=None, teachers=("ann", "bob"), reference=True, discriminator=Judging(lr=1e-3, pretraining=2, side=3), data=None, cache=None, steps=4, kind=RilTrainer, **more):
    data = data or rows()
    args = GRPOConfig(output_dir=str(out / "state"), max_steps=steps, learning_rate=1e-2, num_generations=2 * G, per_device_train_batch_size=2 * G * PROMPTS, gradient_accumulation_steps=1,
                      max_completion_length=LONGEST, temperature=1., shuffle_dataset=False, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_steps=2, save_total_limit=1,
                      **imitation.RIL | {k: more.pop(k) for k in [*more] if k in ("num_iterations", "beta")})
    if kind is RilTrainer:
        more |= dict(teachers=Teachers([folders[t] for t in teachers], cache or out / "cache", longest=LONGEST), discriminator=discriminator, reference=folders["student"] if reference is True else reference)
    dataset = Dataset.from_dict(dict(index=range(len(data)))).with_transform(lambda batch: {k: [data[i][k] for i in batch["index"]] for k in data[0]})
    return kind(load(policy or folders["student"]), args=args, train_dataset=dataset, processing_class=organism.build_processor(), **{"reward_funcs": spread} | more)


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]  # a random model is never right


def first_batch(made):
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # as in train()
    return next(iter(made.get_train_dataloader()))


def test_exactly_one_half_is_not_similar():
    assert [imitation.similarity(d) for d in (.49999, .5, .50001)] == [1, 0, 0]
    assert imitation.similarity(torch.tensor([.4, .5, .6])).tolist() == [1, 0, 0]


def test_the_worked_example_in_the_trainer(tmp_path, folders):
    "G = 2; (similar, right) of the students (0, 1), (0, 0), of the teachers (1, 1), (1, 0): R = 1, 0, 2, 1 and A = 0, -1, 1, 0."
    made = trainer(folders, tmp_path, reward_funcs=lambda completions, **_: [1., 0., 1., 0.] * PROMPTS)
    made.judge.logits = lambda prompts, answers: torch.logit(torch.tensor([.9, .5, .1, .2] * PROMPTS))
    out = made._generate_and_score_completions(first_batch(made))
    assert out["advantages"].tolist() == [0, -1, 1, 0] * PROMPTS
    log = {k: v[-1] for k, v in made._metrics["train"].items()}
    assert (log["students/similar"], log["teachers/similar"], log["students/similar_spread"]) == (0, 1, 0)
    assert (log["students/<lambda>"], log["teachers/<lambda>"], log["students/<lambda>_spread"]) == (.5, .5, .5)


def contest(processor, student, teacher):
    "The verdict on 1000 held-out answers after 25 updates; both sides say numbers from their range at random."
    rng, judge = random.Random(0), Judge(organism.build_model(3), processor, Judging(lr=1e-3))

    def answers(n):
        return [list(x) for x in zip(*[(Prompt(f"{rng.randint(0, 9)} + {rng.randint(0, 9)} ?"), f"{rng.choice(r)}<eos>", own) for r, own in ((student, True), (teacher, False)) for _ in range(n)])]
    for _ in range(25): judge.learn(*answers(32))
    prompts, said, students = answers(500)
    return imitation.verdict(judge.logits(prompts, said), torch.tensor(students).float())


def test_the_discriminator_learns_nothing_where_both_sides_are_alike(processor):
    found = contest(processor, range(8), range(8))
    assert found["accuracy"] == pytest.approx(.5, abs=.03) and found["loss"] == pytest.approx(math.log(2), abs=.02)


def test_the_discriminator_is_always_right_where_the_sides_are_disjoint(processor):
    found = contest(processor, range(8), range(8, 16))
    assert found["accuracy"] == 1 and found["loss"] < .1


def test_the_discriminator_is_a_copy_of_the_student_read_at_the_last_token(processor):
    model = organism.build_model(3, seed=1)
    model.requires_grad_(False)  # what is frozen in the student
    before, state = weights(model), torch.get_rng_state()
    judge = Judge(model, processor, Judging(lr=1e-2))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(weights(judge.discriminator.backbone), weights(model.model))
    prompts = [imitation.as_prompt(imitation.prepare_filled(r["prompt"], r["images"])) for r in rows(n=4)]
    answers = ["red<eos>", "<answer> 3 </answer><eos>", "7<eos>", "<think> a1"]
    assert judge.logits(prompts, answers).tolist() == [0] * 4  # D = 0.5 to all
    head = judge.discriminator.head
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    batch = imitation.conversation(processor, prompts, answers)
    full, ids = judge.discriminator(**batch), batch["input_ids"]
    for i in range(4):  # each alone, without padding: the state of the very last token
        alone = imitation.conversation(processor, prompts[i:i + 1], answers[i:i + 1])
        n = alone["input_ids"].shape[1]
        assert torch.equal(ids[i, :n], alone["input_ids"][0]) and (ids[i, n:] == processor.tokenizer.pad_token_id).all()
        state = model.model(**alone, use_cache=False).last_hidden_state[0, -1]
        assert (head.weight @ state).item() == pytest.approx(full[i].item(), abs=1e-4)
    left = processor(text=[processor.apply_chat_template(p.messages, add_generation_prompt=True, tokenize=False) + a for p, a in zip(prompts, answers)],
                     images=[list(p.images) for p in prompts], padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    assert (left["input_ids"] != ids).any() and torch.allclose(judge.discriminator(**left), full, atol=1e-4)
    chunks = Judge(model, processor, Judging(chunk=3))
    chunks.load_state_dict(judge.state_dict())
    assert torch.allclose(chunks.logits(prompts, answers), full, atol=1e-4)
    judge.learn(prompts, answers, [True, True, False, False])
    assert equal(weights(model), before) and judge.updates == 1
    after = weights(judge.discriminator.backbone)
    assert any(not torch.equal(after[n], before[f"model.{n}"]) for n in after)


def test_learning_in_chunks_is_learning_at_once(processor):
    prompts = [imitation.as_prompt(imitation.prepare_filled(r["prompt"], r["images"])) for r in rows(n=5)]
    grads = []
    for chunk in (2, 100):
        judge = Judge(organism.build_model(3, seed=1), processor, Judging(lr=1e-3, chunk=chunk))
        torch.nn.init.normal_(judge.discriminator.head.weight, generator=torch.Generator().manual_seed(0))
        found = judge.learn(prompts, [f"{i}<eos>" for i in range(5)], [True, False, True, True, False])
        grads.append((found["loss"], {n: p.grad for n, p in judge.discriminator.named_parameters()}))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-5)
    assert all(torch.allclose(grads[0][1][n], grads[1][1][n], atol=1e-5) for n in grads[1][1])


def test_a_group_is_g_of_the_student_then_g_of_the_teachers(tmp_path, folders, monkeypatch):
    made, generated = trainer(folders, tmp_path), []
    inner = RilTrainer._generate_single_turn
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, ids, *rest, **more: generated.append(len(ids)) or inner(self, ids, *rest, **more))
    seen = {}
    score = made.reward_funcs[1]
    made.reward_funcs[1] = lambda completions, prompts, question, **_: seen.update(said=[c[0]["content"] for c in completions], question=question) or score(completions)
    out = made._generate_and_score_completions(first_batch(made))
    assert generated == [3, 3, G * PROMPTS]  # two updates of pretraining on 3 a side, then G of each 2G
    data = rows()[:PROMPTS]
    asked = [Prompt(r["question"].text, tuple(r["images"]) or None) for r in data]
    taught = Teachers([folders["ann"], folders["bob"]], tmp_path / "elsewhere", longest=LONGEST).answers(asked, G)
    tokenizer, texts = organism.build_tokenizer(), seen["said"]
    for i in range(PROMPTS):
        group = slice(2 * G * i, 2 * G * (i + 1))
        assert texts[group][G:] == taught[i] and all(q == data[i]["question"] for q in seen["question"][group])
        assert (out["prompt_ids"][group] == out["prompt_ids"][group][0]).all()
        for text, ids, mask in zip(texts[group], out["completion_ids"][group], out["completion_mask"][group]):
            ids = ids[mask.bool()].tolist()
            assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()
            assert len(ids) <= LONGEST and (len(ids) == LONGEST or ids[-1] == tokenizer.eos_token_id)
    assert out["num_images"] == [len(r["images"]) for r in data for _ in range(2 * G)]


def test_a_teachers_answer_ends_unless_it_fills_the_limit(tmp_path, folders):
    made, tokenizer = trainer(folders, tmp_path), organism.build_tokenizer()
    assert made._ids("1 2 3") == tokenizer.encode("1 2 3<eos>") and made._ids("") == [tokenizer.eos_token_id]
    assert made._ids("1 2 3 4 5 6") == tokenizer.encode("1 2 3 4 5 6") and made._ids("1 2 3 4 5 6 7") == tokenizer.encode("1 2 3 4 5 6")
    assert made._ended("1", made._ids("1")) == "1<eos>" and made._ended("1 2 3 4 5 6", made._ids("1 2 3 4 5 6")) == "1 2 3 4 5 6"


def test_the_loss_is_dr_grpo_by_hand_and_by_trl(tmp_path, folders):
    data = [r for r in rows(n=12) if not r["images"]]
    made = trainer(folders, tmp_path, data=data, reference=folders["ann"])  # another model, so that the KL is not 0
    out = made._generate_and_score_completions(first_batch(made))
    loss = made._compute_loss(made.model, out).item()
    plain = trainer(folders, tmp_path / "plain", data=data, kind=GRPOTrainer)
    first_batch(plain)
    assert plain._compute_loss(plain.model, out).item() == pytest.approx(loss, abs=1e-6)
    reference, total = load(folders["ann"]), 0.
    for i, a in enumerate(out["advantages"].tolist()):
        asked, said = (out[f"{side}_ids"][i][out[f"{side}_mask"][i].bool()] for side in ("prompt", "completion"))
        logp, ref = (m(input_ids=torch.cat([asked, said])[None]).logits[0, len(asked) - 1:-1].log_softmax(-1).gather(1, said[:, None]).detach() for m in (made.model, reference))
        total += (-a + .01 * ((ref - logp).exp() - (ref - logp) - 1)).sum().item()  # the ratio to the old policy is 1
    assert loss == pytest.approx(total / (2 * G * PROMPTS * LONGEST), abs=1e-5) and made._metrics["train"]["kl"][-1] > .01


def test_killed_and_resumed_ends_where_it_would_have(tmp_path, folders):
    calls = []

    def dies(**kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return spread(**kwargs)
    dies.__name__ = "spread"
    whole = trainer(folders, tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt): trainer(folders, tmp_path / "killed", reward_funcs=dies).train()
    last = tmp_path / "killed/state/checkpoint-2"
    assert [p.name for p in (tmp_path / "killed/state").iterdir() if p.is_dir()] == [last.name]
    with pytest.raises(UserError, match="reference"): trainer(folders, tmp_path / "killed", policy=last, reference=None)
    bare = shutil.copytree(last, tmp_path / "bare/state/checkpoint-2")  # the first is deleted when the next is saved
    (bare / imitation.JUDGE).unlink()
    resumed = trainer(folders, tmp_path / "killed", policy=last)
    resumed.train(resume_from_checkpoint=str(last))
    assert equal(weights(whole.model), weights(resumed.model)) and not equal(weights(whole.model), weights(load(bare)))
    assert equal(weights(whole.judge.discriminator), weights(resumed.judge.discriminator)) and whole.judge.updates == resumed.judge.updates == 2 + 4
    logs = [{h["step"]: {k: v for k, v in h.items() if k.startswith(("students", "teachers", "discriminator", "kl"))} for h in made.state.log_history if "kl" in h} for made in (whole, resumed)]
    assert logs[0] == logs[1] and set(logs[0]) == {1, 2, 3, 4}
    with pytest.raises(UserError, match="discriminator"): trainer(folders, tmp_path / "bare", policy=bare).train(resume_from_checkpoint=str(bare))


@pytest.mark.parametrize("mode, updates", [("updated", 2 + 3 * 2), ("frozen", 2), ("absent", None)])
def test_the_discriminator_may_be_frozen_or_absent(tmp_path, folders, mode, updates):
    def spread(completions, **_): return [zlib.crc32(c[0]["content"].encode()) % 9973 / 9973 for c in completions]  # so fine that two halves are not alike by chance
    made = trainer(folders, tmp_path, steps=2, discriminator=Judging(mode, lr=1e-3, mu=3, pretraining=2, side=3), reward_funcs=spread)
    made.train()
    log = made.state.log_history[0]
    assert (made.judge and made.judge.updates) == updates
    assert ("students/similar" in log) == ("discriminator/accuracy" in log) == (mode != "absent")
    assert log["students/spread"] != log["teachers/spread"]
    if mode == "absent": assert made.reward_func_names == ["spread"] and not (tmp_path / "state/checkpoint-2" / imitation.JUDGE).exists()


def test_gumbel_noise_makes_greedy_a_sample():
    z = torch.tensor([[0., 1., 2., -math.inf]])
    drawn = imitation.Gumbel(range(4000))(None, z.expand(4000, 4)).argmax(1).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, z.softmax(1)[0], atol=.03) and drawn[3] == 0
    some = imitation.Gumbel([5, 7]), imitation.Gumbel([7])  # a row's noise is its own
    for _ in range(2): assert torch.equal(some[0](None, z.expand(2, 4))[1], some[1](None, z)[0])


def test_teachers_answer_once_and_always_the_same(tmp_path, folders):
    prompts = [Prompt(r["question"].text, tuple(r["images"]) or None) for r in rows()]
    two = [folders["ann"], folders["bob"]]
    teachers = Teachers(two, tmp_path / "a", longest=LONGEST)
    said, state = teachers.answers(prompts, 4), torch.get_rng_state()
    assert len({a for row in said for a in row}) > 20 and sum(row["teacher"] == teachers.fingerprints[0] for row in teachers.samples.rows.values()) == 2 * len(prompts)
    again = Teachers(two, tmp_path / "a", longest=LONGEST)
    assert again.answers(prompts, 4) == said and not again.loaded  # nothing was generated
    other = Teachers(two, tmp_path / "b", longest=LONGEST, batch=5)
    assert other.answers(prompts[7:8], 1) == [said[7][:1]]         # alone and first
    assert other.answers(prompts[::-1], 4) == said[::-1]           # backwards, in other batches, one of them known
    assert torch.equal(torch.get_rng_state(), state)
    assert Teachers(two, tmp_path / "a", longest=LONGEST, seed=1).answers(prompts, 4) != said
    black = Prompt(prompts[0].text, scenes.black_image())
    assert imitation.prompt_digest(black) != imitation.prompt_digest(prompts[0]) and len(Teachers(two, tmp_path / "a", longest=LONGEST).answers([black], 4)[0]) == 4
    assert len(teachers.samples) == 4 * len(prompts) and len(imitation.Samples(tmp_path / "a/teachers.jsonl")) == 4 * (2 * len(prompts) + 1)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, folders, processor):
    odd = tmp_path / "odd"
    organism.build_model(3).save_pretrained(odd), processor.save_pretrained(odd)
    text = (odd / "tokenizer.json").read_text()
    (odd / "tokenizer.json").write_text(text.replace('"triangle"', '"pyramid"'))
    with pytest.raises(UserError, match="odd.*pyramid"): trainer(folders | dict(odd=odd), tmp_path, teachers=("ann", "odd"))
    with pytest.raises(UserError, match="none"): Teachers([], tmp_path)


def test_what_can_not_be_done_is_refused(tmp_path, folders):
    with pytest.raises(UserError, match="sometimes"): Judging("sometimes")
    for bad, word in ((dict(num_generations=3), "even"), (dict(world_size=2), "processes"), (dict(use_vllm=True), "vLLM")):
        args = type("Args", (), dict(num_generations=4, world_size=1, use_vllm=False, beta=.01, output_dir=str(tmp_path)) | bad)
        with pytest.raises(UserError, match=word): imitation.check_settings(load(folders["student"]), args, {})
    with pytest.raises(UserError, match="assistant"): imitation.as_prompt([dict(role=r, content="x") for r in ("user", "assistant", "user")])


def test_an_evaluation_asks_the_student_only(tmp_path, folders):
    made = trainer(folders, tmp_path, eval_dataset=Dataset.from_list([dict(prompt=[dict(role="user", content="1 + 2 ?")])] * 2))
    made.model.eval()
    out = made._generate_and_score_completions([dict(prompt=[dict(role="user", content="1 + 2 ?")])] * 4)
    assert len(out["advantages"]) == 4 and len(made.teachers.samples) == 0 and made.judge.updates == 0

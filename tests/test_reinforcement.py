"RL: reproducible, resumed exactly, no more work than matters, and groups that teach."
import json
import os
import subprocess
import sys

import pytest
import torch

from franken import organism, practice, recipes, reinforcement, scenes, teaching
from franken.errors import UserError
from franken.practice import Practice
from franken.trio import load_trio

QUICK = dict(lr=1e-2, prompts=2, rollouts=4, warmup=1, longest=6)


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]  # a random model is never right: a reward with spread, so that there is a gradient


@pytest.fixture(scope="module")
def start(tmp_path_factory): return teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path_factory.mktemp("start") / "in")


def weights(folder): return {n: p.detach().clone() for n, p in teaching.load_organism(folder).named_parameters()}


def equal(a, b): return all(torch.equal(a[n], b[n]) for n in a)


def test_the_same_seed_gives_the_same_model(start, tmp_path):
    runs = [reinforcement.reinforce(start, tmp_path / str(i), Practice(steps=2, **QUICK), seed=seed, functions=[spread]) for i, seed in enumerate((3, 3, 4))]
    assert equal(weights(runs[0]), weights(runs[1])) and not equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("recipe, more, every", [("grpo", {}, 2), ("grpo", dict(reuse=2), 1), ("dapo", dict(accumulate=2), 2), ("lite_ppo", {}, 2)])
def test_killed_and_resumed_is_uninterrupted(start, tmp_path, recipe, more, every):
    settings = Practice(steps=4, **QUICK, **more)
    def run(out, functions): return reinforcement.reinforce(start, tmp_path / out, settings, recipe, seed=3, every=every, functions=functions)
    whole = weights(run("whole", [spread]))

    class Killed(reinforcement.Watch):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3: raise KeyboardInterrupt
    watch, reinforcement.Watch = reinforcement.Watch, Killed
    try:
        with pytest.raises(KeyboardInterrupt): run("killed", [spread])
    finally: reinforcement.Watch = watch
    assert (tmp_path / "killed" / "state" / "checkpoint-2").exists() and not (tmp_path / "killed" / "model").exists()
    (tmp_path / "killed" / "state" / "checkpoint-3").mkdir()  # as if the next one was being written
    with (tmp_path / "killed" / "log.jsonl").open("a") as log: log.write('{"step": 3, "rew')
    assert equal(whole, weights(run("killed", [spread])))


def batch_of(start, tmp_path, recipe="grpo", functions=(spread,), **more):
    from trl import GRPOConfig
    settings = Practice(steps=1, prompts=4, rollouts=4, longest=8, mix=(1, 1, 2), **more)
    model, processor = reinforcement.load_policy(start)
    data = practice.Drawn(settings, 0)
    t = reinforcement.GroupTrainer(model=model, processing_class=processor, args=GRPOConfig(**reinforcement.settings(tmp_path, settings, recipes.find_recipe(recipe), 0)), reward_funcs=list(functions),
                                   train_dataset=practice.dataset(data, settings))
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    return t, t._generate_and_score_completions([data.row(i // 4) for i in range(16)]), data


@pytest.mark.parametrize("recipe", ["grpo", "dr_grpo", "dapo", "gspo", "lite_ppo"])
def test_leaving_out_what_teaches_nothing_leaves_the_gradient(start, tmp_path, recipe):
    t, batch, _ = batch_of(start, tmp_path, recipe)
    batch["advantages"][4:12] = 0  # two of the four groups
    found, rows = [], []
    scored = t._get_per_token_logps_and_entropies
    t._get_per_token_logps_and_entropies = lambda model, ids, *rest, **more: (rows.append(len(ids)), scored(model, ids, *rest, **more))[1]
    for loss in (super(reinforcement.GroupTrainer, t)._compute_loss, t._compute_loss):
        t.model.zero_grad()
        value = loss(t.model, dict(batch))
        value.backward()
        found.append((float(value.detach()), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and rows == [16, 8]
    assert set(found[0][1]) == set(found[1][1]) and all(torch.allclose(found[0][1][n], found[1][1][n], atol=1e-6) for n in found[0][1])


def test_where_an_answer_without_advantage_matters_it_stays(start, tmp_path):
    t, batch, _ = batch_of(start, tmp_path)
    batch["advantages"][4:12] = 0
    t.top_entropy_quantile = .5  # the quantile is one of all answers
    whole, ours = (float(loss(t.model, dict(batch))) for loss in (super(reinforcement.GroupTrainer, t)._compute_loss, t._compute_loss))
    assert whole == ours


@pytest.mark.parametrize("rollouts, reward", [(8, .1), (16, .9), (8, 1.1), (4, 1 / 3)])
def test_equal_rewards_have_no_advantage_however_they_are_rounded(start, tmp_path, rollouts, reward):
    from trl import GRPOConfig
    settings = Practice(steps=1, prompts=2, rollouts=rollouts, longest=4)
    model, processor = reinforcement.load_policy(start)
    data = practice.Drawn(settings, 0)
    t = reinforcement.GroupTrainer(model=model, processing_class=processor, args=GRPOConfig(**reinforcement.settings(tmp_path, settings, recipes.find_recipe("dapo"), 0)),
                                   reward_funcs=[lambda completions, **_: [reward] * rollouts + [float(i % 2) for i in range(rollouts)]], train_dataset=practice.dataset(data, settings))
    t.model.train()
    batch = t._generate_and_score_completions([data.row(i // rollouts) for i in range(2 * rollouts)])
    assert not batch["advantages"][:rollouts].any() and batch["advantages"][rollouts:].all() and t._flat(batch).tolist() == [True, False] and t._metrics["train"]["groups/flat"] == [.5]


def test_movement_is_measured_wherever_the_model_is(start):
    model, _ = reinforcement.load_policy(start)
    asked = []

    class Elsewhere(torch.nn.Module):
        "A model whose parameters are on another device."
        def named_parameters(self): return model.named_parameters()
        def get_parameter(self, name):
            class There:
                def detach(self): return self
                def to(self, device): asked.append(device); return model.get_parameter(name).detach() + 1
                def __sub__(self, other): raise RuntimeError("tensors on two devices")
            return There()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "layers.0.mlp.up" in n}
    assert reinforcement.moved(Elsewhere(), before)["moved"] == pytest.approx(sum(p.numel() for p in before.values()) ** .5, rel=1e-4) and len(asked) == 1


def test_a_run_that_diverges_is_told_and_not_ended_by_its_watcher(tmp_path, capsys):
    from types import SimpleNamespace
    watch = reinforcement.Watch(tmp_path, {})
    watch.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=10), None, logs={"learning_rate": 1., "loss": float("nan"), "entropy": None, "reward": None, "groups/flat": 1.})
    [row] = reinforcement.read_log(tmp_path)
    assert row["alarms"] == ["something is no number: the run has diverged", "no group has a spread of rewards"]


def test_a_batch_that_teaches_nothing_has_a_gradient_of_zero(start, tmp_path):
    t, batch, _ = batch_of(start, tmp_path, functions=[lambda completions, **_: [1.] * len(completions)])
    assert not batch["advantages"].any()
    t._compute_loss(t.model, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())


def log_probs(t, b):
    with torch.no_grad():
        found = t._get_per_token_logps_and_entropies(t.model, torch.cat([b["prompt_ids"], b["completion_ids"]], 1), torch.cat([b["prompt_mask"], b["completion_mask"]], 1), b["completion_ids"].shape[1],
                                                     **{k: b[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids") if k in b})[0]
    return [row[:n] for row, n in zip(found, b["completion_mask"].sum(1).tolist())]


def test_rows_taken_or_put_elsewhere_are_the_same_rows(start, tmp_path):
    t, batch, data = batch_of(start, tmp_path)
    assert 0 < sum(n > 0 for n in batch["num_images"]) < 16  # with images and without
    whole = log_probs(t, batch)
    some = torch.tensor([14, 0, 5])
    assert all(torch.allclose(a, whole[i], atol=1e-5) for a, i in zip(log_probs(t, reinforcement.take(batch, some)), some.tolist()))
    other = t._generate_and_score_completions([data.row(f"other {i // 4}") for i in range(8)])
    at, rows = torch.tensor([3, 9, 15]), torch.tensor([0, 7, 2])
    mixed, theirs = log_probs(t, reinforcement.put(batch, at, other, rows)), log_probs(t, other)
    for i in range(16):
        wanted = theirs[rows[at.tolist().index(i)]] if i in at.tolist() else whole[i]
        assert torch.allclose(mixed[i], wanted, atol=1e-5)


def test_groups_of_equal_rewards_are_replaced(start, tmp_path):
    seen = []

    def fickle(completions, question, **_):  # every second group is all right
        out = []
        for g in range(len(completions) // 4):
            seen.append(question[4 * g])
            out += [1.] * 4 if len(seen) % 2 else [0., 1., 0., 1.]
        return out
    t, batch, data = batch_of(start, tmp_path, "dapo", [fickle])
    assert t._flat(batch).tolist() == [True, False, True, False]
    t.spare = data.row
    logged = {k: len(v) for k, v in t._metrics["train"].items()}
    full = t._resample(dict(batch))
    assert not t._flat(full).any() and full["num_items_in_batch"] == full["completion_mask"].sum()
    kept = [4, 5, 6, 7, 12, 13, 14, 15]
    a, b = log_probs(t, batch), log_probs(t, full)
    assert all(torch.allclose(a[i], b[i], atol=1e-5) for i in kept)
    assert t._metrics["train"]["groups/replaced"] == [2.] and {k: len(t._metrics["train"][k]) for k in logged} == logged


def test_a_run_is_logged_and_its_movement_measured(start, tmp_path):
    out = reinforcement.reinforce(start, tmp_path / "run", Practice(steps=10, **QUICK), frozen="early", seed=1, functions=[spread])
    [row] = reinforcement.read_log(tmp_path / "run")
    before, after = weights(start), weights(out)
    total = sum(float((after[n] - before[n]).double().square().sum()) for n in before) ** .5
    assert row["moved"] == pytest.approx(total, rel=1e-5) and row["moved/early"] == 0 and row["step"] == 10
    assert row["moved/mid"] ** 2 + row["moved/late"] ** 2 == pytest.approx(row["moved"] ** 2)
    assert {"reward", "entropy", "frac_reward_zero_std", "num_tokens", "completions/mean_length"} <= set(row)


def test_a_line_logged_twice_counts_once(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(dict(step=s, reward=r)) + "\n" for s, r in ((10, 1), (20, 2), (20, 3))))
    assert [row["reward"] for row in reinforcement.read_log(tmp_path)] == [1, 3]


def test_off_policy_or_not_gspo_is_grpo_when_nothing_is_reused(start, tmp_path):
    a, b = (weights(reinforcement.reinforce(start, tmp_path / r, Practice(steps=2, **QUICK), r, seed=3, functions=[spread])) for r in ("grpo", "gspo"))
    moved = max(float((a[n] - weights(start)[n]).abs().max()) for n in a)
    assert all(torch.allclose(a[n], b[n], atol=1e-3 * moved) for n in a)


@pytest.mark.parametrize("goal", practice.GOALS)
def test_the_organism_learns(goal, tmp_path):
    "Ten updates on sums alone: the trained IN is right more often on the prompts that it meets."
    out = reinforcement.reinforce(load_trio("organism").in_.folder, tmp_path / "run", Practice(steps=20, prompts=12, lr=2e-4, mix=(0, 0, 1), goal=goal, warmup=2), seed=0)
    first, last = reinforcement.read_log(tmp_path / "run")
    assert last["rewards/right/mean"] > first["rewards/right/mean"] and (out / "config.json").exists()


def test_ril_trains_like_any_other_recipe(start, tmp_path):
    teacher = teaching.keep(organism.build_model(3, seed=2), organism.build_processor(), tmp_path / "teacher")
    settings = Practice(steps=2, **QUICK)
    with pytest.raises(UserError, match="--teacher"): reinforcement.reinforce(start, tmp_path / "none", settings, "ril", functions=[spread])
    out = reinforcement.reinforce(start, tmp_path / "run", settings, "ril", frozen="late", functions=[spread], teachers=[str(teacher)])
    before, after = weights(start), weights(out)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "language_model.layers.0" in n or "language_model.layers.1" in n}


def test_spark_trains_like_any_other_recipe(start, tmp_path):
    out = reinforcement.reinforce(start, tmp_path / "run", Practice(steps=10, **QUICK | dict(prompts=4)), "spark", frozen="late", functions=[spread])
    [row] = reinforcement.read_log(tmp_path / "run")
    assert row["recycled/batches"] == pytest.approx(.5, abs=.11) and {"right", "rewards/spread/mean", "frac_reward_zero_std", "reward"} <= set(row)  # the policy's own stand for all
    before, after = weights(start), weights(out)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "language_model.layers.0" in n or "language_model.layers.1" in n}


def test_two_processes_make_one_update(start, tmp_path):
    "As `accelerate launch` would start them, on the CPU: batches with and without images, groups resampled, one model and one proof."
    code = ("import sys, torch; torch.set_num_threads(1)\nfrom franken import reinforcement, scenes\nfrom franken.practice import Practice\n"
            "def spread(completions, **_): return [float(len(c[0]['content']) % 2) for c in completions]\n"
            "reinforcement.reinforce(sys.argv[1], sys.argv[2], Practice(steps=2, lr=1e-2, prompts=4, rollouts=4, warmup=1, longest=6, mix=(1, 1, 2)), 'dapo', 'late', functions=[spread])\n")
    (tmp_path / "two.py").write_text(code)
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29500 + os.getpid() % 500), str(tmp_path / "two.py"), str(start), str(tmp_path / "run")],
                           capture_output=True, text=True, timeout=240, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert ended.returncode == 0, ended.stderr[-2000:]
    shown = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert shown["moved"] == 24 and {"early", "mid"} == {dict(enumerate(("early", "mid", "late")))[int(n.split(".")[2])] for n, (a, b) in shown["hashes"].items() if a != b}
    assert ended.stdout.count("frozen:") == 1

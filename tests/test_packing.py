"A prompt read once: the same log probabilities and gradients as row by row, whatever the order of the rows, and TRL's own way where a model is not made for it."
import random

import pytest
import torch

from franken import organism, packing, practice, recipes, reinforcement, teaching
from franken.practice import Practice

trl = pytest.importorskip("trl")


def spread(completions, **_): return [float(len(c[0]["content"]) % 3) for c in completions]


@pytest.fixture(scope="module")
def start(tmp_path_factory): return teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path_factory.mktemp("start") / "in")


def trainer(start, out, mix=(1, 2, 2)):
    asked = Practice(steps=1, prompts=6, rollouts=4, longest=8, mix=mix)
    model, processor = reinforcement.load_policy(start)
    data = practice.Drawn(asked, 0)
    t = reinforcement.GroupTrainer(model=model, processing_class=processor, args=trl.GRPOConfig(**reinforcement.settings(out, asked, recipes.find_recipe("grpo"), 0)), reward_funcs=[spread],
                                   train_dataset=practice.dataset(data, asked))
    t.model.train()
    batch = t._generate_and_score_completions([data.row(i // 4) for i in range(24)])
    batch["completion_mask"] *= (torch.arange(batch["completion_mask"].shape[1]) < torch.arange(24)[:, None] % 8 + 1)  # of every length
    return t, batch


def measured(t, batch, plain: bool):
    "Log probabilities, entropies and the gradient of their sum."
    owner = super(packing.PromptOnce, t) if plain else t
    t.model.zero_grad()
    both = [torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask")]
    images = {k: batch.get(k) for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    logps, entropies, _ = owner._get_per_token_logps_and_entropies(t.model, *both, batch["completion_ids"].shape[1], compute_entropy=True, **images)
    kept = batch["completion_mask"].bool()
    (logps * torch.linspace(-1, 1, len(logps))[:, None])[kept].sum().backward()
    return logps.detach()[kept], entropies.detach()[kept], {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mix", [(1, 2, 2), (1, 0, 0), (0, 0, 1)], ids=["mixed", "images", "text"])
def test_the_same_numbers_as_row_by_row(start, tmp_path, mix, monkeypatch):
    t, batch = trainer(start, tmp_path, mix)
    batch = reinforcement.take(batch, torch.randperm(24, generator=torch.Generator().manual_seed(0)))  # as TRL shuffles them
    read = []
    forward = t.model.forward
    monkeypatch.setattr(t.model, "forward", lambda *a, **k: (read.append(k["input_ids"].shape), forward(*a, **k))[1])
    packed, rows = measured(t, batch, False), None
    few, n = sum(a * b for a, b in read), len(read)
    rows = measured(t, batch, True)
    assert sum(a for a, _ in read[:n]) == 6 and few < .6 * sum(a * b for a, b in read[n:])  # six prompts, and not 24; fewer tokens
    for one, other in zip(packed[:2], rows[:2]): assert torch.allclose(one, other, atol=1e-5)
    assert set(packed[2]) == set(rows[2]) and all(torch.allclose(packed[2][k], rows[2][k], atol=2e-5) for k in rows[2])


def test_small_packs_are_as_good(start, tmp_path):
    t, batch = trainer(start, tmp_path)
    one = measured(t, batch, False)
    t.packs = 6
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one[:2], measured(t, batch, False)[:2]))


@pytest.mark.parametrize("hinder", [lambda t: t.model.set_attn_implementation("eager"), lambda t: setattr(packing, "WIDEST", 4)], ids=["another attention", "too wide"])
def test_where_it_does_not_fit_it_is_trl(start, tmp_path, hinder, monkeypatch):
    monkeypatch.setattr(packing, "WIDEST", packing.WIDEST)
    t, batch = trainer(start, tmp_path)
    hinder(t)
    ours, theirs = measured(t, batch, False), measured(t, batch, True)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2])) and all(torch.equal(ours[2][k], theirs[2][k]) for k in theirs[2])


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_place_and_sees_its_own(seed):
    "Rows of (prompt, length): each token is predicted once, from the token before it, and sees the prompt and its own answer alone."
    rng = random.Random(seed)
    rows = sorted((rng.randrange(4), rng.randint(1, 5)) for _ in range(rng.randint(1, 9)))
    numbers = {p: i for i, p in enumerate(sorted({p for p, _ in rows}))}
    prompt = torch.tensor([numbers[p] for p, _ in rows])
    ids = torch.tensor([[100 + 10 * p + i for i in range(3)] for p, _ in rows])
    answers = torch.tensor([[1000 + 10 * r + t if t < n else 0 for t in range(5)] for r, (_, n) in enumerate(rows)])
    mask = (answers > 0).long()
    made = packing.pack(ids, torch.ones_like(ids), answers, mask, prompt)
    assert made.spread(made.labels, *answers.shape).equal(answers) and int((made.labels != -100).sum()) == int(mask.sum())
    sees = made.allowed()[:, 0]
    for (r, t), (g, place) in zip(zip(*map(torch.Tensor.tolist, made.tokens)), zip(*map(torch.Tensor.tolist, made.places))):
        assert made.ids[g][sees[g, place]].tolist() == ids[r].tolist() + answers[r, :t].tolist()

"A prompt read once: the same log probabilities and gradients as row by row, whatever the order of the rows, and TRL's own way where a model is not made for it."
import random
from types import SimpleNamespace

import pytest
import torch
from families import build

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


def measured(t, batch, plain: bool, at_once=None):
    "Log probabilities, entropies and the gradient of their sum."
    owner = super(packing.PromptOnce, t) if plain else t
    t.model.zero_grad()
    both = [torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask")]
    images = {k: batch.get(k) for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    logps, entropies, _ = owner._get_per_token_logps_and_entropies(t.model, *both, batch["completion_ids"].shape[1], at_once, compute_entropy=True, **images)
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


@pytest.mark.parametrize("at_once, packs", [(4, 4), (9, 4), (None, 1), (None, 6)])
def test_packs_of_any_size_are_alike(start, tmp_path, at_once, packs):
    t, batch = trainer(start, tmp_path)
    rows = measured(t, batch, True)
    t.packs = packs
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rows[:2], measured(t, batch, False, at_once)[:2]))


def test_answers_that_do_not_count_are_zero(start, tmp_path):
    t, batch = trainer(start, tmp_path)
    batch["completion_mask"][:5] = 0  # the whole of a prompt, and one answer of the next
    both = [measured(t, batch, plain) for plain in (False, True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(both[0][:2], both[1][:2])) and all(torch.allclose(both[0][2][k], both[1][2][k], atol=2e-5) for k in both[1][2])


@pytest.mark.parametrize("hinder, at_once", [(lambda t: t.model.set_attn_implementation("eager"), None), (lambda t: t.model.set_attn_implementation({"text_config": "eager"}), None),
                                             (lambda t: setattr(packing, "WIDEST", 4), None), (lambda t: None, 3)], ids=["another attention", "of the decoder alone", "too wide", "less than a group at once"])
def test_where_it_does_not_fit_it_is_trl(start, tmp_path, hinder, at_once, monkeypatch):
    monkeypatch.setattr(packing, "WIDEST", packing.WIDEST)
    t, batch = trainer(start, tmp_path, (1, 2, 0) if at_once else (1, 2, 2))  # TRL alone can't take three rows without an image from a batch with some
    hinder(t)
    monkeypatch.setattr(packing, "pack", None)
    ours, theirs = measured(t, batch, False, at_once), measured(t, batch, True, at_once)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2])) and all(torch.equal(ours[2][k], theirs[2][k]) for k in theirs[2])


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_other_families_are_left_to_trl(family):
    "Some have pixels and no grid of them."
    class Plain:
        def _get_per_token_logps_and_entropies(self, *args, **kwargs): return "plain"
    class Once(packing.PromptOnce, Plain):
        accelerator = SimpleNamespace(num_processes=1, unwrap_model=lambda model: model)
    ids = torch.ones(4, 6, dtype=torch.long)
    assert Once()._get_per_token_logps_and_entropies(build(family).model, ids, ids, 3, pixel_values=torch.ones(4, 3, 8, 8), num_images=[1] * 4) == "plain"


def test_the_same_pixels_in_another_shape_are_another_image():
    ids, pixels = torch.ones(2, 3, dtype=torch.long), torch.zeros(16, 5)
    seen = [(pixels, torch.tensor([[1, 2, 8]])), (pixels, torch.tensor([[1, 4, 4]]))]
    assert packing.shared(ids, ids, seen).tolist() == [0, 1] and packing.shared(ids, ids, seen[:1] * 2).tolist() == [0, 0]


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

"The arithmetic of the recipes: as it is worked out by hand, and as TRL does it."
import numpy as np
import pytest
import torch

from franken import organism, practice, recipes, reinforcement, teaching
from franken.errors import UserError

REWARDS = np.array([[1.] * 7 + [0.], [1.] * 4 + [0.] * 4])
BY_HAND = {"group": (.3535, -2.4742, .9352), "batch": (.2611, -1.8274, 1.0442), "none": (.125, -.875, .5)}


@pytest.mark.parametrize("scale", BY_HAND)
def test_advantages_by_hand(scale):
    found = recipes.advantages(REWARDS, scale)
    assert np.allclose((found[0, 0], found[0, 7], found[1, 0]), BY_HAND[scale], atol=1e-3)
    eps, recipes.EPS = recipes.EPS, 0
    try: exact = recipes.advantages(REWARDS, scale)
    finally: recipes.EPS = eps
    spread = {"group": [[np.std(g, ddof=1)] for g in REWARDS], "batch": np.std(REWARDS, ddof=1), "none": 1.}[scale]
    assert np.allclose(exact, (REWARDS - REWARDS.mean(1, keepdims=True)) / spread, atol=1e-12)


def test_the_spread_of_the_batch(): assert REWARDS.std(ddof=1) == pytest.approx(.47871, abs=1e-5)


@pytest.mark.parametrize("how, loss", [("grpo", 0.), ("dapo", .5), ("dr_grpo", .2)])
def test_aggregation_by_hand(how, loss):
    assert -recipes.aggregate([[1.] * 6, [-1.] * 6], [2, 6], how, longest=10) == pytest.approx(loss, abs=1e-12)


def test_clips_by_hand():
    assert recipes.clipped(1.25, 1., .2) == (1.2, False) and recipes.clipped(1.25, 1., .2, .28) == (1.25, True)


def test_padding_does_not_count():
    values = np.array([[1., 2., 99.], [3., 99., 99.]])
    assert recipes.aggregate(values, [2, 1], "grpo") == pytest.approx((1.5 + 3) / 2) and recipes.aggregate(values, [2, 1], "dapo") == pytest.approx(2.)


@pytest.mark.parametrize("name", ["ppo", "GRPO", ""])
def test_unknown_recipes_are_refused(name):
    with pytest.raises(UserError, match="lite_ppo"): recipes.find_recipe(name)


@pytest.mark.parametrize("call", [lambda: recipes.advantages(REWARDS, "prompt"), lambda: recipes.aggregate([[1.]], [1], "mean")])
def test_unknown_words_are_refused(call):
    with pytest.raises(UserError): call()


@pytest.fixture(scope="module")
def start(tmp_path_factory): return teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path_factory.mktemp("start") / "in")


def trainer(start, out, name, functions, **more):
    "A trainer of the recipe `name` that has not yet trained, over two prompts of eight answers."
    from trl import GRPOConfig
    settings = practice.Practice(steps=2, prompts=2, rollouts=8, longest=10, **more)
    model, processor = reinforcement.load_policy(start)
    r = recipes.find_recipe(name)
    return reinforcement.GroupTrainer(model=model, processing_class=processor, args=GRPOConfig(**reinforcement.settings(out, settings, r, 0)), reward_funcs=functions,
                                      train_dataset=practice.dataset(practice.Drawn(settings, 0), settings))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "lite_ppo"])
def test_trl_has_our_advantages(start, tmp_path, name):
    given = iter(REWARDS.flatten().tolist())
    t = trainer(start, tmp_path, name, [lambda completions, **_: [next(given) for _ in completions]])
    rows = [t.train_dataset[i // 8] for i in range(16)]
    t.model.train()
    found = t._generate_and_score_completions(rows)["advantages"].view(2, 8)
    assert np.allclose(found.numpy(), recipes.advantages(REWARDS, recipes.find_recipe(name).scale), atol=1e-4)


def by_hand(recipe, logs, old, advantages, lengths, longest):
    "The loss of a recipe, from the definitions of this room: log probabilities new and old (answers x tokens)."
    ratio = np.exp(logs - old)
    if recipe.level == "sequence": ratio = np.repeat(recipes.sequence_ratio(logs - old, lengths)[:, None], logs.shape[1], 1)
    terms = np.array([[recipes.clipped(r, a, recipe.low, recipe.high)[0] for r in row] for row, a in zip(ratio, advantages)])
    return -recipes.aggregate(terms, lengths, recipe.loss, longest)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "lite_ppo"])
def test_trl_has_our_loss(start, tmp_path, name):
    t = trainer(start, tmp_path, name, [lambda completions, **_: [0.] * len(completions)])
    t.current_gradient_accumulation_steps = 1
    rng = np.random.default_rng(0)
    rows, tokens, lengths = 4, 6, np.array([2, 6, 4, 3])
    mask = torch.tensor(np.arange(tokens) < lengths[:, None]).long()
    batch = dict(prompt_ids=torch.randint(9, 60, (rows, 5)), prompt_mask=torch.ones(rows, 5, dtype=torch.long), completion_ids=torch.randint(9, 60, (rows, tokens)) * mask, completion_mask=mask,
                 advantages=torch.tensor([1., -1., .5, -2.]), num_items_in_batch=mask.sum())
    t.model.train()
    with torch.no_grad():
        logs = t._get_per_token_logps_and_entropies(t.model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), torch.cat([batch["prompt_mask"], mask], 1), tokens)[0]
        old = logs + torch.tensor(rng.normal(0, .3, (rows, tokens)), dtype=torch.float32) * (1e-3 if name == "gspo" else 1.)
        theirs = float(t._compute_loss(t.model, batch | dict(old_per_token_logps=old)))
    assert theirs == pytest.approx(by_hand(recipes.find_recipe(name), logs.double().numpy(), old.double().numpy(), [1., -1., .5, -2.], lengths, 10), abs=1e-4)

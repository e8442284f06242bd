"What RL practises on: prompts that depend on seed and number alone, rewards by the goal."
import pytest

from franken import practice, recipes, scenes
from franken.errors import UserError


def said(*texts): return [[dict(role="assistant", content=t)] for t in texts]


def answers(q):
    steps, answer = scenes.trace(q)
    return said(scenes.completion(steps, answer), scenes.completion(f"{steps} ; 1 + 1 = 3", answer), answer, scenes.completion(steps, "39"), "<answer> </answer>")


@pytest.mark.parametrize("goal, expected", [("answer", [1.1, 1.1, 1., .1, 0.]), ("steps", [1.1, .1, 0., .1, 0.])])
def test_rewards_by_goal(goal, expected):
    q = scenes.questions("vision_to_reasoning", 1, seed=0)[0]
    functions, weights = practice.rewards(practice.Practice(goal=goal), recipes.find_recipe("grpo"))
    values = [f(completions=answers(q), question=[q] * 5, completion_ids=[[0] * 9] * 5) for f in functions]
    assert [sum(w * v for w, v in zip(weights, column)) for column in zip(*values)] == pytest.approx(expected)


def test_what_is_sound_is_right():
    qs = scenes.questions("vision_to_reasoning", 50, seed=1)
    texts = [t for q in qs for t in answers(q)]
    asked = [q for q in qs for _ in range(5)]
    assert all(s <= r for s, r in zip(practice.sound(texts, asked), practice.right(texts, asked)))


def test_dapo_also_weighs_length():
    functions, weights = practice.rewards(practice.Practice(longest=10), recipes.find_recipe("dapo"))
    assert functions[-1](completion_ids=[[0] * 8, [0] * 9, [0] * 10]) == [0, -.5, -1] and weights[-1] == 1


def test_a_prompt_depends_on_seed_and_number_alone():
    p = practice.Practice(worlds=((scenes.FAINT, 1), (scenes.LARGE, 3)))
    a, b = practice.Drawn(p, 3), practice.Drawn(p, 3)
    assert [a.row(i)["question"] for i in (5, 1, "spare 0 1")] == [b.row(i)["question"] for i in (5, 1, "spare 0 1")]
    assert a.row(1)["question"] != a.row(2)["question"] != practice.Drawn(p, 4).row(2)["question"]
    assert {a.row(i)["question"].scene.ink for i in range(40) if a.row(i)["question"].scene} == {1., .4}


def test_the_data_hold_the_batches_of_a_run():
    p = practice.Practice(steps=5, prompts=4, reuse=2)
    assert len(practice.dataset(practice.Drawn(p, 0), p)) == 3 * 4  # the third batch is used once


@pytest.mark.parametrize("wrong", [dict(goal="form"), dict(steps=0), dict(rollouts=1), dict(prompts=3, accumulate=2), dict(reuse=0), dict(lr="1e-6"), dict(steps="20"), dict(prompts=True)])
def test_practice_that_cannot_be_done_is_refused(wrong):
    with pytest.raises(UserError, match=list(wrong)[-1]): practice.Practice(**wrong)

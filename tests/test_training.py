"One run in one folder: refused before anything is written, claimed by its settings, scored by world."
import json

import pytest

from franken import organism, scenes, teaching, training
from franken.errors import UserError
from franken.practice import Practice
from franken.trio import Checkpoint


@pytest.mark.parametrize("wrong, says", [(dict(recipe="ppo"), "--recipe"), (dict(freeze="layer_7"), "--freeze"), (dict(recipe="ril", teachers=["nowhere"]), "nowhere")])
def test_bad_settings_leave_nothing_behind(tmp_path, wrong, says):
    with pytest.raises(UserError, match=says): training.train("organism", tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_one_run(tmp_path):
    training.claim(tmp_path, dict(recipe="grpo", seed=1))
    training.claim(tmp_path, dict(recipe="grpo", seed=1))
    with pytest.raises(UserError, match="seed is 1, here it is 2"): training.claim(tmp_path, dict(recipe="grpo", seed=2))


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    start = Checkpoint(str(teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path / "in")))
    practice = Practice(steps=1, prompts=1, rollouts=2, longest=4)
    made = training.run(start, tmp_path / "run", practice=practice)
    settings = json.loads((tmp_path / "run" / "train.json").read_text())
    assert settings["start"] == start.fingerprint and settings["practice"]["steps"] == 1
    monkeypatch.setattr(training.trainer_room(), "reinforce", None)
    assert training.run(start, tmp_path / "run", practice=practice) == made


def test_scores_stand_by_world(tmp_path):
    model = teaching.keep(organism.build_model(3, seed=1), organism.build_processor(), tmp_path / "in")
    plain = training.score(model, {"organism": scenes.WORLD}, 3)
    assert list(plain.ability) == ["vision", "vision_to_reasoning", "reasoning", "overall"] and set(plain.world) == {"organism"}
    refined = training.score(model, scenes.WORLDS, 3)
    assert list(refined.world) == ["plain", "faint", "large"] and set(refined.ability) == {"overall"} and set(refined.n) == {3}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    "Three checkpoints of the 7B's architecture that do not know the organism's words, and a file of questions for them."
    from families import build, picture
    folder, vlm = tmp_path_factory.mktemp("strangers"), build("qwen2_5_vl")
    for member in ("base", "in", "rl"): vlm.model.save_pretrained(folder / member), vlm.processor.save_pretrained(folder / member)
    picture(1, 32, 32).save(folder / "one.png")
    rows = [dict(question="how many red things ?", answer="2", image="one.png", kind="number"), dict(question="what is 2 ?", answer="2", kind="number")]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_other_checkpoints_practise_on_a_file(stranger, tmp_path, monkeypatch):
    from franken.trio import load_trio
    trio = load_trio(None, *(str(stranger / m) for m in ("base", "in", "rl")), "tags")
    config = tmp_path / "settings.yaml"
    config.write_text("recipe: dapo\nlearn: decoder + vision\nreward: [0.9, 0.1]\npractice: {steps: 2, lr: 0.01, prompts: 2, rollouts: 4, longest: 6}\ntrainer: {top_p: 0.9, per_device_train_batch_size: 4}\n")
    monkeypatch.setattr(training, "graders", lambda style, practice, recipe, weights: ([lambda completions, **_: [float(len(c[0]["content"]) % 3) for c in completions], lambda completions, **_: [0.] * len(completions)], [1., 0.]))
    curve = training.train(trio, tmp_path / "run", freeze="late", data=stranger / "questions.jsonl", config=config)
    settings, shown = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("train", "proof"))
    assert settings["recipe"] == "dapo" and settings["learn"] == "decoder + vision" and settings["practice"]["prompts"] == 2 and settings["extra"]["top_p"] == .9
    moved = {n for n, (a, b) in shown["hashes"].items() if a != b}
    assert moved and all(n.startswith(("decoder.layers.0.", "decoder.layers.1.", "vision.")) for n in moved)  # four layers, of which thirds leave two to learn
    assert len(curve) == 1 and curve.reward.notna().all()
    with pytest.raises(UserError, match="another run's settings: data"):  # the same folder, other questions
        other = tmp_path / "other.jsonl"
        other.write_text('{"question": "what is 2 ?", "answer": "2"}')
        training.train(trio, tmp_path / "run", freeze="late", data=other, config=config)


@pytest.mark.parametrize("more, says", [(dict(recipe="spark"), "--recipe spark"), (dict(practice=Practice(goal="steps")), "--goal"), (dict(teachers=["organism:rl"]), "--teacher"), (dict(recipe="ril"), "vocabulary"),
                                        (dict(recipe="ril", practice=Practice(rollouts=3)), "rollouts"), (dict(config="openmmreasoner"), "use_vllm")])
def test_what_does_not_go_with_a_file_or_a_recipe_is_refused(stranger, tmp_path, more, says):
    from franken.trio import load_trio
    trio = load_trio(None, *(str(stranger / m) for m in ("base", "in", "rl")))
    if more.get("recipe") == "ril": trio = __import__("dataclasses").replace(trio, rl=load_trio("organism").rl)
    with pytest.raises(UserError, match=says): training.train(trio, tmp_path / "run", data=stranger / "questions.jsonl", **more)
    assert not (tmp_path / "run").exists()


def test_an_answer_that_no_rule_can_judge_is_no_wrong_answer(monkeypatch):
    from franken import practice
    from franken.grading import Grade, Truth
    from franken.recipes import find_recipe
    from franken.trio import TAGS
    verdicts = {"a": True, "b": False, "c": None}
    monkeypatch.setattr(practice, "mark", lambda text, truth, style: Grade(verdicts[text], None, "stub"))
    functions, weights = practice.graders(TAGS, Practice(longest=10), find_recipe("dapo"))
    said = dict(completions=[[dict(content=c)] for c in "abc"], truth=[Truth("1", "math")] * 3, completion_ids=[[0] * 10] * 3)
    rows = list(zip(*(f(**said) for f in functions)))
    assert rows == [(1., 0., -1.), (0., 0., -1.), (None, None, None)] and weights == [1., practice.FORM, 1.]  # TRL leaves out what has no reward at all


def test_strangers_without_a_file_are_told_so(stranger, tmp_path):
    from franken.trio import load_trio
    trio = load_trio(None, *(str(stranger / m) for m in ("base", "in", "rl")))
    with pytest.raises(UserError, match="--data"): training.train(trio, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, says", [("recipes: grpo", "recipes: not known"), ("practice: {stepz: 1}", "stepz"), ("[1, 2]", "a list"), ("a: [", "not YAML")])
def test_a_configuration_is_read_strictly(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=says): training.read_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="openmmreasoner"): training.read_config("nowhere")


def test_the_published_settings_are_ones_that_trl_takes(tmp_path):
    from dataclasses import replace
    from franken.recipes import find_recipe
    for path in training.CONFIGS.glob("*.yaml"):
        if path.stem.startswith("accelerate"): continue
        told = training.read_config(path.stem)
        practice = replace(training.OTHERS, **told["practice"])
        here = told["trainer"] | dict(use_vllm=False, bf16=False)  # what this machine lacks
        found = training.trainer_room().configuration(tmp_path, practice, find_recipe(told["recipe"]), 0, extra=here)
        assert found.generation_batch_size == practice.prompts * practice.rollouts == found.per_device_train_batch_size * found.gradient_accumulation_steps, path
        assert (found.learning_rate, found.loss_type, found.beta) == (practice.lr, here.get("loss_type", find_recipe(told["recipe"]).loss), here.get("beta", 0.)), path
    with pytest.raises(UserError, match="divisor"): training.trainer_room().accumulation(Practice(prompts=3, rollouts=2), 4, 1)

"The world that is drawn: harder worlds are hard in one place, and the default one is as it was."
import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest

from franken import scenes


@pytest.mark.parametrize("name", scenes.WORLDS)
def test_worlds_ask_in_one_form_and_true_traces_solve_them(name):
    world = scenes.WORLDS[name]
    asked = scenes.questions("vision_to_reasoning", 300, seed=4, world=world)
    for q in asked:
        stated = [int(x.ask) for x in q.quantities if not x.reads]
        assert stated and len(stated) < len(q.quantities) and all(world.least <= v <= world.largest for v in stated)
        steps, answer = scenes.trace(q)
        assert answer == q.answer and 0 <= int(answer) <= scenes.LARGEST and scenes.faithful(q, scenes.completion(steps, answer))
        assert q.scene.ink == world.ink
    assert asked == scenes.questions("vision_to_reasoning", 300, seed=4, world=world)


def test_ink_changes_only_the_things():
    scene = scenes.draw_scene(random.Random(3))
    faint, bare = replace(scene, ink=.5), replace(scene, ink=0.)
    blank = scenes.pixels(scenes.Scene((None,) * 9, scene.seed))
    assert (scenes.pixels(bare) == blank).all()                       # no ink, no things
    dark, half = (np.abs(scenes.pixels(s).astype(int) - blank).sum() for s in (scene, faint))
    assert 0 < half < dark and faint.describe() == scene.describe()


def test_a_world_that_states_nothing_is_the_world():
    "Stored results rest on these questions: a new parameter must not move them."
    said = "\n".join(f"{q.text} {q.answer}" for family in scenes.FAMILIES for q in scenes.questions(family, 200, 0))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "cf2cef473815c193"  # of the questions before there were worlds
    assert scenes.questions("vision_to_reasoning", 50, 0) == scenes.questions("vision_to_reasoning", 50, 0, world=scenes.World())
    assert all(q.quantities[0].reads and all(x.reads for x in q.quantities) for q in scenes.questions("vision_to_reasoning", 200, 0))

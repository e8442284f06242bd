"The organism: words, eyes, and a folder that transformers loads."
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from franken import organism, scenes
from franken.trio import load_trio
from franken.vlm import Prompt, load_vlm


@pytest.fixture(scope="module")
def processor(): return organism.build_processor()


def test_patches_are_the_processors(processor):
    pictures = np.stack([scenes.pixels(scenes.draw_scene(random.Random(i))) for i in range(5)])
    theirs = processor.image_processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    assert torch.allclose(organism.patches(pictures), theirs, atol=1e-5)


@pytest.mark.parametrize("school", [organism.SEEING, organism.LOOKING_UP, organism.ColdStart()])
def test_lessons_are_what_the_chat_template_says(processor, school):
    rng = random.Random(0)
    for _ in range(20):
        e = school.example(rng)
        image = [dict(type="image")] if e.image is not None else []
        messages = [dict(role=role, content=[*(image if i == 0 and role == "user" else []), dict(type="text", text=text)])
                    for i, turn in enumerate(e.turns) for role, text in zip(("user", "assistant"), turn)]
        text = processor.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 9)
        ids, labels = organism.encode(e, processor.tokenizer)
        assert processor.tokenizer.encode(text) == ids
        assert processor.tokenizer.pad_token_id not in ids  # no unknown word
        answers = " ".join(f"{a} <eos>" for _, a in e.turns)
        assert processor.tokenizer.decode([l for l in labels if l != -100]) == answers


def test_saved_and_loaded_it_says_the_same(tmp_path, processor):
    model = organism.build_model(3, seed=1)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    q = scenes.questions("vision", 1, seed=0)[0]
    prompt = [Prompt(q.text, scenes.image(q.scene))]
    loaded = load_vlm(tmp_path)
    batch = loaded.encode(prompt)
    with torch.no_grad(): assert torch.equal(loaded.logits(prompt), model.eval()(**batch).logits)


@pytest.mark.parametrize("member", ["base", "in", "rl"])
def test_the_shipped_trio_loads_with_no_key_missing(member):
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(load_trio("organism").members[member].folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_rl_moved_only_the_decoder_layers():
    trio = load_trio("organism")
    for name in trio.in_.names():
        if not name.startswith("decoder.layers"): assert torch.equal(trio.in_.tensor(name), trio.rl.tensor(name)), name

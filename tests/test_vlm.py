"A VLM opened up: what a batch says is what its prompts say one by one, whatever ran before."
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from franken import organism, scenes
from franken.errors import UserError
from franken.vlm import Prompt, Vlm, load_processor, load_vlm, model_name, plain_generation, projector, seeded, stack

def prompts_of(questions): return [Prompt(q.text, scenes.image(q.scene) if q.scene else None) for q in questions]

@pytest.fixture(scope="module")
def vlm(): return Vlm(organism.build_model(6), organism.build_processor(), "newborn")

LOOK = prompts_of(scenes.questions("vision", 5, seed=1))
THINK = prompts_of(scenes.questions("reasoning", 4, seed=1))
MIXED = [LOOK[0], THINK[0], THINK[1], LOOK[1], LOOK[2]]

@pytest.mark.parametrize("prompts", [LOOK, THINK, MIXED], ids=["visual", "text", "mixed"])
def test_together_as_one_by_one(vlm, prompts):
    assert len({len(vlm.encode([p])["input_ids"][0]) for p in prompts}) > 1, "the rows must differ in padding"
    for row, prompt in zip(vlm.logits(prompts), prompts):
        one = vlm.logits([prompt])[0]
        torch.testing.assert_close(row[-len(one):], one, atol=1e-5, rtol=0)
    assert vlm.generate(prompts, 12) == [vlm.generate([p], 12)[0] for p in prompts]

@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_batch_size_is_no_matter(vlm, size): assert vlm.generate(MIXED, 8, batch_size=size) == vlm.generate(MIXED, 8)

def test_text_after_images_as_before_them():
    fresh = Vlm(organism.build_model(6), organism.build_processor())
    logits, said = fresh.logits(THINK), fresh.generate(THINK, 12)
    fresh.generate(LOOK[:4], 4), fresh.logits(LOOK[:4])
    assert torch.equal(fresh.logits(THINK), logits)
    assert fresh.generate(THINK, 12) == said

def test_stale_offsets_would_be_seen(vlm):
    "The trap is real: with the offsets of an image batch, a decoder continues a text from elsewhere."
    batch = vlm.encode(THINK)
    vlm.model.model.rope_deltas = torch.full((len(THINK), 1), -6)
    vlm.encode(THINK)
    assert vlm.model.model.rope_deltas is None
    position_ids = batch["attention_mask"].cumsum(-1) - 1
    moved = position_ids.clone()
    moved[:, -1] -= 6
    with torch.no_grad(): right, wrong = (vlm.model(**batch, position_ids=p).logits[:, -1] for p in (position_ids, moved))
    torch.testing.assert_close(right, vlm.logits(THINK)[:, -1], atol=1e-5, rtol=0)
    assert (right - wrong).abs().max() > 1e-2

def test_visual_tokens(vlm):
    batch = vlm.encode(MIXED)
    assert vlm.visual(batch).sum(1).tolist() == [9, 0, 0, 9, 9]
    assert not (vlm.visual(batch) & (batch["attention_mask"] == 0)).any()

def test_seen_batch_has_the_same_bits(vlm):
    for prompts in (LOOK, MIXED, THINK):
        batch = vlm.encode(prompts)
        seen = vlm.see(batch)
        for _ in range(2): assert torch.equal(vlm.model(**seen).logits, vlm.model(**batch).logits)
        assert vlm.say(seen, 6) == vlm.say(batch, 6)

def test_stops_when_all_rows_have_ended(vlm):
    calls, eos = [], vlm.tokenizer.eos_token_id
    def force(module, args, logits):
        calls.append(1)
        if len(calls) == 3: logits[..., eos] = 1e9
    handle = vlm.model.lm_head.register_forward_hook(force)
    try: vlm.generate(LOOK, max_new_tokens=30)
    finally: handle.remove()
    assert len(calls) == 3

def test_sampling_is_seeded_and_leaves_the_outer_numbers_alone(vlm):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draws = [vlm.generate(MIXED, 10, temperature=1., seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert draws[0] == draws[1] != draws[2]
    with seeded(3): first = torch.rand(2)
    with seeded(3): assert torch.equal(torch.rand(2), first)

def test_no_answer_contains_a_placeholder_of_an_image(vlm):
    batch = vlm.encode(LOOK * 10)
    with seeded(0): ids = vlm.model.generate(**batch, **vlm.settings(40, temperature=1.), min_new_tokens=40)
    media = [vlm.tokenizer.convert_tokens_to_ids(t) for t in organism.SPECIAL if t.startswith("<|image") or t.startswith("<|vision") or t.startswith("<|video")]
    assert len(media) == 4
    assert not torch.isin(ids[:, batch["input_ids"].shape[1]:], torch.tensor(media)).any()

def test_a_checkpoints_sampling_habits_are_dropped():
    given = GenerationConfig(repetition_penalty=1.05, temperature=.1, top_k=1, eos_token_id=[2, 7], pad_token_id=0)
    plain = plain_generation(organism.build_config(6), given)
    assert plain.eos_token_id == [2, 7] and plain.pad_token_id == 0
    assert plain.repetition_penalty in (None, 1.) and plain.top_k in (None, GenerationConfig().top_k)

def test_reloaded_says_the_same_with_the_same_bits(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert torch.equal(again.logits(MIXED), vlm.logits(MIXED))
    assert type(again.processor) is organism.OrganismProcessor and again.dtype == torch.float32 and again.name == tmp_path.name
    assert again.checkpoint.folder == tmp_path and len(again.fingerprint) == 16

def test_a_folder_without_an_image_processor_is_refused(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads no images"): load_processor(tmp_path)

def test_a_stock_processor_is_left_to_transformers(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("franken.vlm.AutoProcessor.from_pretrained", lambda folder: asked.append(folder) or type("Stock", (), dict(image_processor=1))())
    load_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(processor_class="Qwen2_5_VLProcessor")))
    load_processor(tmp_path)
    assert asked == [tmp_path, tmp_path]

def test_names():
    assert [model_name(m) for m in ("organism:rl", "/a/b/in", "Qwen/Qwen2.5-VL-7B-Instruct")] == ["rl", "in", "Qwen2.5-VL-7B-Instruct"]

def test_a_system_prompt_comes_first(vlm):
    ids = vlm.encode([Prompt("5 + 5 ?", system="count")])["input_ids"][0]
    words = vlm.tokenizer.decode(ids).split()
    assert words.index("count") < words.index("5")

def test_fingerprint_follows_the_weights():
    one, same, other = (Vlm(organism.build_model(3, seed), organism.build_processor()).fingerprint for seed in (0, 0, 1))
    assert one == same != other

@pytest.mark.parametrize("family", "qwen2_vl qwen2_5_vl qwen3_vl llava llava_next llava_onevision internvl gemma3 paligemma mistral3 idefics3 smolvlm".split())
def test_parts_of_other_families(family):
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    assert len(stack(model.get_decoder())) == model.config.get_text_config().num_hidden_layers
    assert stack(model.get_encoder(modality="image")) is not stack(model.get_decoder())
    assert projector(model) is not None and isinstance(model.config.image_token_id, int)

"A VLM opened up: what a batch says is what its prompts say one by one, whatever ran before; in twelve families."
import json

import families
import pytest
import torch
from families import FAMILIES, picture
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from franken import organism, scenes
from franken.errors import UserError
from franken.vlm import Prompt, Traits, Vlm, check, load_processor, load_vlm, model_name, plain_generation, seeded, stack

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
    (tmp_path / "preprocessor_config.json").write_text("{}")
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

def test_several_images_of_a_prompt():
    one, two = picture(0), picture(1)
    assert Prompt("?").images == () and Prompt("?", one).images == (one,) and Prompt("?", (one, two)).images == Prompt("?", [one, two]).images == (one, two)
    assert [part["type"] for part in Prompt("?", (one, two)).messages[0]["content"]] == ["image", "image", "text"]

def test_the_place_of_an_image_in_a_text_is_refused(vlm):
    with pytest.raises(UserError, match=r"prompt: '<\|image_pad\|>' in"): vlm.encode([Prompt("<|image_pad|> count red ?")])

def test_which_visual_tokens_are_whose(vlm):
    batch = vlm.encode([Prompt("any red ?", (LOOK[0].image, LOOK[1].image)), THINK[0], LOOK[2]])
    rows = vlm.images(batch)
    assert [[len(at) for at in row] for row in rows] == batch.counts == vlm.see(batch).counts == [[9, 9], [], [9]]
    for at, row in zip(rows, vlm.visual(batch)): assert torch.equal(torch.cat([torch.tensor([], dtype=torch.long), *at]), row.nonzero()[:, 0])
    assert [[len(at) for at in row] for row in vlm.images(dict(batch))] == [[18], [], [9]], "a plain dictionary: one image a row"

# ---- what is refused

class Without:
    "A module that looks like another but for some attributes."
    def __init__(self, module, **changed): self.module, self.changed = module, changed
    def __getattr__(self, name): return self.changed[name] if name in self.changed else getattr(self.module, name)

def test_a_missing_part_is_named(vlm):
    def refused(message, model, processor=vlm.processor):
        with pytest.raises(UserError, match=message): Vlm(model, processor, "odd")
    text_only = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    refused(r"odd \(LlamaForCausalLM\): no vision encoder", text_only)
    refused("no stack of layers", Without(vlm.model, get_decoder=lambda: nn.Linear(2, 2)))
    refused("no vision blocks of its own", Without(vlm.model, get_encoder=lambda modality: vlm.model.get_decoder()))
    refused("a stack of 2 modules in its decoder. Expected: the 6 layers", Without(vlm.model, get_decoder=lambda: nn.Sequential(nn.ModuleList([nn.Linear(2, 2)] * 2))))
    refused("a PreTrainedTokenizerFast|a TokenizersBackend", vlm.model, vlm.tokenizer)
    fused = organism.build_model(2)
    del fused.model.language_model.layers[1].self_attn.k_proj
    refused("without self_attn.k_proj", fused)
    refused("no image_token_id", Without(vlm.model, config=Without(vlm.model.config, image_token_id=None)))

@pytest.mark.parametrize("module, change, message", [
    (lambda v: v.layers[2].self_attn, lambda out: (out[0], out[1] / 2) if out[1] is not None else out, "rows of attention in layer 2 that miss 1 by 0.5"),
    (lambda v: v.layers[1].mlp, lambda out: out + torch.rand_like(out), "move when each state is set to itself"),
    (lambda v: v.projector, lambda out: out * 0, "do not move when visual tokens do"),
    (lambda v: v.layers[3], lambda out: out[..., :8].repeat(1, 1, 4)[:, 1:], "layer 3 takes .* gives")], ids=["rows", "identity", "edit", "shapes"])
def test_checks_find_what_they_look_for(module, change, message):
    vlm = families.build("llava")
    wrong = module(vlm)
    wrong.forward = lambda *args, usual=wrong.forward, **kwargs: change(usual(*args, **kwargs))
    with pytest.raises(UserError, match=message): check(vlm)

# ---- twelve families

TRAITS = dict(qwen3_vl=Traits(False, False, 2), gemma3=Traits(False, True, 0, (0, 2)), paligemma=Traits(True, True, 0))
COUNTS = dict(llava=([16], [16, 16]), llava_next=([36], [52, 36]), llava_onevision=([36], [17, 17]), idefics3=([20], [12, 20]), smolvlm=([20], [12, 20]),
              internvl=([4], [12, 4]), gemma3=([4], [4, 4]), paligemma=([16], [16, 16]))  # of a square image; of a wide and a square one together

@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_traits(family):
    vlm = families.built(family)
    assert vlm.n_layers == families.LAYERS and len(vlm.vision_blocks) == 3 and vlm.projector is not None
    assert vlm.traits == TRAITS.get(family, Traits(False, False, 0))

@pytest.mark.parametrize("family", FAMILIES)
def test_whose_visual_tokens_in_every_family(family):
    vlm, two = families.built(family), (picture(1, 64, 32), picture(2))
    prompts = [Prompt("red ?", picture(0)), Prompt("how many red things ?", two)] + ([Prompt("blue ?")] if family != "paligemma" else [])
    batch, (one, several) = vlm.encode(prompts), COUNTS.get(family, ([4], [8, 4]))
    assert batch.counts[:2] == [one, several] and batch.counts[2:] in ([], [[]])
    with torch.no_grad(): logits = vlm.model(**batch).logits
    wide, square = vlm.images(batch)[1]
    other = vlm.encode([prompts[0], Prompt(prompts[1].text, (two[0], picture(3))), *prompts[2:]])
    with torch.no_grad(): embedded = [vlm.model(**b, output_hidden_states=True).hidden_states[0][1] for b in (batch, other)]
    changed = (embedded[0] != embedded[1]).any(-1)
    assert not changed[wide].any() and changed[square].any() and int(changed.sum()) == int(changed[square].sum()), "another second image changes its own visual tokens only"

@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_together_as_one_by_one(family):
    vlm = families.built(family)
    prompts = [Prompt("red ?", picture(0)), Prompt("how many red things ?", picture(1)), Prompt("the", picture(2)) if family == "paligemma" else Prompt("is the one red ?")]
    batch, together = vlm.encode(prompts), vlm.logits(prompts)
    for row, prompt in zip(together, prompts):
        one = vlm.logits([prompt])[0]
        torch.testing.assert_close(row[-len(one):], one, atol=1e-5, rtol=0)
    assert vlm.generate(prompts, 6) == vlm.generate(prompts, 6, batch_size=1)
    seen = vlm.see(batch)
    assert "pixel_values" not in seen and torch.equal(vlm.model(**seen).logits, together) and vlm.say(seen, 4) == vlm.say(batch, 4)
    assert (together - vlm.logits([Prompt(p.text, p.image and picture(9)) for p in prompts]))[:2, -1].abs().amax(-1).min() > 1e-3, "the image matters"

@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral3"])  # its stock processor cannot be imported without torchvision
def test_every_family_from_disk(family, tmp_path):
    vlm, prompts = families.built(family), [Prompt("how many red things ?", picture(1))]
    vlm.model.save_pretrained(tmp_path), vlm.processor.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert type(again.processor).__name__ == type(vlm.processor).__name__ and torch.equal(again.logits(prompts), vlm.logits(prompts))

def test_without_a_chat_template_there_must_be_an_image():
    vlm = families.built("paligemma")
    with pytest.raises(UserError, match="without an image"): vlm.encode([Prompt("red ?")])
    with pytest.raises(UserError, match="no chat template"): vlm.encode([Prompt("red ?", picture(0))], ["yes"])

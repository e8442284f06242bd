"Swap and skip: invariants bit for bit, and equality with plain hooks."
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from franken import organism, scenes
from franken.errors import UserError
from franken.interventions import prepare_swap, record, skip, skip_each, skip_logits, skipped_generate, swap, swap_each, swap_logits, swapped_generate
from franken.vlm import Prompt, Vlm

LAYERS = range(6)
PAIRS = [p for f in scenes.FUNCTIONS for p in scenes.pairs(f, 2, seed=0)]
TARGETS = [Prompt(p.question.text, scenes.image(p.question.scene)) for p in PAIRS]
SOURCES = [Prompt(p.question.text, scenes.image(p.source)) for p in PAIRS]
TEXTS = [Prompt(q.text) for q in scenes.questions("reasoning", 5, seed=0)]

@pytest.fixture(scope="module")
def vlm():
    "Random, and with larger weights than at birth, so that the image and every layer move the answer."
    model = organism.build_model(6, seed=1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim == 2 else None
    return Vlm(model, organism.build_processor())

class Hooks:
    "The same interventions by plain PyTorch hooks."
    def __init__(self, vlm): self.vlm, self.handles = vlm, []
    def __enter__(self): return self
    def __exit__(self, *_): [h.remove() for h in self.handles]
    def skip(self, layers):
        for i in layers: self.handles.append(self.vlm.layers[i].register_forward_hook(lambda m, args, out: args[0]))
        return self
    def swap(self, layer, at, states):
        def once(m, args):
            if args[0].shape[1] != at.shape[1]: return None  # a later step of generation
            hidden = args[0].clone()
            hidden[at] = states
            return (hidden, *args[1:])
        self.handles.append(self.vlm.layers[layer].register_forward_pre_hook(once))
        return self

def test_the_image_matters(vlm):
    assert (vlm.logits(TARGETS) - vlm.logits(SOURCES))[:, -1].abs().amax(-1).min() > 1e-2
    assert vlm.generate(TARGETS, 8) != vlm.generate(SOURCES, 8)

@pytest.mark.parametrize("layer", LAYERS)
def test_identity_swap_moves_no_bit(vlm, layer):
    assert torch.equal(swap_logits(vlm, TARGETS, TARGETS, layer), vlm.logits(TARGETS))

def test_identity_swap_says_the_same(vlm):
    for said in swap_each(vlm, TARGETS, TARGETS, LAYERS, 10): assert said == vlm.generate(TARGETS, 10)

def test_empty_skip_moves_no_bit(vlm):
    for prompts in (TARGETS, TEXTS, TARGETS[:2] + TEXTS):
        assert torch.equal(skip_logits(vlm, prompts, []), vlm.logits(prompts))
        assert skip(vlm, prompts, [], 10) == vlm.generate(prompts, 10)

def test_all_visual_tokens_from_layer_0_are_the_source_image(vlm):
    assert torch.equal(swap_logits(vlm, TARGETS, SOURCES, 0), vlm.logits(SOURCES))
    assert swap(vlm, TARGETS, SOURCES, 0, 10) == vlm.generate(SOURCES, 10)
    assert swap(vlm, SOURCES, TARGETS, 0, 10) == vlm.generate(TARGETS, 10)

def test_each_later_layer_leaves_more_of_the_target(vlm):
    gaps = [(swap_logits(vlm, TARGETS, SOURCES, layer) - vlm.logits(TARGETS))[:, -1].norm() for layer in LAYERS]
    assert gaps[0] > gaps[-1] > 0

def test_text_before_the_image_is_untouched(vlm):
    batch = vlm.encode(TARGETS)
    before = vlm.visual(batch).cumsum(1) == 0
    assert torch.equal(swap_logits(vlm, TARGETS, SOURCES, 2)[before], vlm.logits(TARGETS)[before])

@pytest.mark.parametrize("layer", [0, 2, 5])
def test_swap_equals_plain_hooks(vlm, layer):
    batch, states = prepare_swap(vlm, TARGETS, SOURCES)
    with Hooks(vlm).swap(layer, vlm.visual(batch), states[layer]), torch.no_grad():
        logits = vlm.model(**batch).logits
        ids = vlm.model.generate(**batch, **vlm.settings(12), output_logits=True, return_dict_in_generate=True)
    assert torch.equal(swap_logits(vlm, TARGETS, SOURCES, layer), logits)
    ours = swapped_generate(vlm, batch, states[layer], layer, 12, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, ids.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, ids.logits, strict=True))

@pytest.mark.parametrize("prompts", [TARGETS, TEXTS], ids=["visual", "text"])
@pytest.mark.parametrize("layers", [[0], [3], [1, 4], [5, 0, 2]], ids=str)
def test_skip_equals_plain_hooks_at_every_step(vlm, prompts, layers):
    batch = vlm.encode(prompts)
    assert (batch["attention_mask"] == 0).any(), "left padding is part of the test"
    with Hooks(vlm).skip(layers), torch.no_grad():
        logits = vlm.model(**batch).logits
        ids = vlm.model.generate(**batch, **vlm.settings(12), output_logits=True, return_dict_in_generate=True)
    assert torch.equal(skip_logits(vlm, prompts, layers), logits)
    ours = skipped_generate(vlm, batch, layers, 12, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, ids.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, ids.logits, strict=True))

def test_to_skip_all_layers_leaves_the_embeddings(vlm):
    batch = vlm.encode(TEXTS)
    with torch.no_grad(): expected = vlm.model.lm_head(vlm.model.model.language_model.norm(vlm.model.get_input_embeddings()(batch["input_ids"])))
    assert torch.equal(skip_logits(vlm, TEXTS, list(LAYERS)), expected)

@pytest.mark.parametrize("layers", [[0], [2, 3]], ids=str)
def test_skip_together_as_one_by_one(vlm, layers):
    for prompts in (TARGETS[:6], TEXTS): assert skip(vlm, prompts, layers, 10) == [skip(vlm, [p], layers, 10)[0] for p in prompts]

def test_swap_together_as_one_by_one(vlm):
    assert swap(vlm, TARGETS[:6], SOURCES[:6], 3, 10) == [swap(vlm, [t], [s], 3, 10)[0] for t, s in zip(TARGETS[:6], SOURCES[:6])]
    assert swap(vlm, TARGETS[:6], SOURCES[:6], 3, 10, batch_size=2) == swap(vlm, TARGETS[:6], SOURCES[:6], 3, 10)

@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_cache_grows_by_one_position_a_step(vlm, steps):
    batch, states = prepare_swap(vlm, TARGETS, SOURCES)
    length = batch["input_ids"].shape[1]
    for run in (lambda **more: swapped_generate(vlm, batch, states[2], 2, steps, **more), lambda **more: skipped_generate(vlm, batch, [2], steps, **more)):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        run(past_key_values=cache, min_new_tokens=steps)
        assert {layer.keys.shape[2] for layer in cache.layers} == {length + steps - 1}

def test_generation_under_a_skip_stops_early(vlm):
    calls, eos = [], vlm.tokenizer.eos_token_id
    def force(module, args, logits):
        calls.append(1)
        if len(calls) == 3: logits[..., eos] = 1e9
    handle = vlm.model.lm_head.register_forward_hook(force)
    try: skip(vlm, TEXTS, [1], 30)
    finally: handle.remove()
    assert len(calls) == 3

def test_recorded_states_are_the_layers_inputs(vlm):
    batch = vlm.encode(SOURCES)
    with torch.no_grad(): hidden = vlm.model(**batch, output_hidden_states=True).hidden_states
    for layer, states in enumerate(record(vlm, batch)): assert torch.equal(states, hidden[layer][vlm.visual(batch)])

def test_unequal_grids_are_refused(vlm):
    wide = [Prompt(p.text, Image.new("RGB", (96, 24))) for p in TARGETS[:2]]
    with pytest.raises(UserError, match="pair 0.*equal grids"): swap(vlm, TARGETS[:2], wide, 0)
    with pytest.raises(UserError, match="pair 1"): swap(vlm, TARGETS[:2], [TARGETS[0], Prompt("count red ?")], 0)
    assert vlm.generate(TARGETS[:2], 4) == swap(vlm, TARGETS[:2], TARGETS[:2], 0, 4), "a refusal leaves the model as it was"

def test_a_run_leaves_nothing_behind(vlm):
    before = vlm.logits(TARGETS), vlm.generate(TEXTS, 8)
    swap(vlm, TARGETS, SOURCES, 1, 4), skip_each(vlm, TEXTS, [[0], [1, 2]], 4)
    assert torch.equal(vlm.logits(TARGETS), before[0]) and vlm.generate(TEXTS, 8) == before[1]

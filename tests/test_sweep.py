"The sweep: token by token what the plain way says, for its price in token-layers."
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from families import FAMILIES, LAYERS, built, picture
from franken import interventions, organism, scenes, sweep
from franken.errors import UserError
from franken.interventions import skip_ids_each, swap_ids_each
from franken.sweep import MODES, Unfit, Work, broken, counted, least, least_skip, prefill, protocol, skip_each, skip_ids, swap_each, swap_ids, swap_variant, tail_start
from franken.vlm import Prompt, Vlm

PAIRS = [p for f in ("recognition", "attribute", "counting", "relation") for p in scenes.pairs(f, 3, seed=0)]
TARGETS = [Prompt(p.question.text, scenes.image(p.question.scene)) for p in PAIRS]
SOURCES = [Prompt(p.question.text, scenes.image(p.source)) for p in PAIRS]
TEXTS = [Prompt(q.text) for q in scenes.questions("reasoning", 5, seed=0)]
SETS = [[], [0], [3], [5], [4, 1], [1, 2, 3]]
NEW = 8

def grown(seed=1):
    "Random, with larger weights than at birth, so that the image and every layer move the answer."
    model = organism.build_model(6, seed=seed)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim == 2 else None
    return Vlm(model, organism.build_processor())

@pytest.fixture(scope="module")
def vlm(): return grown()

def same(vlm, fast, plain):
    "Equal ids, layer by layer; generate stops where all rows of its batch have ended, the sweep pads to the longest that was allowed."
    pad = vlm.model.generation_config.pad_token_id
    return all(torch.equal(a[:, :b.shape[1]], b) and (a[:, b.shape[1]:] == pad).all() for a, b in zip(fast, plain, strict=True))

def plain_swaps(vlm, targets, sources, new, modes=MODES): return {mode: swap_ids_each(vlm, targets, sources, range(vlm.n_layers), new, mode) for mode in modes}

def test_swaps_are_the_plain_ones(vlm):
    batch = vlm.encode(TARGETS)
    assert (batch["attention_mask"] == 0).any() and vlm.visual(batch)[:, tail_start(vlm.visual(batch)):].any(), "unequal rows are part of the test"
    fast, plain = swap_ids(vlm, TARGETS, SOURCES, range(6), NEW), plain_swaps(vlm, TARGETS, SOURCES, NEW)
    for mode in MODES: assert same(vlm, fast[mode], plain[mode]), mode
    assert same(vlm, [fast["clean"]], [vlm.new(batch, vlm.model.generate(**batch, **vlm.settings(NEW)))])
    assert torch.equal(fast["residual"], fast["kv_from"]) and not torch.equal(fast["residual"], fast["kv_at"])
    assert all((fast["residual"][layer] != fast["clean"]).any() for layer in range(5)), "each layer must matter"
    assert swap_each(vlm, TARGETS, SOURCES, range(6), NEW)["kv_at"] == interventions.swap_each(vlm, TARGETS, SOURCES, range(6), NEW, "kv_at")

def test_some_layers_and_one_mode(vlm):
    whole = swap_ids(vlm, TARGETS, SOURCES, range(6), NEW)
    some = swap_ids(vlm, TARGETS, SOURCES, [4, 0, 2], NEW, modes=["kv_at"])
    assert set(some) == {"clean", "kv_at"} and torch.equal(some["kv_at"], whole["kv_at"][[4, 0, 2]])

def test_windows_of_kv_at(vlm):
    windows = [(0, 1), (1, 4), tuple(range(6))]
    fast = swap_ids(vlm, TARGETS, SOURCES, windows, NEW, modes=["kv_at"])["kv_at"]
    assert same(vlm, fast, swap_ids_each(vlm, TARGETS, SOURCES, windows, NEW, "kv_at"))
    assert torch.equal(fast[2], swap_ids(vlm, TARGETS, SOURCES, [0], NEW, modes=["kv_from"])["kv_from"][0])

@pytest.mark.parametrize("layer", [0, 2, 5])
def test_kv_at_is_a_cache_edited_by_hand(vlm, layer):
    target, source = vlm.encode(TARGETS[:1]), vlm.encode(SOURCES[:1])
    visual, caches, end = vlm.visual(target)[0], [], tail_start(vlm.visual(target))
    positions, _ = vlm.model.model.get_rope_index(**{k: target[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")})
    for batch in (target, source):
        caches.append(DynamicCache())
        part = {k: v[:, :end] if v.shape == batch["input_ids"].shape else v for k, v in batch.items()}
        with torch.no_grad(): vlm.model(**part, past_key_values=caches[-1], position_ids=positions[..., :end])
    for name in ("keys", "values"): getattr(caches[0].layers[layer], name)[:, :, visual[:end]] = getattr(caches[1].layers[layer], name)[:, :, visual[:end]]
    ids, at, said = target["input_ids"][:, end:], positions[..., end:], []
    for _ in range(NEW):
        with torch.no_grad(): logits = vlm.model(input_ids=ids, past_key_values=caches[0], position_ids=at).logits[:, -1]
        ids, at = sweep.greedy(vlm, logits)[:, None], at[..., -1:] + 1
        said.append(ids.item())
        if said[-1] == vlm.tokenizer.eos_token_id: break
    assert swap_ids(vlm, TARGETS[:1], SOURCES[:1], [layer], NEW, modes=["kv_at"])["kv_at"][0, 0, :len(said)].tolist() == said

@pytest.mark.parametrize("prompts", [TARGETS, TEXTS, TARGETS[:2] + TEXTS], ids=["visual", "text", "mixed"])
def test_skips_are_the_plain_ones(vlm, prompts):
    assert same(vlm, skip_ids(vlm, prompts, SETS, NEW), skip_ids_each(vlm, prompts, SETS, NEW))
    assert skip_each(vlm, prompts, SETS, NEW) == interventions.skip_each(vlm, prompts, SETS, NEW)

def test_swapping_with_oneself_changes_nothing(vlm):
    ids = swap_ids(vlm, TARGETS, TARGETS, range(6), NEW)
    for mode in MODES: assert all(torch.equal(at, ids["clean"]) for at in ids[mode])

def test_from_layer_0_it_is_the_other_image(vlm):
    ids = swap_ids(vlm, TARGETS, SOURCES, [0], NEW, modes=["residual"])
    assert torch.equal(ids["residual"][0], swap_ids(vlm, SOURCES, TARGETS, [0], NEW, modes=["residual"])["clean"])

def test_rows_end_at_their_own_time():
    "Many tokens end an answer: rows leave the batch at different steps, and what is left goes on as it would have."
    vlm, targets, sources = grown(), TARGETS[:6], SOURCES[:6]
    vlm.model.generation_config.eos_token_id = list(range(20, 40))
    fast = swap_ids(vlm, targets, sources, range(6), 16)
    assert len((fast["kv_at"] != vlm.model.generation_config.pad_token_id).sum(-1).unique()) > 4
    for mode, plain in plain_swaps(vlm, targets, sources, 16, ["residual", "kv_at"]).items(): assert same(vlm, fast[mode], plain)
    assert same(vlm, skip_ids(vlm, targets, SETS, 16), skip_ids_each(vlm, targets, SETS, 16))
    vlm.model.generation_config.eos_token_id = None
    assert same(vlm, swap_ids(vlm, targets, sources, [1], 20)["residual"], swap_ids_each(vlm, targets, sources, [1], 20))

def test_eager_attention(vlm):
    sdpa = swap_ids(vlm, TARGETS, SOURCES, range(6), NEW)
    vlm.model.set_attn_implementation("eager")
    try:
        eager, skips = swap_ids(vlm, TARGETS, SOURCES, range(6), NEW), skip_ids(vlm, TEXTS, SETS, NEW)
        plain = skip_ids_each(vlm, TEXTS, SETS, NEW)
    finally: vlm.model.set_attn_implementation("sdpa")
    assert all(torch.equal(eager[mode], ids) for mode, ids in sdpa.items()) and same(vlm, skips, plain)

@pytest.mark.parametrize("share", [2.5, .4])
def test_memory_splits_rows_and_then_layers(vlm, share):
    targets, sources = TARGETS[:5], SOURCES[:5]
    whole, skips = swap_ids(vlm, targets, sources, range(6), NEW), skip_ids(vlm, targets, SETS, NEW)
    budget = int(share * 19 * sweep.row_bytes(vlm.model.config, 19, NEW, 4))  # that many rows with all their variants, about
    assert sweep.fit_rows(vlm, 19, NEW, 19, budget) == ((2, 23) if share > 1 else (1, 7))
    with counted(vlm) as work: parts = swap_ids(vlm, targets, sources, range(6), NEW, budget=budget)
    assert all(torch.equal(parts[name], whole[name]) for name in whole) and work.images == 2 * len(targets)
    assert torch.equal(skip_ids(vlm, targets, SETS, NEW, budget=budget), skips)

SEVERAL = ("qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "gemma3", "paligemma", "mistral3")

@pytest.mark.parametrize("family, several", [*((f, False) for f in FAMILIES), *((f, True) for f in SEVERAL)])
def test_any_family(family, several):
    vlm, new = built(family), 2 if family == "gemma3" else 5  # Gemma3's window is as long as prompt and answer
    words = ["how many red", "what color is the one"] if family != "gemma3" else ["how many"]
    show = lambda i: (picture(i), picture(i + 50)) if several else picture(i)
    targets, sources = ([Prompt(text, show(i + shift)) for i, text in enumerate(words)] for shift in (0, 100))
    sets, unfit = [[], [0], [3], [1, 2]], several and dict(qwen3_vl="image features", gemma3="see all").get(family)
    if unfit != "see all": assert same(vlm, skip_ids(vlm, targets, sets, new), skip_ids_each(vlm, targets, sets, new))
    if unfit:
        with pytest.raises(Unfit, match=unfit): swap_ids(vlm, targets, sources, range(LAYERS), new)
        return
    fast, plain = swap_ids(vlm, targets, sources, range(LAYERS), new), plain_swaps(vlm, targets, sources, new)
    for mode in MODES: assert same(vlm, fast[mode], plain[mode]), mode
    assert any((fast[mode] != fast["clean"]).any() for mode in MODES)

def test_the_plain_way_where_the_fast_one_is_not_right():
    vlm = built("gemma3")
    targets, sources = [Prompt("how many red things ?", picture(0))], [Prompt("how many red things ?", picture(100))]
    with pytest.warns(UserWarning, match="gemma3 is swapped layer by layer, since not all its layers see"): said = swap_each(vlm, targets, sources, range(LAYERS), 5)
    assert {m: said[m] for m in MODES} == {m: interventions.swap_each(vlm, targets, sources, range(LAYERS), 5, m) for m in MODES}
    assert said["clean"] == vlm.generate(targets, 5)
    with pytest.warns(UserWarning, match="one by one"): assert skip_each(vlm, targets, [[1]], 5) == interventions.skip_each(vlm, targets, [[1]], 5)

def test_other_words_in_the_source(vlm):
    others = [replace(p, text="count red ?") for p in SOURCES]
    with pytest.raises(Unfit, match="their text"): swap_ids(vlm, TARGETS, others, [2], NEW)
    with pytest.warns(UserWarning, match="layer by layer"): said = swap_each(vlm, TARGETS, others, [2], NEW, ["residual"])
    assert said["residual"] == interventions.swap_each(vlm, TARGETS, others, [2], NEW)

def test_no_warning_otherwise(vlm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_each(vlm, TARGETS, SOURCES, [1], 2), skip_each(vlm, TEXTS, [[1]], 2)

@pytest.mark.parametrize("change", ["norm", "scale", "mask"])
def test_a_model_that_does_more_is_found_out(vlm, change):
    "The checks see what the sweep would miss: logits that are bent, words that are scaled, a mask that hides."
    language, hooks = vlm.model.model.language_model, []
    if change == "norm": hooks.append(vlm.model.lm_head.register_forward_hook(lambda m, args, out: out.tanh() if out.ndim == 3 else out))
    if change == "scale":
        hooks.append(language.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | dict(inputs_embeds=2 * kwargs["inputs_embeds"])), with_kwargs=True))
    if change == "mask":
        def hide(m, args, kwargs): return args, kwargs | dict(attention_mask=torch.ones(len(args[0]), 1, *[args[0].shape[1]] * 2, dtype=torch.bool).tril().triu(-3))
        hooks += [layer.register_forward_pre_hook(hide, with_kwargs=True, prepend=True) for layer in vlm.layers]
    try:
        with pytest.raises(Unfit, match=dict(norm="logits", scale="embeddings", mask="see all")[change]): skip_ids(vlm, TARGETS[:2], [[1]], 2)
    finally: [hook.remove() for hook in hooks]

def test_the_bill():
    vlm, (T, t, L, g, n) = grown(), (17, 5, 6, 7, 3)
    vlm.model.generation_config.eos_token_id = None
    batch = vlm.encode(TARGETS[6:6 + n])
    assert batch["input_ids"].shape[1] == T == t + tail_start(vlm.visual(batch))
    with counted(vlm) as one: swap_ids(vlm, TARGETS[6:6 + n], SOURCES[6:6 + n], range(L), g, ["kv_from"])
    with counted(vlm) as three: swap_ids(vlm, TARGETS[6:6 + n], SOURCES[6:6 + n], range(L), g)
    with counted(vlm) as skips: skip_ids(vlm, TARGETS[6:6 + n], [[layer] for layer in range(L)], g)
    assert one == Work(n * (2 * T * L + t * L * (L + 1) // 2 + (g - 1) * L * (L + 1)), 2 * n)
    assert one.token_layers <= 1.2 * n * least(T, t, L, g).token_layers and three.token_layers <= 1.2 * n * least(T, t, L, g, modes=2).token_layers
    assert three.images == 2 * n and skips.images == n and skips.token_layers <= 1.2 * n * least_skip(T, L, g).token_layers
    assert protocol(430, 8, 24) == Work(273_312, 26) and least(430, 30, 24, 8) == Work(34_248, 2)

def test_where_the_tail_begins():
    visual = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert tail_start(visual) == 3 and tail_start(visual[1:]) == 4 == tail_start(visual[2:]) and not broken(visual)
    marks = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    assert tail_start(marks) == 1 and broken(marks)

def test_ahead_of_whom_one_looks():
    assert sweep.looks_ahead(prefill(built("paligemma"), batch := built("paligemma").encode([Prompt("how many", picture(0))])), built("paligemma").visual(batch))
    assert not sweep.looks_ahead(prefill(built("gemma3"), batch := built("gemma3").encode([Prompt("how many", picture(0))])), built("gemma3").visual(batch))

def test_one_variant_for_what_is_one_function(vlm):
    assert swap_variant(vlm, "residual", 3) == swap_variant(vlm, "kv_from", 3) != swap_variant(vlm, "kv_from", 2)
    assert swap_variant(vlm, "residual", 3, told=True) != swap_variant(vlm, "kv_from", 3, told=True) == swap_variant(vlm, "kv_from", 3)
    assert swap_variant(vlm, "kv_at", 5) == swap_variant(vlm, "kv_from", 5)

def test_user_errors(vlm):
    with pytest.raises(UserError, match="mode.*poke"): swap_each(vlm, TARGETS, SOURCES, [0], 2, ["poke"])
    with pytest.raises(UserError, match="layer.*0 to 5"): swap_each(vlm, TARGETS, SOURCES, [6], 2)
    with pytest.raises(UserError, match="layer.*0 to 5"): skip_each(vlm, TEXTS, [[7]], 2)
    with pytest.raises(UserError, match="resize.*target"): swap_each(vlm, TARGETS, SOURCES, [0], 2, resize="target")
    wide = [Prompt(p.text, Image.new("RGB", (96, 24))) for p in TARGETS[:2]]
    with pytest.raises(UserError, match="pair 0"): swap_each(vlm, TARGETS[:2], wide, [0], 2)
    assert swap_each(vlm, TARGETS[:2], wide, [0], 2, ["residual"], resize="source")["residual"] == interventions.swap_each(vlm, TARGETS[:2], wide, [0], 2, resize="source")

def test_a_sweep_leaves_nothing_behind(vlm):
    before, hooks = vlm.logits(TARGETS), lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]
    count, said = hooks(), vlm.generate(TEXTS, 6)
    swap_each(vlm, TARGETS, SOURCES, [1], 2), skip_each(vlm, TEXTS, [[1]], 2)
    with pytest.raises(Unfit): swap_ids(vlm, TARGETS, TARGETS[::-1], [2], 2)
    assert hooks() == count and torch.equal(vlm.logits(TARGETS), before) and vlm.generate(TEXTS, 6) == said


def test_the_cache_is_called_as_this_transformers_calls_it():
    assert sweep.cache_word({"cache", "past_key_values"}) == "cache" and sweep.cache_word(["attention_mask"]) == "past_key_values"

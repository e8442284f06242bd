"Checkpoints are read by one name whatever wrote them, and what does not fit is said."
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from franken.errors import UserError
from franken.organism import build_model, build_processor
from franken.trio import BARE, BOXED, MMR1, PLAIN, REGISTRY, Checkpoint, check_parameters, load_trio, resolve_model, trios
from franken.weights import canonical, split


def save(model, folder):
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def rewrite(folder, out, rename=lambda n: n, change=lambda t: t, drop=()):
    "A copy of a checkpoint with other names and other tensors."
    shutil.copytree(folder, out)
    tensors = {rename(n): change(t).contiguous() for n, t in load_file(folder / "model.safetensors").items() if n not in drop}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def modern(name):
    "The name of a parameter as in the state dict since transformers 4.52."
    if name.startswith("visual."): return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build_model(layers=3, seed=0), tmp_path_factory.mktemp("organism") / "base")


def says(*parts):
    return pytest.raises(UserError, match=".*".join(parts))


@pytest.mark.parametrize("name, same", [
    ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
    ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
    ("language_model.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),  # LLaVA, before and after
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
    ("vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight", "model.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"),
    ("model.text_model.layers.0.self_attn.k_proj.weight", "model.language_model.layers.0.self_attn.k_proj.weight"),  # Idefics3, Qwen
])
def test_canonical(name, same):
    assert canonical(name) == canonical(same) == canonical(canonical(name))


@pytest.mark.parametrize("name, parts", [
    ("decoder.layers.11.self_attn.q_norm.weight", ("decoder", "norm", 11)), ("decoder.layers.0.mlp.down_proj.weight", ("decoder", "mlp", 0)),
    ("vision.blocks.7.attn.qkv.bias", ("vision", "attention", 7)), ("vision.patch_embed.proj.weight", ("vision", "other", None)),
    ("vision.vision_model.encoder.layers.2.mlp.fc1.weight", ("vision", "mlp", 2)), ("projector.mlp.0.weight", ("projector", "mlp", None)),
    ("embeddings.weight", ("rest", "other", None)), ("norm.weight", ("rest", "norm", None)),
])
def test_split(name, parts):
    assert split(name) == parts


def test_names_are_those_of_the_model(folder):
    model = build_model(layers=3, seed=0)
    checkpoint = Checkpoint(str(folder)).check()
    state = {canonical(n): t for n, t in model.state_dict().items()}
    assert checkpoint.names() == sorted(state) and checkpoint.n_layers == 3
    assert all(torch.equal(t, state[n]) and checkpoint.shape(n) == tuple(t.shape) for n, t in checkpoint.tensors())


def test_layouts_shards_and_single_file_agree(folder, tmp_path):
    old = Checkpoint(str(folder))
    new = Checkpoint(str(rewrite(folder, tmp_path / "new", modern))).check()
    sharded = tmp_path / "sharded"
    build_model(layers=3, seed=0).save_pretrained(sharded, max_shard_size="500KB")
    build_processor().save_pretrained(sharded)
    sharded = Checkpoint(str(sharded)).check()
    assert len(sharded.files) > 1
    for other in (new, sharded):
        check_parameters(old, other)
        assert old.names() == other.names() and all(torch.equal(t, other.tensor(n)) for n, t in old.tensors())


def test_tied_head_is_no_parameter_of_its_own(folder, tmp_path):
    config = lambda out, tie: (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tie}))
    without = rewrite(folder, tmp_path / "without", drop=["lm_head.weight"])
    written = rewrite(folder, tmp_path / "written")
    config(without, True), config(written, True)
    untied = Checkpoint(str(folder))
    for tied in map(Checkpoint, (str(without), str(written))):
        assert tied.tied and "head.weight" not in tied.names() and torch.equal(tied.tensor("head.weight"), tied.tensor("embeddings.weight"))
        check_parameters(tied, untied)
    assert not untied.tied and "head.weight" in untied.names()


def test_fingerprint_is_of_the_content(folder, tmp_path):
    copy = Checkpoint(str(shutil.copytree(folder, tmp_path / "copy")))
    changed = Checkpoint(str(rewrite(folder, tmp_path / "changed", change=lambda t: t + 1)))
    assert Checkpoint(str(folder)).fingerprint == copy.fingerprint != changed.fingerprint
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert Checkpoint(copy.where).fingerprint == copy.fingerprint


def test_registry(monkeypatch, folder):
    monkeypatch.setenv("FRANKEN_ORGANISM", str(folder.parent))
    assert load_trio("organism").base.where == str(folder) == resolve_model("organism:base").where
    assert list(trios()["name"]) == list(REGISTRY) == ["organism", "organism-refine", "openmmreasoner", "mmr1", "revisual"]
    assert load_trio("mmr1", rl=folder).rl.where == str(folder) and load_trio("mmr1", rl=folder).style == MMR1
    own = load_trio(base=folder, in_=folder, rl=folder)
    assert own.name == "custom" and own.check().members.keys() == {"base", "in", "rl"}
    pinned = resolve_model("Qwen/Qwen2.5-VL-7B-Instruct@0a1b2c")
    assert (pinned.where, pinned.revision) == ("Qwen/Qwen2.5-VL-7B-Instruct", "0a1b2c")


def test_a_style_is_a_record_never_guessed(folder, tmp_path):
    for name in ("openmmreasoner", "mmr1", "revisual"):
        trio = load_trio(name)
        assert trio.style.name == name and trio.style_of("base") == PLAIN
        assert trio.style_of("in") == trio.style_of("rl") == trio.style_of("in:rl:rl") == trio.style
    assert load_trio(base=folder, in_=folder, rl=folder).style == BARE and load_trio(base=folder, in_=folder, rl=folder, style="boxed").style == BOXED
    hybrid = shutil.copytree(folder, tmp_path / "revisual-looking-name")
    (hybrid / "graft.json").write_text(json.dumps(dict(style=asdict(MMR1))))
    assert load_trio(base=folder, in_=folder, rl=hybrid).style == MMR1
    with says("style: 'tagz'", "mmr1"): load_trio("organism", style="tagz")


def test_bad_input(folder, tmp_path):
    with says("trio 'openreasoner'", "organism, organism-refine, openmmreasoner, mmr1, revisual", "--base"): load_trio("openreasoner")
    with says("only base, rl", "base, in and rl"): load_trio(base=folder, rl=folder)
    with says("organism:base, organism:in, organism:rl"): resolve_model("organism")
    with says("'sft' after", "organism:in"): resolve_model("organism:sft")
    with says("/no/such/folder: no such folder", "Check the path"): Checkpoint("/no/such/folder").check()

    empty = tmp_path / "empty"
    empty.mkdir()
    with says(str(empty / "config.json"), "no such file", "save_pretrained"): Checkpoint(str(empty)).check()
    build_processor().save_pretrained(empty)
    shutil.copy(folder / "config.json", empty)
    with says(str(empty), "no safetensors file", "save_pretrained"): Checkpoint(str(empty)).check()

    cut = shutil.copytree(folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) // 2, 100, 0):
        (cut / "model.safetensors").write_bytes(whole[:size])
        with says("cut/model.safetensors", "truncated", "again"): Checkpoint(str(cut)).check()

    shutil.copy(folder / "model.safetensors", cut)
    (cut / "config.json").write_text("{")
    with says("cut/config.json", "not JSON"): Checkpoint(str(cut)).check()


def test_missing_shard(tmp_path):
    folder = tmp_path / "sharded"
    build_model(layers=3, seed=0).save_pretrained(folder, max_shard_size="500KB")
    build_processor().save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    lost = shutil.copytree(folder, tmp_path / "lost")
    (lost / shard).unlink()
    with says(shard, "no such file", "index"): Checkpoint(str(lost)).check()
    name = "model.layers.0.self_attn.q_proj.weight"
    file = folder / index["weight_map"][name]
    save_file({n: t for n, t in load_file(file).items() if n != name}, file)
    with says("index.json", name): Checkpoint(str(folder)).check()


def test_three_that_do_not_fit(folder, tmp_path):
    narrow = rewrite(folder, tmp_path / "narrow", change=lambda t: t[:1] if t.shape == (128,) else t)
    with says("parameter decoder.layers.0.input_layernorm.weight", r"\(128,\)", r"\(1,\)", "narrow", "equal shapes"): load_trio(base=folder, in_=folder, rl=narrow).check()
    deep = save(build_model(layers=6, seed=0), tmp_path / "deep")
    with says("parameter decoder.layers.3", "and 33 more", "deep"): load_trio(base=folder, in_=deep, rl=folder).check()
    tokens = shutil.copytree(folder, tmp_path / "tokens")
    content = json.loads((tokens / "tokenizer.json").read_text())
    content["model"]["vocab"]["fifty"] = content["model"]["vocab"].pop("39")
    (tokens / "tokenizer.json").write_text(json.dumps(content))
    with says("tokenizer of", "tokens", "2 tokens differ; '39' is missing"): load_trio(base=folder, in_=folder, rl=tokens).check()

"An update is what was added: its norm, its spectrum, and nothing that is not there."
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trio import modern, rewrite, save

from franken.comparison import by_layer, by_region, characterize, compare, decay, effective_rank, position, stable_rank
from franken.errors import UserError
from franken.organism import build_model
from franken.tables import read_table
from franken.trio import load_trio


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    "Three random organisms: IN moved everywhere but in the vision tower, RL by rank 2 in the decoder's matrices."
    root = tmp_path_factory.mktemp("trio")
    model, g = build_model(layers=3, seed=0), torch.Generator().manual_seed(1)
    save(model, root / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "visual" not in name: p += .01 * torch.randn(p.shape, generator=g)
        save(model, root / "in")
        for name, p in model.named_parameters():
            if "language_model.layers" in name and p.ndim == 2: p += .005 * torch.randn(p.shape[0], 2, generator=g) @ torch.randn(2, p.shape[1], generator=g)
        save(model, root / "rl")
    return load_trio(base=root / "base", in_=root / "in", rl=root / "rl")


@pytest.fixture(scope="module")
def both(trio): return compare(trio)


def test_squared_norm_is_the_sum_of_squared_singular_values(both):
    matrices = both[both["cols"].notna()]
    assert np.allclose(matrices["frobenius"]**2, [np.square(s).sum() for s in matrices["sigma"]], rtol=1e-12)
    assert all(list(s) == sorted(s, reverse=True) and len(s) == min(r, c) for s, r, c in zip(matrices["sigma"], matrices["rows"], matrices["cols"]))
    assert both[both["cols"].isna()]["sigma"].isna().all()


def test_ranks():
    for n in (1, 5, 40): assert np.isclose(effective_rank(np.ones(n)), n) and np.isclose(stable_rank(np.ones(n)), n)
    s = np.random.default_rng(0).random(20)
    assert 1 <= stable_rank(s) <= 20 and 1 <= effective_rank(s) <= 20 and np.isclose(effective_rank(3 * s), effective_rank(s))
    assert np.isclose(effective_rank(np.r_[s, 0, 0]), effective_rank(s))


def test_low_rank_update_is_seen_as_such(both):
    matrices = both[(both["section"] == "decoder") & both["cols"].notna()]
    rank = matrices.groupby("step")["effective_rank"].mean()
    assert 1 < rank["RL-IN"] < 2.1 < 20 < rank["IN-Base"]


def test_what_did_not_move_is_zero_and_has_no_rank(both):
    vision = both[both["section"] == "vision"]
    assert len(vision) and (vision["frobenius"] == 0).all() and (vision["relative"] == 0).all()
    assert vision["effective_rank"].isna().all() and vision["stable_rank"].isna().all()
    assert not any(any(s) for s in vision["sigma"].dropna())
    born = characterize(torch.zeros(3), torch.ones(3))
    assert born["frobenius"] == 3**.5 and np.isnan(born["relative"])


def test_old_and_new_layouts_are_the_same_checkpoint(trio, tmp_path):
    new = rewrite(trio.in_.folder, tmp_path / "new", modern)
    df = compare(trio.in_, str(new))
    assert len(df) == len(trio.in_.names()) and (df["frobenius"] == 0).all()
    df = compare(trio.base, str(new), step="IN-Base")
    moved = compare(trio)
    assert np.array_equal(df["frobenius"], moved[moved["step"] == "IN-Base"]["frobenius"])


def test_layers_and_regions_add_up(both):
    decoder = both[both["section"] == "decoder"]
    total = (decoder["frobenius"]**2).groupby(decoder["step"]).sum()
    layers, regions = by_layer(both), by_region(both)
    assert np.allclose((layers[layers["section"] == "decoder"].set_index("step")["frobenius"]**2).groupby("step").sum(), total)
    assert np.allclose((regions.set_index("step")["frobenius"]**2).groupby("step").sum(), total) and np.allclose(regions.groupby("step")["share"].sum(), 1)
    assert set(position(both).dropna()) == {-2, -1, 0, 1, 2, 3} and set(regions["region"]) == {"early", "mid", "late"}
    matrices = decoder[decoder["cols"].notna() & (decoder["kind"] != "norm") & (decoder["layer"] == 1) & (decoder["step"] == "RL-IN")]
    mean = by_layer(both, "mean").query("step == 'RL-IN' and section == 'decoder' and layer == 1")["frobenius"].item()
    assert len(matrices) == 7 and np.isclose(mean, matrices["frobenius"].mean())


def test_decay_starts_at_zero_and_falls(both):
    for _, part in decay(both).groupby(["step", "layer"]):
        assert part["log_ratio"].iloc[0] == 0 and part["log_ratio"].is_monotonic_decreasing and part["rank"].max() <= 50


def test_table_is_written_and_the_same_twice(trio, tmp_path):
    df = compare(trio, out=tmp_path / "a")
    compare(trio, out=tmp_path / "b")
    assert (tmp_path / "a/compare.parquet").read_bytes() == (tmp_path / "b/compare.parquet").read_bytes()
    assert read_table(tmp_path / "a", "compare")["frobenius"].equals(df["frobenius"])


def test_strays_are_named(trio, tmp_path):
    lacking = rewrite(trio.rl.folder, tmp_path / "lacking", drop=["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="decoder.layers.2.mlp.up_proj.weight, norm.weight: in .*not in .*lacking"): compare(trio.in_, str(lacking))
    extra = shutil.copytree(trio.rl.folder, tmp_path / "extra")
    save_file(load_file(extra / "model.safetensors") | {"adapter.weight": torch.ones(2)}, extra / "model.safetensors")
    with pytest.raises(UserError, match="adapter.weight: in .*extra, not in"): compare(trio.in_, str(extra))

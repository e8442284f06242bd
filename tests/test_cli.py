"The command line: every command has help with an example, wrong input ends with a message and 2, a fault of ours with a traceback and 1."
import json
import os
import socket
import subprocess
import sys

import pytest
from families import build
from typer.testing import CliRunner

from franken import cli, trio
from franken.tables import read_table

COMMANDS = ["dissect", "abilities", "attend", "localize", "compare", "graft", "train", "study", "verdicts", "report", "trios"]


def run(*words): return CliRunner().invoke(cli.app, [str(w) for w in words])


def refused(result, *words):
    "Exit code 2, all the words in the message, and no traceback."
    said = result.output
    assert result.exit_code == 2, said
    assert "Traceback" not in said
    for word in words: assert str(word) in said
    return True


def test_commands():
    help = run("--help")
    assert help.exit_code == 0 and "\n    franken dissect organism --quick" in help.output and "(Eq" not in help.output
    assert [c.name or c.callback.__name__ for c in cli.app.registered_commands] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    help = run(command, "--help")
    assert help.exit_code == 0 and f"Example: franken {command}" in help.output


def test_the_example_of_localize_runs():
    words = next(c.epilog for c in cli.app.registered_commands if c.callback.__name__ == "localize").removeprefix("Example: franken ").split()
    said = run(*words[:words.index("--n")], "--n", "1")
    assert said.exit_code == 0 and "counting" in said.output


@pytest.mark.parametrize("words", [["dissect", "organisms"], ["abilities", "organisms"], ["attend", "organisms"], ["graft", "organisms"], ["train", "organisms"]])
def test_unknown_trio(words): assert refused(run(*words), "organisms", "openmmreasoner")


def test_half_a_trio(): assert refused(run("dissect", "--base", "somewhere"), "base", "rl")


def test_no_trio(): assert refused(run("dissect"), "--base", "franken trios")


def test_missing_folder(tmp_path): assert refused(run("localize", tmp_path / "gone"), tmp_path / "gone")


def test_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("no model here")
    assert refused(run("dissect", "--base", tmp_path, "--in", tmp_path, "--rl", tmp_path), tmp_path, "config.json")


def test_folder_with_a_config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    assert refused(run("compare", tmp_path, tmp_path), tmp_path)


@pytest.mark.parametrize("model", ["organism", "organism:middle", "organisms:rl"])
def test_not_a_model(model): assert refused(run("localize", model), model.split(":")[0])


@pytest.mark.parametrize("command", ["verdicts", "report"])
def test_folder_without_tables(command, tmp_path):
    assert refused(run(command, tmp_path), tmp_path, "franken dissect")
    assert refused(run(command, tmp_path / "gone"), tmp_path / "gone", "no such folder")


def test_parser_errors():
    assert refused(run("disect", "organism"), "disect")
    assert refused(run("abilities", "organism", "--n", "many"), "--n")
    assert refused(run("abilities", "organism", "--n", "0"), "--n")


@pytest.fixture
def alone(monkeypatch):
    "No network: whoever asks for it fails."
    monkeypatch.setattr(socket.socket, "connect", lambda *_: (_ for _ in ()).throw(OSError("no network")))


def test_trios_need_no_network(alone):
    said = run("trios")
    told = {block.split()[1]: dict(line.split(maxsplit=1) for line in block.splitlines()) for block in said.output.strip().split("\n\n")}
    assert said.exit_code == 0 and list(told) == list(trio.REGISTRY) == ["organism", "organism-refine", "openmmreasoner", "mmr1", "revisual"]
    for name, row in told.items(): assert row.keys() == {"name", "base", "in", "rl", "revision", "style"} and row["style"] == trio.load_trio(name).style.name
    assert (told["mmr1"]["base"], told["mmr1"]["rl"], told["mmr1"]["style"]) == ("Qwen/Qwen2.5-VL-7B-Instruct", "MMR1/MMR1-7B-RL", "mmr1")
    pinned = trio.load_trio("mmr1", rl="MMR1/MMR1-7B-RL@abc123", style="tags")
    assert (pinned.rl.where, pinned.rl.revision, pinned.style) == ("MMR1/MMR1-7B-RL", "abc123", trio.TAGS)


@pytest.mark.parametrize("words,missing", [(["compare", "mmr1:in", "mmr1:rl"], "MMR1/MMR1-7B-SFT"), (["localize", "revisual:base"], "Qwen/Qwen2.5-VL-7B-Instruct"), (["abilities", "openmmreasoner"], "Qwen/Qwen2.5-VL-7B-Instruct"),
                                           (["graft", "--base", "organism:base", "--in", "x/y@main", "--rl", "x/z"], "organism:base")])
def test_weights_that_cannot_be_reached(words, missing, alone, tmp_path):
    assert refused(run(*words, "--out", tmp_path / "out"), missing, "Hugging Face hub") and not (tmp_path / "out").exists()


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(trio, "snapshot_download", lambda where, revision, **_: asked.append((where, revision)) or 1 / 0)
    assert refused(run("compare", "some/model@v1.2", "organism:rl"), "some/model", "ZeroDivisionError") and asked == [("some/model", "v1.2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny Qwen2.5-VL of random weights, as save_pretrained leaves it."
    vlm = build("qwen2_5_vl")
    vlm.model.save_pretrained(out := tmp_path_factory.mktemp("models") / "tiny")
    vlm.processor.save_pretrained(out)
    return out


def test_localize_a_folder_with_drawn_pairs(folder, tmp_path):
    said = run("localize", folder, "--pairs", "drawn", "--n", "2", "--modes", "kv_at", "--regions", "1,3", "--out", tmp_path)
    table = read_table(tmp_path, "localize")
    assert said.exit_code == 0 and set(table.model) == {"tiny"} and set(table.n) == {2} and set(table["mode"]) == {"kv_at"}
    assert table.groupby("function").layer.apply(list).to_dict() == dict.fromkeys(["counting", "grounding", "ocr", "recognition"], [0, 1, 2, 3])
    assert list(table.region[:4]) == ["early", "mid", "mid", "late"] and set(table.floor) == {0}


@pytest.mark.parametrize("more,said", [(["--pairs", "nowhere"], ["nowhere", "no such folder"]), (["--probes", "poke"], ["probes", "'poke'"]), (["--modes", "sideways"], ["modes", "'sideways'"]),
                                       (["--functions", "smell"], ["functions", "'smell'"]), (["--pairs", "drawn", "--resize", "target"], ["resize", "'target'"]),
                                       (["--probes", "skip", "--questions", "algebra"], ["'algebra'", "gsm8k"]), (["--probes", "skip", "--data", "gsm8k=nowhere"], ["nowhere", "gsm8k"])])
def test_localize_says_what_is_wrong(more, said, folder, tmp_path):
    assert refused(run("localize", folder, *more, "--out", tmp_path / "out"), *said) and not (tmp_path / "out").exists()


def test_a_fault_of_ours(monkeypatch):
    monkeypatch.setattr(cli, "find_trio", lambda *_: 1 / 0)
    result = run("attend", "organism")
    assert result.exit_code == 1
    assert "Traceback" in result.output and "a fault of ours" in result.output and "ZeroDivisionError" in result.output


def command(*words):
    "The real thing, in a process of its own."
    return subprocess.run([sys.executable, "-c", "from franken.cli import main; main()", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "120"})


def test_the_process_ends_with_2():
    ended = command("dissect", "organisms")
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("franken: ") and "Traceback" not in ended.stderr


def test_help_loads_no_torch():
    code = "import sys; from franken.cli import app; app(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_compare_of_two_of_three_and_of_strays(tmp_path):
    two = run("compare", "organism:in", "organism:rl", "--spectra", "none", "--out", tmp_path / "two")
    assert two.exit_code == 0 and "decoder" in two.output and (tmp_path / "two/compare.parquet").exists()
    three = run("compare", "organism:base", "organism:in", "organism:rl", "--top", 4)
    assert three.exit_code == 0 and "IN-Base" in three.output and "RL-IN" in three.output
    assert refused(run("compare", "organism:in"), "AFTER", "organism:in")
    assert refused(run("compare", "organism:in", "organism:rl", "--spectra", "some"), "spectra", "all, top or none")
    assert refused(run("compare", "organism:in", "organism:rl", "--convention", "ours"), "convention")
    assert run("compare", "organism:in", "organism:rl", "--convention", "reference").exit_code == 0


@pytest.mark.parametrize("more,said", [(["--recipe", "ppo"], ["--recipe", "lite_ppo"]), (["--freeze", "layer_7"], ["--freeze 'layer_7'", "no parameter"]), (["--freeze", "layers 0-9"], ["layer 6"]),
                                       (["--lesson", "bright"], ["--lesson 'bright'", "faint"]), (["--goal", "form"], ["goal", "steps"]), (["--config", "nowhere"], ["--config nowhere", "openmmreasoner"]),
                                       (["--data", "nowhere.csv"], ["nowhere.csv", "jsonl"]), (["--from-scratch", "--recipe", "grpo"], ["--from-scratch", "--recipe"])])
def test_train_says_what_is_wrong(more, said, tmp_path):
    assert refused(run("train", "organism", *more, "--out", tmp_path / "out"), *said) and not (tmp_path / "out").exists()


def test_train_with_late_frozen_in_a_few_steps(tmp_path):
    said = run("train", "organism", "--recipe", "grpo", "--freeze", "late", "--steps", 1, "--n", 4, "--out", tmp_path)
    assert said.exit_code == 0 and "24 of 24" in said.output
    assert set(read_table(tmp_path, "freeze").frozen) == {"late"} and (tmp_path / "proof.json").exists() and (tmp_path / "model" / "config.json").exists()
    assert refused(run("train", "organism", "--freeze", "early", "--steps", 1, "--out", tmp_path), "train.json", "freeze is 'late'")


def test_study_lists_and_refuses(tmp_path):
    listed = run("study", "lessons", "--list", "--out", tmp_path)
    assert listed.exit_code == 0 and len(listed.output.splitlines()) == 24 and "done" not in listed.output
    assert refused(run("study", "freeze", "--out", tmp_path), "'freeze'", "lessons") and refused(run("study", "--store", "--out", tmp_path), "no finished run")
    assert not any(tmp_path.iterdir())

"The command line: every command has help with an example, wrong input ends with a message and 2, a fault of ours with a traceback and 1."
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from franken import cli

COMMANDS = ["dissect", "abilities", "attend", "localize", "compare", "graft", "train", "verdicts", "report", "trios"]


def run(*words): return CliRunner().invoke(cli.app, [str(w) for w in words])


def refused(result, *words):
    "Exit code 2, all the words in the message, and no traceback."
    said = result.output
    assert result.exit_code == 2, said
    assert "Traceback" not in said
    for word in words: assert str(word) in said
    return True


def test_commands():
    assert run("--help").exit_code == 0
    assert [c.name or c.callback.__name__ for c in cli.app.registered_commands] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    help = run(command, "--help")
    assert help.exit_code == 0 and f"Example: franken {command}" in help.output


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


def test_trios_lists_them_all(): assert all(name in run("trios").output for name in ("organism", "openmmreasoner", "mmr1", "revisual"))


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

"""Every block of the README is executed, from top to bottom, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jettison.cli import main

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two_layers: Path) -> Path:
    """With a model of fewer layers under the name of the bundled one: the commands are the same, and faster."""
    path = tmp_path_factory.mktemp("readme")
    (path / "examples" / "models").mkdir(parents=True)
    (path / "examples" / "models" / "tiny-llama").symlink_to(two_layers)
    return path


def test_every_block_has_a_language_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(BLOCKS)


def test_make_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line.split("#")[0].split() for line in BLOCKS[0][1].splitlines()]
    assert [command[0] for command in commands] == ["make"] * len(commands)
    assert {command[1] for command in commands} <= set(targets)


def test_python_blocks_run(folder: Path) -> None:
    script = folder / "blocks.py"
    script.write_text("\n".join(text for language, text in BLOCKS if language == "python"))
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "tiny-llama-int4" / "model.onnx").is_file()


def test_shell_blocks_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: every command of its own would import torch once more. The script itself is run elsewhere."""
    lines = [line for language, text in BLOCKS[1:] if language == "sh" for line in text.splitlines() if line]
    monkeypatch.chdir(folder)
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, shlex.join(arguments)) == ("jettison", line.removeprefix("jettison ")), "no other shell syntax"
        assert main(arguments) == 0, capsys.readouterr().err

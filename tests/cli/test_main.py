"""The program as a whole: exit codes, streams, signals, and what it costs to start."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

import jettison.cli
from jettison.cli import main
from jettison.cli.parser import COMMANDS
from jettison.cli.signals import import_torch
from jettison.ir.errors import PassError
from tests.cli.running import MODEL, run_process


def test_help_lists_every_subcommand(run):
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert re.findall(r"^    (\w+) ", result.out, re.MULTILINE) == list(COMMANDS)
    for command in COMMANDS:
        result = run(command, "--help")
        assert result.code == 0
        assert "--json" in result.out
        assert "--verbose" in result.out


def test_no_arguments_show_the_help_and_exit_2(run):
    result = run()
    assert (result.code, result.out) == (2, "")
    assert "subcommands" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("optimise", "x"), "optimise"),
        (("verify",), "DIR"),
        (("verify", "a", "--fast"), "--fast"),
        (("optimize", "m", "--target", "cuda"), "cuda"),
        (("generate", "a"), "--prompt"),
        (("generate", "a", "--prompt-ids", "1,x"), "--prompt-ids"),
        (("generate", "a", "--prompt", "p", "--prompt-ids", "1"), "not allowed with"),
        (("eval", "a", "--seed", "-1"), "--seed"),
        (("eval", "a", "--con", "5"), "--con"),  # no abbreviations: a later flag would make them ambiguous
    ],
)
def test_usage_errors_take_the_way_of_all_errors(run, arguments, named):
    run(*arguments).fails(2, named, "--help")


def test_starting_imports_nothing_heavy():
    code = (
        "import sys\nfrom jettison.cli import main\n"
        "codes = [main(['--help']), main(['--version']), main(['optimize', '--help'])]\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "jettison 0." in done.stdout


def test_inspecting_needs_no_torch(onnx_artifact):
    code = (
        "import sys\nfrom jettison.cli import main\nartifact = sys.argv[1]\n"
        "codes = [main([command, artifact]) for command in ('inspect', 'verify', 'diff')]\n"
        "sys.exit(f'{codes}' if any(codes) or 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, onnx_artifact], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_console_script_is_this_program(onnx_artifact):
    script = Path(sysconfig.get_path("scripts")) / "jettison"
    done = subprocess.run([script, "verify", onnx_artifact, "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"ok": true' in done.stdout


def test_process_generates_text_with_nothing_on_stderr(onnx_artifact):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = run_process("generate", onnx_artifact, "--prompt", "“Hello”", "--max-new-tokens", 8, env=environment)
    assert (result.code, result.err) == (0, "")
    assert result.out.strip()


def test_process_fails_with_one_line_and_a_code(tmp_path):
    result = run_process("verify", tmp_path / "none")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert run_process("verify").code == 2


@pytest.mark.parametrize("command", [("passes", "--json"), ("inspect",), ("--help",)])
def test_a_reader_that_leaves_is_no_error(onnx_artifact, command):
    arguments = [*command, onnx_artifact] if command == ("inspect",) else command
    # Unbuffered, argparse meets the closed pipe itself, and ignores it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jettison", *map(str, arguments)], stdout=writer, stderr=subprocess.PIPE, text=True,
            check=False, env=environment,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141  # what a shell reports for a program that SIGPIPE ended


def test_verbose_adds_the_traceback(run, tmp_path):
    for arguments in (("verify", tmp_path / "none", "-v"), ("-v", "verify", tmp_path / "none")):
        result = run(*arguments)
        assert result.code == 1
        assert "Traceback" in result.err
        assert result.err.splitlines()[-1].startswith("error: ")


def fail_with(monkeypatch, error):
    def raise_it(*arguments, **options):
        raise error

    monkeypatch.setattr("jettison.cli.verify.run", raise_it)
    # The parser holds on to the function; it is built anew by every call.


def test_a_bug_says_so_and_how_to_reproduce_it(run, monkeypatch):
    fail_with(monkeypatch, KeyError("surprise"))
    result = run("verify", "a folder")
    assert (result.code, result.out) == (1, "")
    assert "KeyError: 'surprise'" in result.err
    assert "This is a bug in jettison" in result.err
    assert "jettison verify 'a folder'" in result.err
    assert "Traceback" not in result.err
    fail_with(monkeypatch, PassError("[some-pass] broke its promise"))
    result = run("verify", "a folder")
    assert result.code == 1
    assert result.err.startswith("error: [some-pass] broke its promise\nThis is a bug in jettison")
    assert "jettison verify 'a folder'" in result.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device. Free some space"),
        (PermissionError(13, "Permission denied", "/somewhere"), 1, "[/somewhere] Permission denied"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_trouble_of_the_machine_is_no_bug(run, monkeypatch, error, code, message):
    fail_with(monkeypatch, error)
    result = run("verify", "x").fails(code, message)
    assert result.err.count("\n") == 1


def test_ctrl_c_that_a_library_turns_into_its_own_error_is_ctrl_c(run, monkeypatch):
    def interrupted_import(args, terminal):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr("jettison.cli.verify.run", interrupted_import)
    assert run("verify", "x").fails(130).err == "error: interrupted\n"


def test_sigterm_unwinds_the_stack(run, monkeypatch):
    unwound = []

    def ended(args, terminal):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)

    monkeypatch.setattr("jettison.cli.verify.run", ended)
    assert run("verify", "x").code == 143
    assert unwound == [True]


def test_what_libraries_print_stays_out_of_the_result(run, monkeypatch):
    def chatty(args, terminal):
        sys.stdout.write("loading weights\n")
        warnings.warn("something is deprecated", stacklevel=1)
        terminal.document({"value": float("nan")})
        return 0

    monkeypatch.setattr("jettison.cli.verify.run", chatty)
    result = run("verify", "x", "--json")
    assert result.json == {"value": None}
    assert result.err == "loading weights\n"


def test_streams_and_handlers_are_left_as_they_were(run):
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        root = logging.root
        return sys.stdout, handlers, root.level, root.handlers[:], root.manager.disable, warnings.filters[:]

    before = state()
    assert run("passes", "-v").code == 0
    assert run("verify", "nothing").code == 1
    assert state() == before


def test_ctrl_c_waits_for_an_import_that_cannot_be_interrupted(monkeypatch):
    imported = []

    def slow_import(name):
        signal.raise_signal(signal.SIGINT)
        imported.append(name)

    monkeypatch.setattr("importlib.import_module", slow_import)
    with pytest.raises(KeyboardInterrupt):
        import_torch()
    assert imported == ["torch"]


def test_main_takes_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jettison", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("jettison ")


def test_every_subcommand_is_a_module_that_says_what_it_does():
    for command in COMMANDS:
        module = sys.modules[f"jettison.cli.{command}"]
        assert module.__doc__.startswith(f"`jettison {command}`: ")
    assert jettison.cli.INTERRUPTED == 130
    assert (MODEL / "config.json").is_file()

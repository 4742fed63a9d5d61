"""What the terminal shows: whole tables, progress, no control characters."""

from __future__ import annotations

import io
import json
import math

import pytest

from jettison.cli.console import Terminal, cell_text, size_text
from jettison.ir.progress import track


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def terminal(out=None, err=None, **options):
    return Terminal(out or io.StringIO(), err or io.StringIO(), **options)


def test_piped_tables_are_whole_whatever_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    out = io.StringIO()
    long = "x" * 300
    terminal(out).table(("name", "value"), [(long, 1234567), ("[bold]not markup[/bold]", 2)])
    lines = out.getvalue().splitlines()
    assert lines[2].rstrip().endswith("1,234,567")
    assert lines[2].startswith(long)
    assert lines[3].startswith("[bold]not markup[/bold]")


def test_tables_on_a_narrow_terminal_are_folded_not_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    terminal(out).table(("name", "meaning"), [("0123456789" * 5, "word " * 8)])
    shown = out.getvalue()
    assert "…" not in shown
    assert "".join(c for line in shown.splitlines()[2:] for c in line if c.isdigit()) == "0123456789" * 5
    assert shown.count("word") == 8


def test_a_terminal_gets_colour_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    out, err = Screen(), Screen()
    terminal(out, err).line("plain", style="green")
    terminal(out, err).complain("wrong")
    assert "\033[" in out.getvalue()
    assert "\033[" in err.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out, err = Screen(), Screen()
    terminal(out, err).line("plain", style="green")
    terminal(out, err).complain("wrong")
    assert out.getvalue() == "plain\n"
    assert err.getvalue() == "error: wrong\n"


def test_model_text_cannot_drive_the_terminal():
    pipe, screen = io.StringIO(), Screen()
    for out in (pipe, screen):
        terminal(out).text("a\033[2Jb\n\té😀\r")
    assert pipe.getvalue() == "a\033[2Jb\n\té😀\r"
    assert screen.getvalue() == "a\\x1b[2Jb\n\té😀\\r"


def test_document_is_json_whatever_the_numbers():
    out = io.StringIO()
    terminal(out).document({"a": [math.nan, math.inf, 1.5], "b": {"c": None}, "d": "é"})
    assert json.loads(out.getvalue()) == {"a": [None, None, 1.5], "b": {"c": None}, "d": "é"}
    assert out.getvalue().isascii()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.00012345, "0.0001234"), (1e-12, "1e-12"), (None, "-"), (True, "True"), ("x", "x")],
)
def test_cells(value, text):
    assert cell_text(value) == text


def test_sizes():
    assert size_text(900) == "900 bytes"
    assert size_text(3_608_576) == "3,608,576 bytes (3.4 MiB)"
    assert size_text(5 << 40) == "5,497,558,138,880 bytes (5.0 TiB)"


def work():
    with track("quantize-weights", 100) as advance:
        for _ in range(10):
            advance(10)
    with track("capture", 1) as advance:
        advance(1)


def progress_of(err, **options):
    shown = terminal(err=err, **options)
    with shown.progress():
        work()
    return err.getvalue()


def test_progress_is_a_bar_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = progress_of(Screen())
    assert "quantize-weights" in shown
    assert "capture" in shown
    assert progress_of(io.StringIO()) == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress_of(Screen()) == ""


def test_progress_is_a_line_per_step_in_a_verbose_log():
    lines = progress_of(io.StringIO(), is_verbose=True).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["quantize-weights", "capture"]


def test_progress_ends_with_the_step_that_failed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    err = Screen()
    with terminal(err=err).progress(), pytest.raises(KeyboardInterrupt), track("capture", 1):
        raise KeyboardInterrupt
    assert err.getvalue().endswith("\033[?25h") or "\033[?25h" in err.getvalue()  # the cursor is shown again

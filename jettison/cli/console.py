"""What the command line prints and where: results on stdout, progress and logs on stderr.

rich is imported on first use, so that `--help` and error messages do not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from jettison.ir.progress import Listener, listening

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

# Wide enough for any table: rich cuts what does not fit, and a pipe has no edge to fit into.
_PIPE_WIDTH = 20_000


class Terminal:
    """The two streams of one run of the program.

    Args:
        out: Standard output.
        err: Standard error.
        is_json: Whether stdout gets one JSON document and nothing else.
        is_verbose: Whether stderr gets logs and tracebacks.
    """

    def __init__(self, out: TextIO, err: TextIO, *, is_json: bool = False, is_verbose: bool = False) -> None:
        self._out, self._err = out, err
        self.is_json, self.is_verbose = is_json, is_verbose

    @cached_property
    def out(self) -> Console:
        """For tables and text of a result."""
        return _console(self._out)

    @cached_property
    def err(self) -> Console:
        """For progress and logs."""
        return _console(self._err)

    def document(self, values: dict[str, Any]) -> None:
        """Write the JSON document of `--json`. Numbers that JSON has no word for (NaN, infinity) become null."""
        self._out.write(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")

    def text(self, text: str) -> None:
        """Write text as it is, at once: a continuation appears token by token."""
        self._out.write(_visible(text) if self._out.isatty() else text)
        self._out.flush()

    def line(self, text: str = "", style: str | None = None) -> None:
        """Write one line of a result, in colour on a terminal."""
        self.out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Write one line beside the result, on stderr, where a person is looking or asked for logs."""
        if self._err.isatty() or self.is_verbose:
            self.err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def complain(self, text: str) -> None:
        """Write an error to stderr."""
        is_coloured = self._err.isatty() and not os.environ.get("NO_COLOR")
        prefix = "\033[1;31merror:\033[0m" if is_coloured else "error:"
        self._err.write(f"{prefix} {text}\n")
        self._err.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write a table; columns whose cells are all numbers stand to the right. Nothing is ever cut off.

        Args:
            columns: Headings.
            rows: Cells; integers get thousands separators, floats four significant digits, None a dash.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, heading in enumerate(columns):
            cells = [row[index] for row in rows if row[index] is not None]
            is_number = bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)
            table.add_column(Text(heading), justify="right" if is_number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell_text(cell)) for cell in row))
        self.print(table)

    def print(self, renderable: RenderableType) -> None:
        """Write something of rich to stdout."""
        self.out.print(renderable)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show the progress of long steps inside this block: bars on a terminal, lines with `-v`, else nothing."""
        is_disabled = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
        if self._err.isatty() and not is_disabled:
            with listening(_Bars(self.err)):
                yield
        elif self.is_verbose:
            with listening(_Lines(self.err)):
                yield
        else:
            yield


def cell_text(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def size_text(count: int) -> str:
    """A number of bytes, exact and in words: `3,608,576 bytes (3.4 MiB)`."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{count:,} bytes ({size:.1f} {unit})"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    class PipeAware(Console):
        """rich ends the program with code 1 when the reader of a pipe leaves; `main` decides that."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeAware(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _visible(text: str) -> str:
    """Text whose control characters cannot drive the terminal: a model may write an escape sequence."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class _Bars(Listener):
    """Draws a bar per step; they vanish when the step is over, so that only results stay on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[Callable[[float], None], TaskID] = {}

    def start(self, description: str, total: float) -> Callable[[float], None]:
        """See `Listener.start`."""
        if self._progress is None:
            self._progress = self._open()
            self._progress.start()
        progress = self._progress
        # A step of one unit cannot say how far it is.
        task = progress.add_task(description, total=total if total > 1 else None)

        def advance(amount: float) -> None:
            progress.advance(task, amount)

        self._tasks[advance] = task
        return advance

    def stop(self, advance: Callable[[float], None]) -> None:
        """See `Listener.stop`."""
        task = self._tasks.pop(advance)
        if self._progress is None:
            return
        self._progress.remove_task(task)
        if not self._tasks:
            # Nothing is drawn between steps: text that streams to the same terminal must stay whole.
            self._progress.stop()
            self._progress = None

    def _open(self) -> Progress:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self._console, transient=True, redirect_stdout=False)


class _Lines(Listener):
    """Says what took how long, one line per step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started: dict[Callable[[float], None], tuple[str, float]] = {}

    def start(self, description: str, total: float) -> Callable[[float], None]:
        """See `Listener.start`."""

        def advance(amount: float) -> None:
            pass

        self._started[advance] = description, time.perf_counter()
        return advance

    def stop(self, advance: Callable[[float], None]) -> None:
        """See `Listener.stop`."""
        description, started = self._started.pop(advance)
        seconds = time.perf_counter() - started
        self._console.print(f"{description}: {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)

"""The command line: one module per subcommand, and one place that turns errors into messages and exit codes.

Exit codes: 0 success, 1 failure, 2 usage error, 3 finished but a budget was missed, 130 interrupted by Ctrl-C, 128 + n
ended by signal n (141: the reader of a pipe left).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from jettison.cli.console import Terminal
from jettison.cli.parser import build_parser
from jettison.cli.signals import Signals
from jettison.ir.errors import BugError, JettisonError, OptionError

SUCCESS, FAILURE, USAGE_ERROR, BUDGET_MISSED = range(4)
INTERRUPTED = 130
# Conditions of the machine, not of the program; everything else that the system refuses is our bug.
_MACHINE_ERRORS = {
    errno.ENOSPC: "Free some space, or point TMPDIR and the output at another disk.",
    errno.EDQUOT: "Free some space, or point TMPDIR and the output at another disk.",
    errno.EFBIG: "Raise the limit on the size of a file (`ulimit -f unlimited`).",
    errno.EACCES: "Check the permissions.",
    errno.EPERM: "Check the permissions.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EIO: "Check the disk.",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`).",
    errno.ENOMEM: "Free memory, or use a larger machine.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Arguments without the program's name; default those of the process.

    Returns:
        The exit code.
    """
    arguments = [str(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    signals = Signals()
    try:
        with signals.raising():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        _discard(sys.stdout)
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else FAILURE
    except KeyboardInterrupt:
        _write_error("interrupted")
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else FAILURE
    except Exception as error:  # the last resort of a program: whatever it is, the user gets a line and an exit code
        if signals.is_interrupted:
            # Ctrl-C in the middle of importing a library can leave as an ImportError of its next attempt.
            _write_error("interrupted")
            return INTERRUPTED
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exception(error)
        message, code = _explain(error, arguments)
        _write_error(message)
        return code


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    try:
        args = parser.parse_args(arguments)
    except SystemExit as error:  # --help and --version have written what they had to
        return error.code if isinstance(error.code, int) else FAILURE
    for stream in (sys.stdout, sys.stderr):
        _survive_encoding(stream)
    terminal = Terminal(sys.stdout, sys.stderr, is_json=args.json, is_verbose=args.verbose)
    # Libraries that print must not end up inside the result.
    with contextlib.redirect_stdout(sys.stderr), _logging(args.verbose), terminal.progress():
        code: int = args.run(args, terminal)
    return code


def _explain(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    command = f"To reproduce: {shlex.join(['jettison', *arguments])}"
    if isinstance(error, BugError):
        return f"{error}\n{command}", FAILURE
    if isinstance(error, JettisonError):
        # Whoever raised it has imported its module, which is too heavy to import for asking.
        drift = sys.modules.get("jettison.drift")
        if drift is not None and isinstance(error, drift.BudgetExceeded):
            return str(error), BUDGET_MISSED
        return str(error), USAGE_ERROR if isinstance(error, OptionError) else FAILURE
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        where = f"[{error.filename}] " if error.filename else ""
        return f"{where}{error.strerror}. {_MACHINE_ERRORS[error.errno]}", FAILURE
    if isinstance(error, MemoryError):
        return "out of memory. Free some, or use a larger machine.", FAILURE
    found = f"{type(error).__name__}: {error}"
    return f"{found}\nThis is a bug in jettison: please report it (`-v` adds a traceback). {command}", FAILURE


def _write_error(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()  # what was printed comes before why it ended
    with contextlib.suppress(OSError):
        Terminal(sys.stdout, sys.stderr).complain(message)


def _survive_encoding(stream: TextIO) -> None:
    """A character that the stream's encoding lacks is shown escaped; it must not end a program that took minutes."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding != "utf8" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Send what is left in the buffer nowhere; flushing it into a closed pipe at exit would complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def _logging(is_verbose: bool) -> Iterator[None]:
    """Logs and Python warnings on stderr with `-v`; without it, libraries keep theirs to themselves."""
    import logging

    with warnings.catch_warnings():
        if not is_verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")
        root = logging.getLogger()
        level, disabled = root.level, logging.root.manager.disable
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        if is_verbose:
            root.addHandler(handler)
            root.setLevel(logging.INFO)
        else:
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            logging.disable(disabled)

"""The parser of the command line, and the kinds of values that several subcommands take."""

from __future__ import annotations

import argparse
import importlib
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from jettison.ir.errors import OptionError

# In the order of `--help`; each is the module of its name.
COMMANDS = ("demo", "optimize", "generate", "eval", "bench", "diff", "explain", "passes", "inspect", "verify", "plan",
            "place", "prepare")  # fmt: skip
_DESCRIPTION = "A pass compiler that fits language models into the memory you have."
_EPILOG = """\
exit codes: 0 success, 1 failure, 2 usage error, 3 finished but a budget was missed, 130 interrupted

example:
  jettison optimize path/to/model --passes 'quantize-weights{bits=4,group=32}' --target onnx --out small
  jettison generate small --prompt 'Once upon a time'
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take the way of all others: `error: ...` on stderr, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise OptionError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; `args.run(args, terminal)` carries one out.

    Importing the subcommands must stay cheap (no torch, no rich): `--help` imports them all.
    """
    parser = Parser(
        "jettison", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"jettison {_version()}")
    _add_common(parser, is_sub=False)
    commands = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"jettison.cli.{name}")
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=_sentence(summary), allow_abbrev=False)
        module.add_arguments(command)
        _add_common(command, is_sub=True)
        command.set_defaults(run=module.run)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, is_sub: bool) -> None:
    # SUPPRESS keeps the subparser's default from overwriting what stood before the subcommand.
    default = argparse.SUPPRESS if is_sub else False
    parser.add_argument(
        "--json", action="store_true", default=default, help="write one JSON document to stdout instead of tables"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=default, help="logs on stderr, and a traceback after an error"
    )


def _version() -> str:
    try:
        return version("jettison")
    except PackageNotFoundError:
        return "(not installed)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:19]) < 2**31:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, found {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2**63 - 1."""
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"needs a whole number from 0 to 2**63 - 1, found {text!r}")
    return int(text)


def divergence(text: str) -> float:
    """A KL divergence in nats per token, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number of nats per token, at least 0, found {text!r}")
    return value


def window_size(text: str) -> tuple[int, int]:
    """Windows of a text and tokens of each, such as 64x512."""
    windows, _, length = text.partition("x")
    try:
        return count(windows), count(length)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"needs windows and tokens of each, such as 64x512, found {text!r}") from error


def token_ids(text: str) -> list[int]:
    """Token ids separated by commas or blanks."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needs token ids such as 5,17,3, found {text!r}") from error


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """The positional argument of the subcommands that read one artifact."""
    parser.add_argument("artifact", metavar="DIR", type=Path, help="folder that `jettison optimize` wrote")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommands that run an artifact."""
    parser.add_argument(
        "--threads", type=count, metavar="N", help="threads within an operator (default: the runtime's own choice)"
    )
    parser.add_argument(
        "--trust-kernels", action="store_true",
        help="run the machine code in the artifact, which nothing checks, instead of compiling its kernels (triton)",
    )  # fmt: skip

r"""Pipeline text to frozen values and back: `quantize-weights{bits=4},cache-kv{policy=snapkv{budget=512}+kivi}`.

    pipeline = [pass {',' pass}]
    pass     = name ['{' option {',' option} '}']
    option   = name '=' value
    value    = number | size | 'true' | 'false' | 'none' | ratio | quoted
             | pass {'+' pass}
             | '{' range ':' value {',' range ':' value} '}'
    range    = integer ['-' integer]                    layers 0 to 3 are `0-3`, both ends included
    name     = letter or '_', then letters, digits, '_' and '-'; never true, false or none
    number   = 4, -1, 0.5, 1e-3 (integers fit 64 bits, floats are finite)
    size     = 512MiB, 1.5GiB, 2GB (a word here; an option that counts bytes converts it)
    ratio    = 2:4 (N:M sparsity; a word)
    quoted   = 'any text': \' is a quote, \\ is a backslash, any other backslash stands for itself, so that most
               regular expressions need no escape: 'layers\.\d+'. Regular expressions are always quoted.

White space between tokens is ignored; the canonical text has none. Empty text is a pipeline of no passes.
Columns count characters from 1 and take no part in equality; 0 means "not from text".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias, TypeVar

from jettison.ir.errors import OptionError

Item = TypeVar("Item")
Value: TypeAlias = "Scalar | Spec | tuple[Spec, ...] | RangeMap"
Kind: TypeAlias = Literal["int", "float", "bool", "none", "word", "quoted"]

BYTE_UNITS = {"B": 1} | {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
BYTE_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
RESERVED: dict[str, bool | None] = {"true": True, "false": False, "none": None}
# Deep enough for every real pipeline, shallow enough that hostile text cannot exhaust Python's stack.
MAX_DEPTH = 16
_SHOWN_COLUMNS = 100

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Takes all that could belong to one number, so that `4x` is one bad number rather than a number and a stray word.
_NUMBER_LIKE = re.compile(r"[-+]?\.?[0-9](?:[eE][-+]|[0-9A-Za-z_.:])*")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_INDEX = re.compile(r"[0-9]{1,18}")  # at most 18 digits fit 64 bits
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SIZE_OR_RATIO = re.compile(rf"[0-9]+(?:\.[0-9]+)?(?:{'|'.join(BYTE_UNITS)})|[0-9]+:[0-9]+")
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)

_NAME_FORM = "A pass is written name{key=value,key=value}, one without options just name."
_RANGE_FORM = "A mapping is written {0-1: value, 2: value}."
_VALUE_FORMS = "a number, true, false, none, a name, 'quoted text', name{key=value} or {0-1: value}"


def located_error(text: str, column: int, problem: str, remedy: str = "") -> OptionError:
    """Makes the error that points at one column of a pipeline.

    Args:
        text: the whole pipeline text; empty for a pipeline built in Python, which leaves text and caret out.
        column: 1-based column of the mistake; 0 for a value that is not from text, with the same effect.
        problem: what was found and what is needed.
        remedy: what to do, where the problem does not say it already.
    """
    if not column or not text:
        return OptionError(f"pipeline: {problem}\n{remedy}".rstrip())
    first = max(0, min(column - 1 - _SHOWN_COLUMNS // 2, len(text) - _SHOWN_COLUMNS))
    last = first + _SHOWN_COLUMNS
    # One printed cell per character keeps the caret in line whatever white space the text holds.
    shown = "".join(char if char.isprintable() else " " for char in text[first:last])
    left, right = "..." if first else "", "..." if last < len(text) else ""
    caret = " " * (len(left) + column - 1 - first) + "^"
    picture = f"    {left}{shown}{right}\n    {caret}"
    return OptionError(f"pipeline, column {column}: {problem}\n{picture}\n{remedy}".rstrip())


@contextmanager
def located(text: str, column: int) -> Iterator[None]:
    """Points an OptionError raised inside at one column of a pipeline; see `located_error`."""
    try:
        yield
    except OptionError as error:
        raise located_error(text, column, str(error)) from error


def shorten(text: str, limit: int = 60) -> str:
    """Cuts quoted input to a length that keeps an error readable."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True)
class Scalar:
    """A number, truth value, none, word or quoted text; a string that is no plain word is quoted without asking.

    Raises:
        OptionError: a float that is not finite or an integer past 64 bits, neither of which has a text form.
    """

    value: int | float | bool | str | None
    quoted: bool = False
    column: int = field(default=0, compare=False)
    # Compared, because 1 == 1.0 == True in Python and they are three different texts.
    kind: Kind = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kind = _kind(self.value, self.quoted)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "quoted", kind == "quoted")


def _kind(value: int | float | bool | str | None, quoted: bool) -> Kind:
    if value is None:
        return "none"
    if isinstance(value, str):
        return "word" if not quoted and (_is_name(value) or _SIZE_OR_RATIO.fullmatch(value)) else "quoted"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float) and math.isfinite(value):
        return "float"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int"
    raise OptionError("a pipeline cannot hold a number that is not finite, or an integer past 64 bits.")


@dataclass(frozen=True)
class Option:
    """One `key=value`; a value that is a Spec without options is held as the word it prints as."""

    key: str
    value: Value
    column: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        _check_name(self.key)
        object.__setattr__(self, "value", _simplest(self.value))


@dataclass(frozen=True)
class Spec:
    """A pass or policy by name, with its options in the order given; raises OptionError on an impossible name."""

    name: str
    options: tuple[Option, ...] = ()
    column: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class Range:
    """Indices first to last, both included (`3`, `0-3`); raises OptionError when empty or below 0."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise OptionError(f"range {self.first}-{self.last}: the smaller index goes first, and none is below 0.")

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class RangeEntry:
    """One `range: value` of a RangeMap."""

    range: Range
    value: Value
    column: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _simplest(self.value))


@dataclass(frozen=True)
class RangeMap:
    """Values by range of indices, `{0-1: full, 2: snapkv{budget=64}}`: at least one entry, no two overlapping."""

    entries: tuple[RangeEntry, ...]
    column: int = field(default=0, compare=False)


def first_overlap(ranges: Sequence[Range]) -> tuple[Range, Range] | None:
    """Returns two ranges of a list that share an index, in list order, or None."""
    # Among disjoint ranges sorted by start only neighbours can touch, which keeps long lists linear.
    order = sorted(range(len(ranges)), key=lambda index: ranges[index].first)
    for left, right in pairwise(order):
        if ranges[left].last >= ranges[right].first:
            return ranges[min(left, right)], ranges[max(left, right)]
    return None


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in RESERVED


def _check_name(name: str) -> None:
    if not _is_name(name):
        raise OptionError(f"{shorten(repr(name))} is not a name: use letters, digits, '_' and '-', a letter first.")


def _simplest(value: Value) -> Value:
    # Two trees with one text would break parse(format(x)) == x.
    only = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return Scalar(only.name, column=only.column) if isinstance(only, Spec) and not only.options else only


def format_pipeline(specs: Iterable[Spec]) -> str:
    """Prints the canonical text: no white space, options in the order the specs hold them."""
    return ",".join(_format_spec(spec) for spec in specs)


def format_value(value: Value) -> str:
    """Prints one option value in canonical text."""
    if isinstance(value, Spec):
        return _format_spec(value)
    if isinstance(value, tuple):
        return "+".join(_format_spec(spec) for spec in value)
    if isinstance(value, RangeMap):
        return "{" + ",".join(f"{entry.range}:{format_value(entry.value)}" for entry in value.entries) + "}"
    if value.kind == "quoted":
        # A backslash is doubled only where the parser would read it as an escape, so regular expressions stay legible.
        return "'" + re.sub(r"'|\\(?=['\\]|\Z)", r"\\\g<0>", str(value.value)) + "'"
    return str(value.value).lower() if value.kind in ("bool", "none") else str(value.value)


def _format_spec(spec: Spec) -> str:
    options = ",".join(f"{option.key}={format_value(option.value)}" for option in spec.options)
    return f"{spec.name}{{{options}}}" if options else spec.name


def parse_pipeline(text: str) -> tuple[Spec, ...]:
    """Parses pipeline text; white space alone is the empty pipeline.

    Raises:
        OptionError: the text does not follow the grammar; the message shows it with a caret under the column.
    """
    return _Parser(text).pipeline()


class _Parser:
    """Recursive descent over one text; `position` is always at the start of a token."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.move_to(0)

    @property
    def column(self) -> int:
        return self.position + 1

    def move_to(self, position: int) -> None:
        while self.text[position : position + 1].isspace():
            position += 1
        self.position = position

    def take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.move_to(match.end())
        return match.group()

    def accept(self, char: str) -> bool:
        if not self.text.startswith(char, self.position):
            return False
        self.move_to(self.position + 1)
        return True

    def error(self, problem: str, remedy: str, column: int | None = None) -> OptionError:
        return located_error(self.text, column or self.column, problem, remedy)

    def expected(self, what: str, remedy: str) -> OptionError:
        match = _NAME.match(self.text, self.position)
        found = match.group() if match else self.text[self.position : self.position + 1]
        shown = shorten(repr(found)) if found else "the end of the text"
        return self.error(f"expected {what}, found {shown}.", remedy)

    def pipeline(self) -> tuple[Spec, ...]:
        if self.position == len(self.text):
            return ()
        specs = [self.spec("a pass name")]
        while self.position < len(self.text):
            if not self.accept(","):
                raise self.expected("',' or the end of the text", "Separate passes with ','; options stand in {...}.")
            specs.append(self.spec("a pass name"))
        return tuple(specs)

    def spec(self, what: str) -> Spec:
        column = self.column
        name = self.name(what)
        opened = self.column
        return Spec(name, self.options(opened) if self.accept("{") else (), column)

    def name(self, what: str) -> str:
        name = _NAME.match(self.text, self.position)
        if name is None or name.group() in RESERVED:
            raise self.expected(what, _NAME_FORM)
        self.move_to(name.end())
        return name.group()

    def braced(self, item: Callable[[], Item], opened: int) -> list[Item]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"options nest deeper than {MAX_DEPTH} levels.", "Flatten the pipeline.", opened)
        items = [item()]
        while self.accept(","):
            items.append(item())
        if not self.accept("}"):
            what = f"',' or the '}}' that closes column {opened}"
            raise self.expected(what, "Separate items with ','; text that is not a plain word stands in single quotes.")
        self.depth -= 1
        return items

    def options(self, opened: int) -> tuple[Option, ...]:
        options = self.braced(self.option, opened)
        seen: dict[str, int] = {}
        for option in options:
            first = seen.setdefault(option.key, option.column)
            if first != option.column:
                problem = f"option {shorten(option.key)!r} is given twice, first at column {first}."
                raise self.error(problem, "Keep one of them.", option.column)
        return tuple(options)

    def option(self) -> Option:
        column = self.column
        key = self.name("an option name")
        if not self.accept("="):
            raise self.expected("'='", f"Options are written key=value: {shorten(key)}=VALUE.")
        return Option(key, self.value(), column)

    def value(self) -> Value:
        column = self.column
        if self.accept("{"):
            return self.ranges(column)
        quoted = self.take(_QUOTED)
        if quoted is not None:
            return Scalar(re.sub(r"\\(['\\])", r"\1", quoted[1:-1]), quoted=True, column=column)
        if self.accept("'"):
            problem = "the quoted text that starts here never ends."
            raise self.error(problem, r"End it with '; inside, a quote is \'.", column)
        number = self.take(_NUMBER_LIKE)
        if number is not None:
            return self.number(number, column)
        name = _NAME.match(self.text, self.position)
        if name is None:
            raise self.expected("a value", f"Write {_VALUE_FORMS}.")
        if name.group() in RESERVED:
            self.move_to(name.end())
            return Scalar(RESERVED[name.group()], column=column)
        parts = [self.spec("a name")]
        while self.accept("+"):
            parts.append(self.spec("a name after '+'"))
        return tuple(parts)

    def number(self, text: str, column: int) -> Scalar:
        if _SIZE_OR_RATIO.fullmatch(text):
            return Scalar(text, column=column)
        if not _FLOAT.fullmatch(text):
            forms = f"a number such as 4, 0.5 or 1e-3, a size in {', '.join(BYTE_UNITS)}"
            raise self.error(f"{shorten(text)!r} is not a number.", f"Write {forms}, or quote the text.", column)
        with located(self.text, column):
            if not _INTEGER.fullmatch(text):
                return Scalar(float(text), column=column)
            # Python refuses to convert thousands of digits; anything past 40 counts as out of range.
            return Scalar(int(text) if len(text) <= 40 else 2**63, column=column)

    def ranges(self, opened: int) -> RangeMap:
        entries = self.braced(self.entry, opened)
        clash = first_overlap([entry.range for entry in entries])
        if clash:
            column = next(entry.column for entry in reversed(entries) if entry.range is clash[1])
            raise self.error(f"range {clash[1]} overlaps {clash[0]}.", "Give every index one value.", column)
        return RangeMap(tuple(entries), opened)

    def entry(self) -> RangeEntry:
        column = self.column
        first = self.index()
        last = self.index() if self.accept("-") else first
        with located(self.text, column):
            index_range = Range(first, last)
        if not self.accept(":"):
            raise self.expected("':'", _RANGE_FORM)
        return RangeEntry(index_range, self.value(), column)

    def index(self) -> int:
        digits = self.take(_INDEX)
        if digits is None:
            raise self.expected("an index or a range such as 0-3", _RANGE_FORM)
        return int(digits)

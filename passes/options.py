"""Frozen option dataclasses to and from the specs of a pipeline.

A pass or policy is configured by the fields of a frozen dataclass; `option()` adds what the command line shows. The
annotation of a field decides what its text may be:

    bool, int, float, str, None      true, 4, 0.5 (or 1), 'text' (or a word), none
    int with unit="bytes"            512MiB or a plain count
    Literal["kl", 4]                 one of the listed values, words bare
    Policy                           snapkv{budget=512}: a dataclass registered under the base class Policy
    tuple[Policy, ...]               snapkv+kivi{bits=4}; none is the empty tuple
    ByRange[X]                       {0-1: x, 2: y}; none is the empty mapping
    X | Y                            whichever fits

`build` and `to_spec` are inverses up to spelling: text -> build -> to_spec -> text is canonical, and a fixed point.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias, TypeVar

from jettison.ir.errors import OptionError, PassError
from jettison.passes.grammar import (
    BYTE_UNITS,
    RESERVED,
    Option,
    Range,
    RangeEntry,
    RangeMap,
    Scalar,
    Spec,
    Value,
    first_overlap,
    format_value,
    located,
    located_error,
    shorten,
)

T = TypeVar("T")
V = TypeVar("V")
Registries: TypeAlias = Mapping[type, Mapping[str, type]]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")
_SCALAR_TYPES = (types.NoneType, bool, int, float, str)
# Order in which the arms of a union are tried: 4 is an int before it is a float, a listed word is no free text.
_ARM_ORDER = (types.NoneType, Literal, bool, int, float)


def option(
    default: Any = MISSING,
    *,
    doc: str,
    range: str | None = None,
    unit: Literal["bytes"] | None = None,
    flat: bool = False,
) -> Any:
    """Declares one option of a pass or policy; returns a dataclass field.

    Args:
        default: an immutable value; without one the option is required.
        doc: one line for `jettison passes`.
        range: legal values in words ("2, 3, 4 or 8"), shown beside the type; `__post_init__` enforces them.
        unit: "bytes" lets the text be a size such as 512MiB.
        flat: options of the policy this field names may be given beside it instead of inside its braces.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "range": range, "unit": unit, "flat": flat})


class ByRange(Mapping[Range, V]):
    """Immutable, hashable values by range of indices, in rising order: `ByRange({0: Full(), (1, 3): Window(64)})`.

    Raises:
        OptionError: a key is no index or (first, last) pair, or two ranges overlap.
    """

    def __init__(self, values: Mapping[Any, V] | None = None) -> None:
        entries = [(_as_range(key), value) for key, value in (values or {}).items()]
        clash = first_overlap([key for key, _ in entries])
        if clash:
            raise OptionError(f"range {clash[1]} overlaps {clash[0]}. Give every index one value.")
        self._values = dict(sorted(entries, key=lambda entry: entry[0].first))

    def at(self, index: int) -> V | None:
        """Returns the value whose range holds an index, None where no range does."""
        return next((value for key, value in self._values.items() if key.first <= index <= key.last), None)

    def __getitem__(self, key: Range) -> V:
        return self._values[key]

    def __iter__(self) -> Iterator[Range]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"ByRange({{{', '.join(f'({key.first}, {key.last}): {value!r}' for key, value in self.items())}}})"


def _as_range(key: Any) -> Range:
    if isinstance(key, Range):
        return key
    pair = key if isinstance(key, tuple) else (key, key)
    if len(pair) != 2 or not all(isinstance(index, int) for index in pair):
        raise OptionError(f"{shorten(repr(key))} is no range. Write an index or a (first, last) pair.")
    return Range(*pair)


def parse_bytes(text: str) -> int:
    """Converts a size to bytes: `2GiB` to 2147483648, `1024` to 1024.

    Raises:
        OptionError: the text is no size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[2] or "B") not in BYTE_UNITS:
        units = ", ".join(BYTE_UNITS)
        raise OptionError(f"{shorten(text)!r} is not a size. Write a number followed by one of {units}.")
    count = Fraction(match[1]) * BYTE_UNITS[match[2] or "B"]
    if count.denominator != 1:
        raise OptionError(f"{shorten(text)!r} is not a whole number of bytes. Use a smaller unit.")
    return int(count)


def lookup(name: str, registry: Mapping[str, T], kind: str, where: str, column: int = 0) -> T:
    """Finds a pass or policy by name.

    Args:
        name: as written.
        registry: what there is, by name.
        kind: "pass" or "policy", for the message.
        where: the pipeline text the name stands in, empty if there is none.
        column: 1-based column of the name in that text, 0 if there is none.

    Raises:
        OptionError: unknown name; lists close matches and all names.
    """
    if name in registry:
        return registry[name]
    names = sorted(registry)
    remedy = f"{_did_you_mean(name, names)}Known: {', '.join(names) or 'none'}."
    raise located_error(where, column, f"unknown {kind} {shorten(name)!r}.", remedy)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    # Class names and Python spelling (QuantizeWeights, quantize_weights) are the likeliest slips.
    by_form = {_plain(candidate): candidate for candidate in names}
    close = difflib.get_close_matches(_plain(name), by_form, n=3)
    return f"Did you mean {' or '.join(by_form[form] for form in close)}? " if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


@dataclass(frozen=True)
class OptionRow:
    """One line of `jettison passes`: the option's name, its type and range, its default in text, what it does."""

    option: str
    type: str
    default: str
    doc: str


def describe(cls: type) -> list[OptionRow]:
    """Lists the options of a pass or policy in field order; the default of a required one reads "required"."""
    rows = []
    for field in _option_fields(cls).values():
        default = "required" if field.default is MISSING else format_value(_express(field.default, field))
        rows.append(OptionRow(field.name, field.type_text, default, field.metadata.get("doc", "")))
    return rows


def build(cls: type[T], spec: Spec, *, where: str, registries: Registries) -> T:
    """Makes the option dataclass that a spec describes.

    Args:
        cls: a frozen dataclass.
        spec: parsed by `parse_pipeline`, or made by hand (columns 0).
        where: the text the spec was parsed from, so that errors can point into it; empty if there is none.
        registries: for every base class that may be an option's type, its subclasses by name.

    Raises:
        OptionError: unknown, missing or doubled option, value of the wrong type, or the class itself refuses it.
        PassError: an annotation of the class has no text form.
    """
    return _Builder(where, registries).build(cls, spec)


def to_spec(instance: Any, name: str | None = None) -> Spec:
    """Makes the canonical spec of an option dataclass: fields that differ from their defaults, in field order.

    Args:
        instance: a frozen dataclass; nested ones are named by their class attribute `name`.
        name: name of the spec; the class attribute `name` if left out.

    Raises:
        OptionError: a field holds a value of the wrong type.
        PassError: a class has no name.
    """
    cls = type(instance)
    name = name or getattr(cls, "name", None)
    if not isinstance(name, str):
        raise PassError(f"{cls.__name__} has no class attribute `name`, so a pipeline cannot print it.")
    options = []
    for field in _option_fields(cls).values():
        value = _express(getattr(instance, field.name), field)
        # Compared as text trees, where 1, 1.0 and true differ.
        if field.default is MISSING or value != _express(field.default, field):
            options.append(Option(field.name, value))
    return Spec(name, tuple(options))


@dataclass(frozen=True)
class _OptionField:
    """One dataclass field with its annotation resolved; `default` is MISSING for a required option."""

    owner: str
    name: str
    hint: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def unit(self) -> str | None:
        return self.metadata.get("unit")

    @property
    def type_text(self) -> str:
        limits = self.metadata.get("range")
        return _type_text(self.hint, self.unit) + (f" ({limits})" if limits else "")

    @property
    def usage(self) -> str:
        """The option as the list of legal options shows it."""
        if self.default is MISSING:
            return f"{self.name} (required)"
        return f"{self.name}={format_value(_express(self.default, self))}"


def _option_fields(cls: type) -> dict[str, _OptionField]:
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init:
            fields[field.name] = _OptionField(cls.__name__, field.name, hints[field.name], default, field.metadata)
    return fields


def _arms(hint: Any) -> list[Any]:
    """The alternatives of a union, in the order they are tried; any other annotation is its own only arm."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    last = len(_ARM_ORDER)
    order = {arm: index for index, arm in enumerate(_ARM_ORDER)} | {str: last + 1}
    return sorted(typing.get_args(hint), key=lambda arm: order.get(typing.get_origin(arm) or arm, last))


def _choices(hint: Any) -> list[Any]:
    return [choice for arm in _arms(hint) if typing.get_origin(arm) is Literal for choice in typing.get_args(arm)]


def _type_text(hint: Any, unit: str | None) -> str:
    texts = []
    for arm in typing.get_args(hint) if len(_arms(hint)) > 1 else [hint]:
        origin, arguments = typing.get_origin(arm), typing.get_args(arm)
        if origin is Literal:
            texts += [format_value(_express_choice(choice, arguments, [])) for choice in arguments]
        elif origin is tuple:
            texts.append(f"{_type_text(arguments[0], unit)}+...")
        elif origin is ByRange:
            texts.append(f"{{range: {_type_text(arguments[0], unit)}}}")
        elif arm is int and unit == "bytes":
            texts.append("bytes")
        else:
            texts.append({bool: "true|false", types.NoneType: "none"}.get(arm) or arm.__name__)
    return "|".join(texts)


# --- from text ---------------------------------------------------------------------------------------------------

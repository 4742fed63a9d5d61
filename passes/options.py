"""Frozen option dataclasses to and from the specs of a pipeline.

A pass or policy is configured by the fields of a frozen dataclass; the annotation of a field says what its text may be:

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
from dataclasses import MISSING, dataclass, replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias, TypeVar

from jettison.ir.errors import OptionError, PassError
from jettison.passes import grammar
from jettison.passes.grammar import Option, Range, RangeEntry, RangeMap, Scalar, Spec, Value, format_value, shorten

T = TypeVar("T")
V = TypeVar("V")
Registries: TypeAlias = Mapping[type, Mapping[str, type]]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")
_KINDS = {types.NoneType: "none", bool: "bool", int: "int", float: "int float", str: "word quoted"}
# The arms of a union are tried in this order: 4 is an int before it is a float, a listed word is no free text.
_ARM_ORDER: dict[Any, int] = {types.NoneType: 0, Literal: 1, bool: 2, int: 3, float: 4, str: 9}


def option(
    default: Any = MISSING, *, doc: str, range: str | None = None, unit: str | None = None, flat: bool = False
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
        OptionError: a range is empty, or two overlap.
    """

    def __init__(self, values: Mapping[Any, V] = types.MappingProxyType({})) -> None:
        spans = [key if isinstance(key, (Range, tuple)) else (key, key) for key in values]
        ranges = [span if isinstance(span, Range) else Range(*span) for span in spans]
        clash = grammar.first_overlap(ranges)
        if clash:
            raise OptionError(f"range {clash[1]} overlaps {clash[0]}. Give every index one value.")
        self._values = dict(sorted(zip(ranges, values.values(), strict=True), key=lambda entry: entry[0].first))

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


def parse_bytes(text: str) -> int:
    """Converts a size to bytes: `2GiB` to 2147483648, `1024` to 1024.

    Raises:
        OptionError: the text is no size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[2] or "B") not in grammar.BYTE_UNITS:
        raise OptionError(f"{shorten(text)!r} is no size. Write a number and one of {', '.join(grammar.BYTE_UNITS)}.")
    count = Fraction(match[1]) * grammar.BYTE_UNITS[match[2] or "B"]
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
        column: 1-based column of the name in it.

    Raises:
        OptionError: unknown name; lists close matches and all names.
    """
    if name in registry:
        return registry[name]
    names = sorted(registry)
    remedy = f"{_did_you_mean(name, names)}Known: {', '.join(names) or 'none'}."
    raise grammar.located_error(where, column, f"unknown {kind} {shorten(name)!r}.", remedy)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    # Class names and Python spelling (QuantizeWeights, quantize_weights) are the likeliest slips.
    plain = {candidate.lower().replace("_", "-"): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), plain, n=3)
    return f"Did you mean {' or '.join(plain[form] for form in close)}? " if close else ""


def describe(cls: type) -> list[tuple[str, str, str, str]]:
    """Lists the options in field order: rows of name, type and range, default in text (or "required"), doc."""
    fields = _option_fields(cls).values()
    return [(field.name, field.type_text, field.default_text, field.metadata.get("doc", "")) for field in fields]


def build(cls: type[T], spec: Spec, *, where: str, registries: Registries) -> T:
    """Makes the option dataclass that a spec describes.

    Args:
        cls: a frozen dataclass.
        spec: parsed by `parse_pipeline`, or made by hand (columns 0).
        where: the text the spec was parsed from, so that errors can point into it; empty if there is none.
        registries: for every base class that may be an option's type, its subclasses by name.

    Raises:
        OptionError: unknown or missing option, value of the wrong type, or the class itself refuses it.
        PassError: an annotation of the class has no text form.
    """
    return _Builder(where, registries).build(cls, spec)


def to_spec(instance: Any, name: str | None = None) -> Spec:
    """Makes the canonical spec of an option dataclass: all that is set, for a later version may have other defaults.

    Args:
        instance: a frozen dataclass; nested ones are named by their class attribute `id` or `name`.
        name: name of the spec; that class attribute if left out.

    Raises:
        OptionError: a field holds a value of the wrong type.
        PassError: a class has no name, or a default of the wrong type.
    """
    name = name or getattr(type(instance), "id", getattr(type(instance), "name", None))
    if not isinstance(name, str):
        raise PassError(f"{type(instance).__name__} has no class attribute `name`, so a pipeline cannot print it.")
    options = []
    for field in _option_fields(type(instance)).values():
        value = field.express(getattr(instance, field.name))
        if value != Scalar(None) or field.default is MISSING or value != field.express(field.default):
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
        return f"{_type_text(self.hint, self.unit)} ({limits})" if limits else _type_text(self.hint, self.unit)

    @property
    def default_text(self) -> str:
        return "required" if self.default is MISSING else format_value(self.express(self.default))

    def express(self, value: Any) -> Value:
        text = _express(value, self.hint, self.unit)
        if text is None:
            family = PassError if value is self.default else OptionError
            raise family(f"{self.owner}.{self.name} needs {self.type_text}, found {shorten(repr(value))}.")
        return text


def _option_fields(cls: type) -> dict[str, _OptionField]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: _OptionField(cls.__name__, field.name, hints[field.name], field.default, field.metadata)
        for field in dataclasses.fields(cls)
        if field.init
    }


def _arms(hint: Any) -> list[Any]:
    """The alternatives of a union in the order they are tried; any other annotation is its own only arm."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    return sorted(typing.get_args(hint), key=lambda arm: _ARM_ORDER.get(typing.get_origin(arm) or arm, 5))


def _type_text(hint: Any, unit: str | None) -> str:
    if len(_arms(hint)) > 1:
        return "|".join(_type_text(arm, unit) for arm in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (tuple, ByRange):
        inner = _type_text(arguments[0], unit)
        return f"{inner}+..." if origin is tuple else f"{{range: {inner}}}"
    names = {bool: "true|false", types.NoneType: "none", int: "bytes" if unit == "bytes" else "int"}
    return names.get(hint) or str(getattr(hint, "__name__", hint)).lower()


def _express(value: Any, hint: Any, unit: str | None) -> Value | None:
    """The text tree of a value under an annotation; None if it does not fit."""
    arms = _arms(hint)
    for arm in arms:
        origin, arguments = typing.get_origin(arm), typing.get_args(arm)
        if origin is Literal and any((type(value), value) == (type(choice), choice) for choice in arguments):
            # A listed word "none" prints bare unless None itself is legal too.
            meaning = grammar.RESERVED.get(value, value)
            return Scalar(value if type(meaning) in arms or meaning in arguments else meaning)
        if origin is tuple and isinstance(value, tuple):
            parts: tuple[Any, ...] = tuple(_express(part, arguments[0], unit) for part in value)
            return None if None in parts else parts or Scalar(None)
        if origin is ByRange and isinstance(value, Mapping):
            items: list[Any] = [(key, _express(item, arguments[0], unit)) for key, item in ByRange(value).items()]
            if all(item is not None for _, item in items):
                return RangeMap(tuple(RangeEntry(key, item) for key, item in items)) if items else Scalar(None)
        if origin is None and isinstance(value, (int, float) if arm is float else arm):
            if arm is int and unit == "bytes" and not isinstance(value, bool):
                return _size(int(value))
            if arm not in _KINDS:
                return to_spec(value)
            if arm not in (int, float) or not isinstance(value, bool):
                return Scalar(float(value) if arm is float else value, quoted=arm is str)
    return None


def _size(count: int) -> Scalar:
    """The shortest exact text of a number of bytes."""
    texts = [f"{count // size}{unit}" for unit, size in grammar.BYTE_UNITS.items() if count > 0 and count % size == 0]
    text = min([*texts, str(count)], key=len)
    return Scalar(count if text == str(count) else text)


class _MismatchError(Exception):
    """The value that is its argument does not fit its annotation; the innermost one where they nest."""


@dataclass(frozen=True)
class _Builder:
    text: str
    registries: Registries

    def error(self, column: int, problem: str, remedy: str) -> OptionError:
        return grammar.located_error(self.text, column, problem, remedy)

    def build(self, cls: type[T], spec: Spec) -> T:
        fields = _option_fields(cls)
        given = {option.key: option.value for option in self.nest_flat(fields, spec).options}
        arguments = {key: self.convert(fields[key], value) for key, value in given.items()}
        for field in fields.values():
            if field.default is MISSING and field.name not in arguments:
                remedy = f"Write {spec.name}{{{field.name}=...}} with {field.type_text}."
                raise self.error(spec.column, f"{spec.name} needs the option {field.name!r}.", remedy)
        with grammar.located(self.text, spec.column):
            return cls(**arguments)

    def convert(self, field: _OptionField, value: Value) -> Any:
        try:
            return self.coerce(value, field.hint, field.unit)
        except _MismatchError as error:
            found = error.args[0]
            column = found[0].column if isinstance(found, tuple) else found.column
            problem = f"option {field.name!r} needs {field.type_text}, found {shorten(format_value(found))}."
            word = str(found.value) if isinstance(found, Scalar) else ""
            remedy = _did_you_mean(word, re.findall(r"[\w:-]+", field.type_text))
            if field.default is not MISSING and field.default is not None:
                remedy += f"For example {field.name}={field.default_text}."
            raise self.error(column, problem, remedy or "`jettison passes` lists the options.") from error

    def coerce(self, value: Value, hint: Any, unit: str | None) -> Any:
        arms = _arms(hint)
        for arm in arms if len(arms) > 1 else ():
            try:
                return self.coerce(value, arm, unit)
            except _MismatchError as error:
                if error.args[0] is not value:
                    raise
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        is_none = isinstance(value, Scalar) and value.kind == "none"
        if origin is tuple:
            parts = value if isinstance(value, tuple) else () if is_none else (value,)
            return tuple(self.coerce(part, arguments[0], unit) for part in parts)
        if origin is ByRange and (is_none or isinstance(value, RangeMap)):
            entries = value.entries if isinstance(value, RangeMap) else ()
            return ByRange({entry.range: self.coerce(entry.value, arguments[0], unit) for entry in entries})
        if hint in self.registries:
            spec = _as_spec(value)
            if spec:
                return self.build(self.lookup(spec, hint), spec)
        elif origin is Literal or hint in _KINDS:
            if isinstance(value, Scalar):
                with grammar.located(self.text, value.column):
                    return _coerce_scalar(value, hint, unit)
        elif len(arms) == 1 and origin is not ByRange:
            raise PassError(f"pipeline text cannot express an option of type {hint!r}; see passes/options.py.")
        raise _MismatchError(value)

    def lookup(self, spec: Spec, base: type) -> type:
        kind = re.sub(r"\B([A-Z])", r" \1", base.__name__).lower()
        return lookup(spec.name, self.registries[base], kind, self.text, spec.column)

    def nest_flat(self, fields: dict[str, _OptionField], spec: Spec) -> Spec:
        """Moves options of a policy that stand beside it into its braces; refuses what belongs nowhere."""
        options = {option.key: option for option in spec.options}
        for stray in spec.options:
            if stray.key in fields:
                continue
            named = [(key, *pair) for key in options if key in fields for pair in self.named(fields[key], options[key])]
            takers = [(key, part) for key, part, cls in named if stray.key in _option_fields(cls)]
            if not takers:
                legal = {spec.name: fields} | {part.name: _option_fields(cls) for _, part, cls in named}
                raise self.error(
                    stray.column, f"{spec.name} has no option {shorten(stray.key)!r}.", _legal(stray, legal)
                )
            key, part = takers[0]
            nested = f"{part.name}{{{stray.key}={format_value(stray.value)}}}"
            if len(takers) > 1 or isinstance(options[key].value, tuple):
                problem = f"option {stray.key!r} stands beside several policies."
                raise self.error(stray.column, problem, f"Write it inside the braces of its own: {shorten(nested)}.")
            if any(option.key == stray.key for option in part.options):
                problem = f"option {stray.key!r} is given twice, beside {part.name} and inside its braces."
                raise self.error(stray.column, problem, "Keep one of them.")
            options[key] = replace(options[key], value=replace(part, options=(*part.options, stray)))
            del options[stray.key]
        return replace(spec, options=tuple(options.values()))

    def named(self, field: _OptionField, given: Option) -> list[tuple[Spec, type]]:
        """The policies an option names, with their classes, if their options may stand beside it."""
        arms = [base for arm in _arms(field.hint) for base in (arm, *typing.get_args(arm))]
        base = next((base for base in arms if base in self.registries), None)
        parts = given.value if isinstance(given.value, tuple) else (_as_spec(given.value),)
        if base is None or not field.metadata.get("flat"):
            return []
        return [(part, self.lookup(part, base)) for part in parts if part]


def _legal(stray: Option, legal: Mapping[str, Mapping[str, _OptionField]]) -> str:
    text = _did_you_mean(stray.key, [name for options in legal.values() for name in options])
    for owner, options in legal.items():
        listed = ", ".join(f"{field.name} ({field.default_text})" for field in options.values())
        text += f"Options of {owner}: {listed or 'none'}. "
        if len(legal) == 1 and any(field.metadata.get("flat") for field in options.values()):
            text += "Name the policy whose option it is. "
    return text.rstrip()


def _coerce_scalar(value: Scalar, hint: Any, unit: str | None) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        exact = [choice for choice in choices if (type(choice), choice) == (type(value.value), value.value)]
        for choice in exact or [choice for choice in choices if choice == format_value(value)]:
            return choice
    elif hint is int and unit == "bytes" and value.kind == "word" and str(value.value)[0].isdigit():
        return parse_bytes(str(value.value))
    elif value.kind in _KINDS[hint].split():
        return None if value.value is None else hint(value.value)
    raise _MismatchError(value)


def _as_spec(value: Value) -> Spec | None:
    if isinstance(value, Scalar) and value.kind == "word" and not str(value.value)[0].isdigit():
        return Spec(str(value.value), column=value.column)
    return value if isinstance(value, Spec) else None

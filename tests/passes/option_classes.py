"""Passes and policies with options of every type, for tests of what reads and prints them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jettison.ir.errors import OptionError
from jettison.passes.grammar import format_pipeline, parse_pipeline
from jettison.passes.options import ByRange, build, lookup, option, to_spec


@dataclass(frozen=True)
class Policy:
    name: ClassVar[str]


@dataclass(frozen=True)
class Full(Policy):
    name = "full"


@dataclass(frozen=True)
class SnapKV(Policy):
    name = "snapkv"
    budget: int = option(doc="tokens kept", range="at least 1")
    window: int = option(32, doc="newest tokens always kept")

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise OptionError(f"[snapkv] budget is {self.budget}, needs at least 1. Write budget=1 or more.")


@dataclass(frozen=True)
class Kivi(Policy):
    name = "kivi"
    bits: Literal[2, 4] = option(4, doc="bits per element")


@dataclass(frozen=True)
class CacheKV:
    name = "cache-kv"
    policy: Policy | tuple[Policy, ...] = option(Full(), doc="what the cache keeps", flat=True)
    layers: ByRange[Policy] = option(ByRange(), doc="policies of single layers")
    chunk: int = option(512, doc="tokens attended at a time")


@dataclass(frozen=True)
class QuantizeWeights:
    name = "quantize-weights"
    bits: Literal[8, 4] = option(4, doc="bits per weight")
    symmetric: bool = option(False, doc="no zero points")
    skip: str | None = option(None, doc="layers left alone", range="regular expression")


@dataclass(frozen=True)
class EveryType:
    name = "every-type"
    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    keep: float | Literal["auto"] = option("auto", doc="fraction kept")
    rank: int | Literal["auto"] | None = option(None, doc="rank")
    number: float | int = 0
    text: str = "x"
    label: str | None = None
    residual: Literal["none", "int4", "true"] = "none"
    optional: Literal["none", "int4"] | None = None
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    memory: int | None = option(None, doc="memory", unit="bytes")
    stages: tuple[Policy, ...] = ()
    layers: ByRange[Policy | int] = option(ByRange(), doc="by layer")


@dataclass(frozen=True)
class TwoPolicies:
    name = "two-policies"
    first: Policy = option(Full(), doc="one", flat=True)
    second: Policy | None = option(None, doc="another", flat=True)
    nested: Policy | None = option(None, doc="not flat")


@dataclass(frozen=True)
class Unprintable:
    name = "unprintable"
    values: list[int] = field(default=(), metadata={"doc": "no text form"})  # type: ignore[assignment]


PASSES = {cls.name: cls for cls in (CacheKV, QuantizeWeights, EveryType, TwoPolicies, Unprintable)}
REGISTRIES = {Policy: {cls.name: cls for cls in (Full, SnapKV, Kivi)}}


def build_all(text: str) -> list:
    return [
        build(lookup(spec.name, PASSES, "pass", text, spec.column), spec, where=text, registries=REGISTRIES)
        for spec in parse_pipeline(text)
    ]


def build_one(text: str):
    (instance,) = build_all(text)
    return instance


def canonical(text: str) -> str:
    return format_pipeline([to_spec(instance) for instance in build_all(text)])

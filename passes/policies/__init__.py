"""KV-cache policies, by text id."""

from jettison.passes.policies.base import Policy
from jettison.passes.policies.full import Full
from jettison.passes.policies.h2o import H2O
from jettison.passes.policies.int4 import Int4
from jettison.passes.policies.int8 import Int8
from jettison.passes.policies.kivi import Kivi
from jettison.passes.policies.mikv import MiKV
from jettison.passes.policies.sinks import Sinks
from jettison.passes.policies.snapkv import SnapKV
from jettison.passes.policies.window import Window
from jettison.passes.policies.xquant import XQuant

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Full, H2O, Int4, Int8, Kivi, MiKV, Sinks, SnapKV, Window, XQuant)
}

__all__ = ["H2O", "POLICIES", "Full", "Int4", "Int8", "Kivi", "MiKV", "Policy", "Sinks", "SnapKV", "Window", "XQuant"]

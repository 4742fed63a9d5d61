"""KV-cache policies, by text id."""

from jettison.passes.policies.base import Policy
from jettison.passes.policies.full import Full
from jettison.passes.policies.h2o import H2O
from jettison.passes.policies.sinks import Sinks
from jettison.passes.policies.snapkv import SnapKV
from jettison.passes.policies.window import Window

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Full, H2O, Sinks, SnapKV, Window)}

__all__ = ["H2O", "POLICIES", "Full", "Policy", "Sinks", "SnapKV", "Window"]

"""KV-cache policies, by text id."""

from jettison.passes.policies.base import Policy
from jettison.passes.policies.full import Full
from jettison.passes.policies.window import Window

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Full, Window)}

__all__ = ["POLICIES", "Full", "Policy", "Window"]

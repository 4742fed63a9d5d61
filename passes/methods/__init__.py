"""Methods that round weights to a format, by text id."""

from jettison.passes.methods.awq import AWQ
from jettison.passes.methods.base import InputStatistics, Method
from jettison.passes.methods.gptq import GPTQ
from jettison.passes.methods.hqq import HQQ
from jettison.passes.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {method.name: method for method in (AWQ, GPTQ, HQQ, RTN)}

__all__ = ["AWQ", "GPTQ", "HQQ", "METHODS", "RTN", "InputStatistics", "Method"]

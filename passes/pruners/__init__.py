"""Which weights of a linear become zero, by text id."""

from jettison.passes.pruners.base import Pattern, Pruner
from jettison.passes.pruners.magnitude import Magnitude
from jettison.passes.pruners.sparsegpt import SparseGPT
from jettison.passes.pruners.wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {pruner.name: pruner for pruner in (Magnitude, SparseGPT, Wanda)}

__all__ = ["PRUNERS", "Magnitude", "Pattern", "Pruner", "SparseGPT", "Wanda"]

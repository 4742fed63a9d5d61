"""By which error the factors of a weight are chosen, by text id."""

from jettison.passes.factorizers.asvd import ASVD
from jettison.passes.factorizers.base import Factorizer
from jettison.passes.factorizers.svd import SVD
from jettison.passes.factorizers.svd_llm import SVDLLM

FACTORIZERS: dict[str, type[Factorizer]] = {factorizer.name: factorizer for factorizer in (ASVD, SVD, SVDLLM)}

__all__ = ["ASVD", "FACTORIZERS", "SVD", "SVDLLM", "Factorizer"]

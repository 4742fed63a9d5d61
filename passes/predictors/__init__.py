"""How a token's groups of neurons are chosen, by text id."""

from jettison.passes.predictors.base import Predictor, Samples
from jettison.passes.predictors.dejavu import DejaVu
from jettison.passes.predictors.hire import HiRE

PREDICTORS: dict[str, type[Predictor]] = {predictor.name: predictor for predictor in (DejaVu, HiRE)}

__all__ = ["PREDICTORS", "DejaVu", "HiRE", "Predictor", "Samples"]

"""The order of passes, and the driver that runs a user's pipeline on a captured program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jettison.ir.errors import OptionError, PassError
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention
from jettison.ir.program import PassRecord, Program
from jettison.passes.base import Pass
from jettison.passes.canonicalize_linear import CanonicalizeLinear
from jettison.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from jettison.passes.eliminate_no_ops import EliminateNoOps
from jettison.passes.fold_constants import FoldConstants
from jettison.passes.place_weights import PlaceWeights
from jettison.passes.raise_attention import RaiseAttention
from jettison.passes.raise_gated_mlp import RaiseGatedMlp
from jettison.passes.raise_rms_norm import RaiseRmsNorm
from jettison.passes.raise_rotary_embedding import RaiseRotaryEmbedding
from jettison.passes.raise_written_attention import RaiseWrittenAttention
from jettison.passes.select_logits import SelectLogits
from jettison.passes.strip_export_asserts import StripExportAsserts

# 1. Bring every spelling to one: assertions first, since they keep dead values alive; linears before folding, which
#    would copy a small transposed weight.
CANONICALIZE: tuple[Pass, ...] = (
    StripExportAsserts(),
    EliminateNoOps(),
    CanonicalizeLinear(),
    FoldConstants(),
    EliminateCommonSubexpressions(),
)
# 2. Name what is recognised. Rotary before attention: a raised attention hides what feeds it. Logits last: the head
#    must be a linear by then.
RAISE: tuple[Pass, ...] = (
    RaiseRmsNorm(),
    RaiseRotaryEmbedding(),
    RaiseAttention(),
    RaiseWrittenAttention(),
    RaiseGatedMlp(),
    SelectLogits(),
)
_MOST_ROUNDS = 10


def canonicalize(program: Program) -> list[PassRecord]:
    """Run the canonical passes until none fires, in place.

    Raises:
        PassError: They never settle.
    """
    records: list[PassRecord] = []
    for _ in range(_MOST_ROUNDS):
        fired = [pass_.run(program) for pass_ in CANONICALIZE]
        records += [record for record in fired if record.rewrites]
        if not any(record.rewrites for record in fired):
            return records
    raise PassError(f"[canonicalize] passes still fire after {_MOST_ROUNDS} rounds: {records[-1].name}")


def prepare(program: Program) -> None:
    """Canonicalise and raise a captured program, in place; always runs and stays out of the pipeline text."""
    canonicalize(program)
    for pass_ in RAISE:
        if isinstance(pass_, SelectLogits):
            _settle_kind(program)
        pass_.run(program)
    canonicalize(program)


def _settle_kind(program: Program) -> None:
    """A model whose attention looks ahead is an encoder, whatever it was taken for."""
    for entry in program.entries.values():
        for node in entry.graph.nodes:
            if is_call(node, attention) and not arguments(node)["causal"]:
                program.info = dataclasses.replace(program.info, kind="encoder")
                return


def apply(
    program: Program,
    passes: Sequence[Pass],
    *,
    strict: bool = False,
    after_each: Callable[[Pass, PassRecord, Program], None] | None = None,
) -> list[PassRecord]:
    """Run passes in order, in place, canonicalising after each.

    Args:
        program: A prepared program.
        passes: What to run.
        strict: Whether a miss is an error.
        after_each: Called with each pass, its record and the program as it stands.

    Returns:
        One record per pass.

    Raises:
        OptionError: A pass stands behind `place-weights`.
    """
    records = []
    for pass_ in passes:
        if program.placement is not None and type(pass_) is not PlaceWeights:
            raise OptionError(
                f"[{pass_.name}] behind place-weights: it may replace weights that have their place already. Put "
                "place-weights last."
            )
        record = pass_.run(program, strict=strict)
        canonicalize(program)
        if after_each is not None:
            after_each(pass_, record, program)
        records.append(record)
    return records

"""What passes ask of a program and of their options before they begin."""

from __future__ import annotations

import re

from jettison.ir.errors import OptionError
from jettison.ir.program import MissRecord, Program
from jettison.passes.base import Pass

_TO_CALIBRATE = "to run the calibration text"


def require_forward(program: Program, told: str, why: str = _TO_CALIBRATE) -> None:
    """Refuse a program whose graph of whole sequences is gone.

    Args:
        program: Any.
        told: Id of the pass in brackets, and the option that needs it.
        why: What it is needed for.

    Raises:
        OptionError: It has a KV cache already.
    """
    if "forward" not in program.entries:
        raise OptionError(f"{told} behind cache-kv: needs the graph of whole sequences, {why}. Put cache-kv last.")


def require_text(program: Program, told: str, instead: str) -> None:
    """Refuse a program that cannot run calibration tokens.

    Args:
        program: Any.
        told: Id of the pass in brackets, and the option that needs it.
        instead: What needs no text.

    Raises:
        OptionError: It has a KV cache already, or came without text.
    """
    require_forward(program, told)
    if program.calibration is None:
        raise OptionError(
            f"{told}: needs text to calibrate on, and {program.info.name} came without. Give a text file "
            f"(calibration=, --calibration), or use {instead}, which needs none."
        )


def require_decoder_text(program: Program, told: str, why: str, instead: str) -> None:
    """Refuse a program that is no decoder with calibration tokens.

    Args:
        program: Any.
        told: Id of the pass in brackets.
        why: What they are needed for.
        instead: What to do where there are none.

    Raises:
        OptionError: It has a KV cache already, is another model or came without text.
    """
    require_forward(program, told)
    if program.info.kind != "decoder" or program.calibration is None:
        raise OptionError(
            f"{told} {program.info.name}: needs a decoder and text to calibrate on, because {why}. {instead}"
        )


class LearnsFromTokens(Pass):
    """A pass that learns what single tokens use from the calibration text."""

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`."""
        return True

    def requires(self, program: Program) -> None:
        """It runs the captured graph on text."""
        why = "what a token uses is learned from tokens, and only single ones are worth it"
        require_decoder_text(program, f"[{self.name}]", why, "Leave the pass out.")


def require_pattern(told: str, field: str, pattern: str | None) -> None:
    """Refuse an option that is no regular expression.

    Args:
        told: Id of the pass in brackets.
        field: Name of the option.
        pattern: Its value.

    Raises:
        OptionError: It is none.
    """
    try:
        re.compile("" if pattern is None else pattern)
    except (re.error, TypeError) as error:
        raise OptionError(
            f"{told} {field}={pattern!r}: needs a regular expression ({error}), because it is searched in names such "
            f"as model.layers.0.mlp.up_proj.weight. Write {field}='mlp' for those."
        ) from error


def idle_patterns(program: Program, **patterns: str | None) -> list[MissRecord]:
    """Regular expressions that are found in the name of no weight: mostly a mistake.

    Args:
        program: Any.
        patterns: By the names of their options.
    """
    names = list(program.used_constants())
    return [
        MissRecord(f"{field}={pattern!r}", "found in the name of no weight")
        for field, pattern in patterns.items()
        if pattern is not None and not any(re.search(pattern, name) for name in names)
    ]

"""Every exception jettison raises on purpose.

The first three families blame the user's input and always say what to do about it; the others are our own bugs and
say so. A message has four parts, in order: where, found, needed (and why), what to do.
"""

from __future__ import annotations


class JettisonError(Exception):
    """Base of every error jettison raises on purpose; the CLI prints it as one paragraph, without a traceback."""


class CaptureError(JettisonError):
    """The model cannot be read or captured: names the file or submodule, the reason, and what to do."""


class OptionError(JettisonError):
    """A setting is wrong: an unknown pass or option, a value out of range, a pipeline in the wrong order.

    The CLI exits 2 (usage error) on it.
    """


class UnsupportedError(JettisonError):
    """Valid input that jettison does not handle (yet); names the nearest thing that works."""


class ArtifactError(JettisonError):
    """An artifact folder is missing, damaged, of a newer format, or cannot be written."""


class BugError(JettisonError):
    """Base of the errors that are jettison's own fault."""

    def __str__(self) -> str:
        blame = "This is a bug in jettison, not in your model: please report it with the command you ran."
        return f"{super().__str__()}\n{blame}"


class PassError(BugError):
    """A pass broke its contract."""


class VerifyError(BugError):
    """A program breaks an invariant of its stage."""


class CodegenError(BugError):
    """A verified program could not be lowered to its target."""


class KernelsNotUsed(UserWarning):
    """Machine code in an artifact does not fit this machine; its kernels are compiled instead."""

"""Opening artifacts for the subcommands that run one."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING

from jettison.cli.console import Terminal
from jettison.cli.signals import import_torch
from jettison.ir.errors import KernelsNotUsed
from jettison.ir.progress import track

if TYPE_CHECKING:
    from jettison.optimized_model import OptimizedModel


def open_model(args: argparse.Namespace, terminal: Terminal, *, allow_spinning: bool = True) -> OptimizedModel:
    """The model in `args.artifact`, ready to run with `args.threads` threads."""
    import_torch()
    import jettison

    options = {"threads": args.threads, "allow_spinning": allow_spinning, "trust_kernels": args.trust_kernels}
    model = jettison.load(args.artifact, **options)
    with track("open the model", 1) as advance, warnings.catch_warnings(record=args.trust_kernels) as noted:
        if args.trust_kernels:
            warnings.simplefilter("always", KernelsNotUsed)
        model.executor  # noqa: B018  (weights are mapped and kernels prepared on first use)
        advance(1)
    for warning in noted or ():
        terminal.note(f"note: {warning.message}")
    return model

"""Opening artifacts for the subcommands that run one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jettison.cli.signals import import_torch
from jettison.ir.progress import track

if TYPE_CHECKING:
    from jettison.optimized_model import OptimizedModel


def open_model(args: argparse.Namespace, *, allow_spinning: bool = True) -> OptimizedModel:
    """The model in `args.artifact`, ready to run with `args.threads` threads."""
    import_torch()
    import jettison

    model = jettison.load(args.artifact, threads=args.threads, allow_spinning=allow_spinning)
    with track("open the model", 1) as advance:
        model.executor  # noqa: B018  (weights are mapped and kernels prepared on first use)
        advance(1)
    return model

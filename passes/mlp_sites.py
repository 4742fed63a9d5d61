"""Feed-forward layers in a graph: a linear, an activation, perhaps a gate, and a second linear."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments, constant_name, is_call, only_user
from jettison.ir.ops import gated_activation, lut_linear, quantized_linear
from jettison.ir.program import Program, constant_reads
from jettison.ir.text import target_text
from jettison.passes.raise_gated_mlp import activation_name

aten = torch.ops.aten
_LINEARS = (aten.linear.default, quantized_linear, lut_linear)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class MlpSite:
    """A feed-forward layer.

    Attributes:
        down: The second linear, from F neurons to E.
        hidden: What it reads: the activations `[..., F]`.
        x: What the layer reads, `[..., E]`.
        up: The first linear.
        gate: The linear whose activation gates it, or None.
        activation: A key of `ACTIVATIONS`.
    """

    down: fx.Node
    hidden: fx.Node
    x: fx.Node
    up: fx.Node
    gate: fx.Node | None
    activation: str

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """All its linears, in the order in which they read."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are quantised."""
        return is_call(self.up, quantized_linear)

    @property
    def neurons(self) -> int:
        """F."""
        return int(self.hidden.meta["val"].shape[-1])

    @property
    def width(self) -> int:
        """E."""
        return int(self.x.meta["val"].shape[-1])

    def constant(self, linear: fx.Node, operand: str) -> str | None:
        """Name of the constant that is an operand of one of its linears; None where there is none."""
        return constant_name(arguments(linear)[operand])


def require_calibrated(program: Program, pass_name: str) -> None:
    """Refuse a program that cannot run calibration tokens.

    Raises:
        OptionError: It has a KV cache already, or there is no text.
    """
    if "forward" not in program.entries:
        raise OptionError(
            f"[{pass_name}] behind cache-kv: needs the graph of whole sequences, to run the calibration text. Put "
            "cache-kv last."
        )
    if program.info.kind != "decoder" or program.calibration is None:
        raise OptionError(
            f"[{pass_name}] {program.info.name}: needs a decoder and text to calibrate on, because what a token uses "
            "is learned from tokens, and only single ones are worth it. Leave the pass out."
        )


def require_pattern(pass_name: str, skip: str | None) -> None:
    """Refuse an option `skip` that is no regular expression.

    Raises:
        OptionError: It is not.
    """
    try:
        re.compile(skip or "")
    except (re.error, TypeError) as error:
        raise OptionError(
            f"[{pass_name}] skip={skip!r}: needs a regular expression ({error}), because it is searched in names such "
            r"as model.layers.0.mlp.up_proj.weight. Write skip='layers\.0\.' for those of the first layer."
        ) from error


def residual_before_attention(site: MlpSite) -> fx.Node | None:
    """What the attention in front of a layer adds to, or None where that cannot be told.

    From the layer's input back through its norm to the sum that the attention ends in: of its two operands, the one
    that the other is computed from.
    """
    node = site.x
    while is_call(node, *NORMS) or is_call(node, aten.reshape.default):
        node = node.args[0]
    if not is_call(node, aten.add.Tensor):
        return None
    left, right = node.args[:2]
    for earlier, later in ((left, right), (right, left)):
        if isinstance(earlier, fx.Node) and isinstance(later, fx.Node) and earlier in ancestors(later):
            return earlier
    return None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def find_mlp(node: fx.Node, program: Program) -> MlpSite | Miss | None:
    """The feed-forward layer that a linear ends.

    Args:
        node: Any node.
        program: Its program.

    Returns:
        The layer; a Miss where there is one that cannot be taken apart; None where there is none.
    """
    if not is_call(node, *_LINEARS):
        return None
    hidden = node.args[0]
    gated = is_call(hidden, gated_activation)
    activation = hidden.args[2] if gated else activation_name(hidden)
    if activation is None:
        return None
    gate, up = hidden.args[:2] if gated else (None, hidden.args[0])
    linears = [each for each in (gate, up) if each is not None]
    if not all(is_call(each, *_LINEARS) for each in linears) or len({each.args[0] for each in linears}) != 1:
        return None
    site = MlpSite(node, hidden, up.args[0], up, gate, activation)
    if len({each.target for each in site.linears}) != 1:
        return Miss("one of its linears is quantised and another is not", node)
    if is_call(node, lut_linear):
        return Miss("its weights are codes into a table, which are not read by groups", node)
    for value in (hidden, *linears):
        if only_user(value) is None:
            return Miss("something else reads its neurons too", value)
    return _taken(site, program)


def _taken(site: MlpSite, program: Program) -> MlpSite | Miss:
    """The layer, unless its weights are computed or shared."""
    for linear in site.linears:
        for operand in ("weight", "codes", "scales", "zeros", "bias"):
            value = arguments(linear).get(operand)
            if value is None:
                continue
            name = constant_name(value)
            if name is None:
                return Miss("a weight is not a constant", linear)
            for user, _ in constant_reads(program, name):
                if user is not linear:
                    return Miss(f"{target_text(user.target)} reads {name} too", linear)
    if site.gate is not None and arguments(site.gate)["bias"] is not None:
        return Miss("the gate has a bias", site.gate)
    return site

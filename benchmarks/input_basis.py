"""What `xquant` loses by where it rounds: the layer's input as it is, or in the basis of its projections.

    python benchmarks/input_basis.py --text FILE [--tokens 768]

On tiny-opt, which has no shared key heads. Keys and values of all tokens are made from the rounded input, inside the
eager model, and its logits are compared: KL in nats per token. Ranges per token are the choice of the source (XQuant,
arXiv 2508.10395). Writes benchmarks/results/input_basis.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from record import environment, write
from torch import Tensor, nn

from jettison.ir import ops
from jettison.runtime.tokenizer import load_tokenizer

MODELS = Path(__file__).parents[1] / "examples" / "models"
BITS, GROUPS = (4, 2), (32, 128)


def rounded(x: Tensor, bits: int, group: int, *, by_channel: bool) -> Tensor:
    """`[T, E]` after a round trip: ranges of `group` tokens of a channel, or of `group` channels of a token."""
    tokens = x.shape[0] // group * group
    slots = x[None, None, :tokens].unflatten(2, (-1, group))
    rows, columns = (1, x.shape[1]) if by_channel else (group, x.shape[1] // group)
    parts = ops.quantize_slots(slots, bits, rows, columns)
    return torch.cat([ops.dequantize_slots(*parts, bits, group, rows)[0, 0], x[tokens:]])


class RoundedInput:
    """Makes the keys and values of an eager attention from its input after a round trip.

    Args:
        projections: Its linears of keys and values.
    """

    def __init__(self, projections: tuple[nn.Linear, ...]) -> None:
        self.trip: Callable[[Tensor], Tensor] | None = None
        joint = torch.cat([each.weight.detach() for each in projections]).T
        self.basis = torch.linalg.svd(joint.double(), full_matrices=False)[0].to(torch.float32)
        for each in projections:
            each.register_forward_pre_hook(lambda _module, given: self._input(*given))

    def _input(self, x: Tensor) -> tuple[Tensor]:
        return (x if self.trip is None else self.trip(x[0])[None],)


def measure(name: str, text: str, tokens: int) -> dict[str, float]:
    """KL of each way to round."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    ids = torch.tensor([load_tokenizer(MODELS / name).encode(text)[:tokens]])
    attentions = [module for module in model.modules() if hasattr(module, "k_proj")]
    inputs = [RoundedInput((module.k_proj, module.v_proj)) for module in attentions]
    with torch.no_grad():
        reference = model(ids).logits[0].double().log_softmax(-1)
        found = {}
        for bits in BITS:
            for group in GROUPS:
                ways = {"input per token": (False, False), "in the basis, per channel": (True, True)}
                for way, (in_basis, by_channel) in ways.items():
                    for each in inputs:
                        turn = each.basis if in_basis else torch.eye(each.basis.shape[0])
                        each.trip = lambda x, turn=turn, by_channel=by_channel, bits=bits, group=group: (
                            rounded(x @ turn, bits, group, by_channel=by_channel) @ turn.T
                        )
                    actual = model(ids).logits[0].double().log_softmax(-1)
                    kl = (reference.exp() * (reference - actual)).sum(-1).mean().item()
                    found[f"{bits} bits, group {group}, {way}"] = kl
                for each in inputs:
                    each.trip = None
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=768)
    arguments = parser.parse_args()
    before = environment()
    text = Path(arguments.text).read_text()[20_000:]
    figures = {name: measure(name, text, arguments.tokens) for name in ("tiny-opt",)}
    print(figures)
    print(write("input_basis", figures, before))


if __name__ == "__main__":
    main()

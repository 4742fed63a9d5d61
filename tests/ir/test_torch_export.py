"""Which refusals of torch.export are taken back. That the second attempt works is shown by the suite on torch 2.11."""

from __future__ import annotations

import pytest

from jettison.ir.torch_export import _fails_without_need

SIZE = "L['inputs'][0].size()[1]"
ROWS = "L['inputs'][0].size()[0]"
HEADER = 'Constraints violated (sequence)! For more information, run with TORCH_LOGS="+dynamic".\n'


def refusal(*guards: str) -> str:
    lines = (
        f"  - Not all values of sequence = {SIZE} in the specified range satisfy the generated guard {g}."
        for g in guards
    )
    return HEADER + "\n".join(lines)


@pytest.mark.parametrize(
    ("message", "is_needless"),
    [
        (refusal(f"min(4*{SIZE}, 8*{SIZE}) == (4*{SIZE})"), True),
        (refusal(f"min(4*{SIZE}, 8*{SIZE}) == (4*{SIZE})", f"min(2*{SIZE}, 2*{SIZE}) == (2*{SIZE})"), True),
        (refusal(f"(min({SIZE}, 4*{SIZE}) % {SIZE}) == 0"), True),
        (refusal(f"min({SIZE}*{ROWS}, 4*{SIZE}*{ROWS}) == {SIZE}*{ROWS}"), True),
        (refusal(f"min({SIZE}, {ROWS}) == {SIZE}"), False),
        (refusal(f"min(open('x'), {SIZE}) == {SIZE}"), False),
        (refusal(f"min(8*{SIZE}, 4*{SIZE}) == (8*{SIZE})"), False),
        (refusal(f"min(4*{SIZE}, 8) == (4*{SIZE})"), False),
        (refusal(f"5 <= {SIZE}"), False),
        (refusal(f"min(4*{SIZE}, 8*{SIZE}) == (4*{SIZE})", f"{SIZE} <= 16"), False),
        (refusal(f"min(4*{SIZE}, 8*{SIZE}) == (4*{SIZE})") + "\n  - sequence was specialised to 5", False),
        (HEADER, False),
        ("the model raised something else", False),
    ],
)  # fmt: skip
def test_only_assumptions_true_of_every_size_are_waived(message, is_needless):
    assert _fails_without_need(message) is is_needless

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from jettison.ir.diff import diff_summary, diff_text
from jettison.ir.edit import Edit
from jettison.passes.eliminate_no_ops import EliminateNoOps
from jettison.passes.select_logits import SelectLogits
from tests.helpers import export_body, run_pass

HEAD = "program decoder M context=8 vocab=5\n"


def program(*lines: str, signature: str = "%x: f32[s0,4]", entry: str = "forward") -> str:
    return HEAD + f"entry {entry}({signature}):\n" + "".join(f"  {line}\n" for line in lines)


CHAIN = (
    "%0: f32[s0,4] = aten.sin(%x)",
    "%1: f32[s0,4] = aten.clone(%0)",
    "%2: f32[s0,4] = aten.exp(%1)",
    "%3: f32[s0,4] = aten.mul.Tensor(%2, %0)",
    "%4: f32[s0,4] = aten.tanh(%3)",
    "return %4",
)


def changes(before: str, after: str) -> list[str]:
    return [line for line in diff_text(before, after).splitlines() if line[0] in "+-"]


def test_a_removed_node_renumbers_nothing():
    """Everything below it gets another number; only the node and its reader are shown."""
    after = program(
        "%0: f32[s0,4] = aten.sin(%x)",
        "%1: f32[s0,4] = aten.exp(%0)",
        "%2: f32[s0,4] = aten.mul.Tensor(%1, %0)",
        "%3: f32[s0,4] = aten.tanh(%2)",
        "return %3",
    )
    assert diff_text(program(*CHAIN), after).splitlines() == [
        "@@ -2,6 +2,5 @@ entry forward",
        " entry forward(%x: f32[s0,4]):",
        "   %0: f32[s0,4] = aten.sin(%x)",
        "-  %1: f32[s0,4] = aten.clone(%0)",
        "-  %2: f32[s0,4] = aten.exp(%1)",
        "+  %1: f32[s0,4] = aten.exp(%0)",
        "   %2: f32[s0,4] = aten.mul.Tensor(%1, %0)",
        "   %3: f32[s0,4] = aten.tanh(%2)",
    ]
    assert changes(after, program(*CHAIN)) == [
        "-  %1: f32[s0,4] = aten.exp(%0)",
        "+  %1: f32[s0,4] = aten.clone(%0)",
        "+  %2: f32[s0,4] = aten.exp(%1)",
    ]


def test_equal_texts_have_no_diff():
    assert diff_text(program(*CHAIN), program(*CHAIN)) == ""
    assert diff_text("", "") == ""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%3: f32[s0,4] = aten.mul.Tensor(%2, %0)", "%3: f32[s0,4] = aten.mul.Tensor(%0, %2)"),
        ("%3: f32[s0,4] = aten.mul.Tensor(%2, %0)", "%3: f32[s0,4] = aten.mul.Tensor(%2, %2)"),
        ("return %4", "return %3"),
        ("%0: f32[s0,4] = aten.sin(%x)", "%0: f32[s0,4] = aten.sin(%y)"),
        ("%2: f32[s0,4] = aten.exp(%1)", "%2: f32[s0,4] = aten.cos(%1)"),
        ("%4: f32[s0,4] = aten.tanh(%3)", "%4: f16[s0,4] = aten.tanh(%3)"),
        ("%4: f32[s0,4] = aten.tanh(%3)", "%4: f32[s0,s0] = aten.tanh(%3)"),
    ],
    ids=["operands_swapped", "operand", "returned", "input", "operator", "dtype", "size"],
)
def test_a_rewired_line_is_a_change(before, after):
    text = program(*CHAIN)
    assert changes(text, text.replace(before, after)) == [f"-  {before}", f"+  {after}"]


def test_renamed_symbols_are_no_change():
    before = program("%0: f32[s0,s1] = aten.sin(%x)", "return %0", signature="%x: f32[s0,s1]")
    renamed = program("%0: f32[s1,s0] = aten.sin(%x)", "return %0", signature="%x: f32[s1,s0]")
    swapped = program("%0: f32[s1,s0] = aten.sin(%x)", "return %0", signature="%x: f32[s0,s1]")
    assert diff_text(before, renamed) == ""
    assert changes(before, swapped) == ["-  %0: f32[s0,s1] = aten.sin(%x)", "+  %0: f32[s1,s0] = aten.sin(%x)"]


def test_a_new_input_does_not_rename_the_symbols_behind_it():
    lines = ("%0: i64[s{0}] = aten.nonzero(%x)", "%1: i64[s{0}] = aten.neg(%0)", "return %1")
    before = program(*(line.format(2) for line in lines), signature="%x: f32[s0,s1]")
    after = program(*(line.format(3) for line in lines), signature="%x: f32[s0,s1], %m: i64[s0,s2]")
    assert [line[0] + line[1:].split()[0] for line in changes(before, after)] == ["-entry", "+entry"]


def test_names_that_look_like_numbers_or_symbols_are_names():
    before = program("%0: f32[s0,4] = aten.linear(%x, @s0.w)", "return %0")
    after = program("%0: f32[s0,4] = aten.linear(%x, @s1.w)", "return %0")
    assert len(changes(before, after)) == 2
    before = program("%0: f32[s0,4] = jettison.f(%x, 's0')", "return %0")
    assert len(changes(before, before.replace("'s0'", "'s1'"))) == 2


def test_declarations_are_compared_by_their_whole_line():
    before = program(*CHAIN).replace("entry", "constant @w: f32[4] #aaaaaaaa\nentry")
    after = before.replace("#aaaaaaaa", "#bbbbbbbb")
    assert changes(before, after) == ["-constant @w: f32[4] #aaaaaaaa", "+constant @w: f32[4] #bbbbbbbb"]


def two_entries(*lines: str) -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return HEAD + "".join(f"entry {name}(%x: f32[s0,4]):\n{body}" for name in ("prefill", "decode"))


def test_prefill_and_decode_are_compared_with_the_forward_they_were_made_from():
    after = two_entries(*CHAIN[:-1], "%5: f32[s0,4] = aten.cos(%4)", "return %5")
    text = diff_text(program(*CHAIN), after)
    assert [line for line in text.splitlines() if line.startswith("@@")] == [
        "@@ -2,3 +2,3 @@ entry prefill",
        "@@ -6,3 +6,4 @@ entry prefill",
        "@@ -2,3 +10,3 @@ entry decode",
        "@@ -6,3 +14,4 @@ entry decode",
    ]
    assert len(changes(program(*CHAIN), after)) == 2 * 5
    summary = diff_summary(program(*CHAIN), after)
    assert (summary["nodes_before"], summary["nodes_after"]) == (5, 12)
    assert summary["added"] == {"aten.cos": 2}
    assert summary["removed"] == {}
    assert [entry["name"] for entry in summary["entries"]] == ["prefill", "decode"]
    assert summary["entries"][0]["nodes_before"] == 5


def test_an_entry_that_is_gone_is_removed():
    before, after = two_entries(*CHAIN), program(*CHAIN, entry="prefill")
    removed = changes(before, after)
    assert removed == ["-entry decode(%x: f32[s0,4]):", *(f"-  {line}" for line in CHAIN)]
    assert list(diff_summary(before, after)["removed"].values()) == [1] * 5


def test_summary_counts_nodes_by_operator():
    after = program(
        "%0: f32[s0,4] = aten.sin(%x)", "%1: f32[s0,4] = aten.sin(%0)", "%2: f32[s0,4] = aten.tanh(%1)", "return %2"
    )
    summary = diff_summary(program(*CHAIN), after)
    counts = {
        "nodes_before": 5,
        "nodes_after": 3,
        "added": {"aten.sin": 1},
        "removed": {"aten.clone": 1, "aten.exp": 1, "aten.mul.Tensor": 1},
    }
    assert summary == {**counts, "entries": [{"name": "forward", **counts}]}


def test_summary_puts_the_most_frequent_first():
    after = program("%0: f32[s0,4] = aten.sin(%x)", "return %0")
    before = program(*(f"%{n}: f32[s0,4] = aten.{'tanh' if n % 3 else 'exp'}(%x)" for n in range(9)), "return %0")
    assert list(diff_summary(before, after)["removed"].items()) == [("aten.tanh", 6), ("aten.exp", 3)]


def test_summary_of_equal_texts_is_empty():
    summary = diff_summary(program(*CHAIN), program(*CHAIN))
    assert (summary["added"], summary["removed"], summary["nodes_before"]) == ({}, {}, 5)


def test_a_traced_program_against_what_a_pass_made_of_it():
    before = export_body(lambda self, x: F.linear((x.clone() * 1.0).sin() + x.clone(), self.head), head=(11, 8))
    after, record = run_pass(EliminateNoOps(), before)
    lines = changes(str(before), str(after))
    assert record.rewrites == 3
    assert [line.split(" = ")[1].split("(")[0] for line in lines if line[0] == "-"] == [
        "aten.clone", "aten.mul.Tensor", "aten.sin", "aten.clone", "aten.add.Tensor"
    ]  # fmt: skip
    assert [line.split(" = ")[1].split("(")[0] for line in lines if line[0] == "+"] == ["aten.sin", "aten.add.Tensor"]
    assert diff_summary(str(before), str(after))["removed"] == {"aten.clone": 2, "aten.mul.Tensor": 1}


def test_a_diff_is_not_empty_when_a_pass_rewrote():
    before = export_body(lambda self, x: F.linear(x, self.head), head=(11, 8))
    after, _ = run_pass(SelectLogits(), before)
    text = diff_text(str(before), str(after))
    assert "+entry forward(" in text
    assert "aten.gather" in text


def deep(layers: int, has_clones: bool) -> str:
    """Layers that read a constant each, one line in ten a copy."""
    lines, number = [], 0
    last = "%x"
    for layer in range(layers):
        for step in range(40):
            operand = f", @layers.{layer}.weight" if step == 7 else ""
            op = "clone" if step % 10 == 9 else f"op{step % 5}"
            if op == "clone" and not has_clones:
                continue
            lines.append(f"%{number}: f32[s0,4] = aten.{op}({last}{operand})")
            last, number = f"%{number}", number + 1
    return program(*lines, f"return {last}")


def test_a_deep_model_is_compared_in_reasonable_time():
    """Thousands of lines that all look alike, of which one in ten goes away."""
    before, after = deep(100, True), deep(100, False)
    started = time.perf_counter()
    lines = changes(before, after)
    assert time.perf_counter() - started < 5
    assert sum("aten.clone" in line for line in lines) == 400
    # Each copy, and the one line that read it.
    assert len(lines) <= 400 + 2 * 400
    assert diff_summary(before, after)["removed"] == {"aten.clone": 400}


def test_moved_layers_do_not_hide_in_renumbering():
    """Two blocks that read different constants change places: both are shown."""
    block = ("%{0}: f32[s0,4] = aten.linear(%{1}, @{2})", "%{3}: f32[s0,4] = aten.relu(%{0})")

    def chain(*names: str) -> str:
        lines = ["%0: f32[s0,4] = aten.sin(%x)"]
        for index, name in enumerate(names):
            lines += [line.format(2 * index + 1, 2 * index, name, 2 * index + 2) for line in block]
        return program(*lines, f"return %{2 * len(names)}")

    lines = changes(chain("a", "b", "c"), chain("b", "a", "c"))
    removed, added = ([line for line in lines if line[0] == side and "linear" in line] for side in "-+")
    assert len(removed) == len(added) >= 1
    assert {line.split("@")[1] for line in removed} == {line.split("@")[1] for line in added}


def test_edit_of_one_literal_is_one_line():
    before = export_body(lambda self, x: (x * 2).sin() * 3)
    after = before.copy()
    edit = Edit(after, "forward", "test")
    node = [n for n in edit.graph.nodes if n.target is torch.ops.aten.mul.Tensor][-1]
    edit.set_arguments(node, node.args[0], 4)
    assert [line.rsplit(" ", 1)[1] for line in changes(str(before), str(after))] == ["3)", "4)"]

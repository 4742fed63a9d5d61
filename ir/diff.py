"""Structural diff of two canonical texts.

Canonical text numbers values in order, so one node removed near the top renumbers every line below it and a plain line
diff shows the whole graph. Here lines are aligned with numbers and symbols masked; an aligned pair counts as unchanged
when its operands correspond too: when they are aligned, or one took the place of the other. What is shown is therefore
exactly what was added, removed or rewired.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

_VALUE = re.compile(r"%(\d+)\b")
_SYMBOL = re.compile(r"(?<![\w.@%'])s(\d+)\b(?!['.])")
_CALL = re.compile(r"^\s*%\d+: .*? = ([\w.]+)\(")
_CONTEXT_LINES = 2


@dataclass
class _Section:
    """The declarations of a program, or one entry: its lines, and the number of the first in the whole text."""

    name: str | None
    first_line: int
    lines: list[str] = field(default_factory=list)

    @property
    def calls(self) -> list[str]:
        """Operator of each node, in order."""
        return [found.group(1) for found in map(_CALL.match, self.lines) if found]


@dataclass(frozen=True)
class _Row:
    """One aligned line: on both sides, or on one."""

    before: int | None
    after: int | None
    is_same: bool = False


def _sections(text: str) -> list[_Section]:
    sections = [_Section(None, 1)]
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("entry "):
            sections.append(_Section(line.removeprefix("entry ").split("(", 1)[0], number))
        sections[-1].lines.append(line)
    return sections


def _pairs(before: str, after: str) -> Iterator[tuple[_Section, _Section]]:
    """Sections to compare: the same name, or the entry that a new one was made from.

    `prefill` and `decode` are both made from `forward`, so a new entry is compared with `forward` where that exists.
    """
    old, new = ({section.name: section for section in _sections(text)} for text in (before, after))
    compared: set[str | None] = set()
    for name, section in new.items():
        origin = old.get(name) or old.get("forward") or _Section(name, 1)
        compared.add(origin.name)
        yield origin, section
    for name, section in old.items():
        if name not in compared:
            yield section, _Section(name, 1)


def _masked(line: str) -> str:
    """What identifies a line before it is known which value is which."""
    if line.startswith("entry "):
        return "entry"
    return _SYMBOL.sub("s", _VALUE.sub("%", line))


def _align(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Increasing pairs of positions with equal keys.

    Patience first: keys that occur once on either side (in a model, the lines that name a constant) are anchors, which
    keeps the blocks of repeated layers apart and the work linear. Between anchors, difflib's longest matching blocks.
    """
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    pairs = [(index, index) for index in range(start)]
    left, right = before[start:], after[start:]
    counts_left, counts_right = Counter(left), Counter(right)
    where = {key: index for index, key in enumerate(right) if counts_right[key] == 1}
    candidates = [(i, where[key]) for i, key in enumerate(left) if counts_left[key] == 1 and key in where]
    anchors = _longest_increasing(candidates)
    if not anchors:
        matcher = SequenceMatcher(None, left, right, autojunk=False)
        for block in matcher.get_matching_blocks():
            pairs += [(start + block.a + k, start + block.b + k) for k in range(block.size)]
        return pairs
    low_left, low_right = 0, 0
    for i, j in [*anchors, (len(left), len(right))]:
        inner = _align(left[low_left:i], right[low_right:j])
        pairs += [(start + low_left + a, start + low_right + b) for a, b in inner]
        if i < len(left):
            pairs.append((start + i, start + j))
        low_left, low_right = i + 1, j + 1
    return pairs


def _longest_increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence whose second members increase; the first ones already do."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, value) in enumerate(pairs):
        length = bisect_left(tails, value)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [value]
        ends[length : length + 1] = [index]
    chain: list[tuple[int, int]] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(pairs[index])
        index = previous[index]
    return chain[::-1]


class _Renaming:
    """Which number after stands for which number before, learnt from aligned lines in order."""

    def __init__(self) -> None:
        self.after: dict[str, str] = {}
        self.before: dict[str, str] = {}

    def learn(self, old: str, new: str) -> None:
        """From now on `new` stands for `old`, unless either is taken."""
        if old not in self.after and new not in self.before:
            self.after[old], self.before[new] = new, old

    def agree(self, before: Sequence[str], after: Sequence[str]) -> bool:
        """Whether the numbers correspond. Two that are both new do: the one took the other's place."""
        for old, new in zip(before, after, strict=False):
            self.learn(old, new)
        return [self.after.get(old) for old in before] == list(after)


def _rows(before: _Section, after: _Section) -> list[_Row]:
    """Both sections as one list of lines in order."""
    keys = [[_masked(line) for line in section.lines] for section in (before, after)]
    values, symbols = _Renaming(), _Renaming()
    rows: list[_Row] = []
    i = j = 0
    for a, b in [*_align(*keys), (len(before.lines), len(after.lines))]:
        rows += [_Row(k, None) for k in range(i, a)]
        rows += [_Row(None, k) for k in range(j, b)]
        if a < len(before.lines):
            old, new = before.lines[a], after.lines[b]
            same_symbols = symbols.agree(_SYMBOL.findall(old), _SYMBOL.findall(new))
            is_same = _SYMBOL.sub("s", old) == _SYMBOL.sub("s", new) or not old.startswith("entry ")
            results = 1 if _CALL.match(old) else 0
            old_values, new_values = _VALUE.findall(old), _VALUE.findall(new)
            if results:
                values.learn(old_values[0], new_values[0])
            same_operands = values.agree(old_values[results:], new_values[results:])
            rows.append(_Row(a, b, is_same and same_symbols and same_operands))
        i, j = a + 1, b + 1
    return rows


def _hunks(rows: Sequence[_Row]) -> Iterator[tuple[int, int]]:
    """Ranges of rows around the changes, with a little context; ranges that touch are one."""
    start = stop = -1
    for index, row in enumerate(rows):
        if row.is_same:
            continue
        low, high = max(0, index - _CONTEXT_LINES), min(len(rows), index + _CONTEXT_LINES + 1)
        if stop >= low:
            stop = high
            continue
        if stop >= 0:
            yield start, stop
        start, stop = low, high
    if stop >= 0:
        yield start, stop


def _hunk_text(before: _Section, after: _Section, rows: Sequence[_Row]) -> Iterator[str]:
    numbers = [
        [base.first_line + index for index in (getattr(row, side) for row in rows) if index is not None]
        for side, base in (("before", before), ("after", after))
    ]
    spans = [f"{lines[0] if lines else 0},{len(lines)}" for lines in numbers]
    name = after.name or before.name
    yield f"@@ -{spans[0]} +{spans[1]} @@" + (f" entry {name}" if name else "")
    added: list[str] = []
    for row in rows:
        if row.before is not None and not row.is_same:
            yield f"-{before.lines[row.before]}"
        if row.after is not None and not row.is_same:
            added.append(f"+{after.lines[row.after]}")
        if row.is_same and row.after is not None:
            yield from added
            added.clear()
            yield f" {after.lines[row.after]}"
    yield from added


def diff_text(before: str, after: str) -> str:
    """What changed between two canonical texts, in the manner of a unified diff.

    Lines that differ only in the numbers of values or symbols are unchanged. Removed lines carry the numbers of
    `before`; added and unchanged ones those of `after`. A node that reads another value stands as removed and added,
    but not one that reads what was put in the place of its old operand.

    Args:
        before: Canonical text, see `jettison.ir.text.program_text`.
        after: The same of another program.

    Returns:
        Hunks headed by the line numbers in both texts; empty when nothing but numbering differs.
    """
    lines: list[str] = []
    for old, new in _pairs(before, after):
        rows = _rows(old, new)
        for start, stop in _hunks(rows):
            lines += _hunk_text(old, new, rows[start:stop])
    return "".join(f"{line}\n" for line in lines)


def diff_summary(before: str, after: str) -> dict[str, Any]:
    """How many nodes and of which operators two canonical texts differ in.

    Args:
        before: Canonical text.
        after: The same of another program.

    Returns:
        JSON-ready: `nodes_before`, `nodes_after`; `added` and `removed`, counts by operator, most frequent first; and
        `entries`, the same four for each entry with its `name`. An entry that is new is counted against `forward`.
    """
    entries = []
    for old, new in _pairs(before, after):
        if old.name is None and new.name is None:
            continue
        entries.append({"name": new.name, **_counts(Counter(old.calls), Counter(new.calls))})
    totals: dict[str, Any] = {
        "nodes_before": sum(len(section.calls) for section in _sections(before)),
        "nodes_after": sum(len(section.calls) for section in _sections(after)),
    }
    for side in ("added", "removed"):
        totals[side] = _by_count(sum((Counter(entry[side]) for entry in entries), Counter()))
    return {**totals, "entries": entries}


def _counts(old: Counter[str], new: Counter[str]) -> dict[str, Any]:
    return {
        "nodes_before": old.total(),
        "nodes_after": new.total(),
        "added": _by_count(new - old),
        "removed": _by_count(old - new),
    }


def _by_count(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))

"""LLVM IR around a function over rows, through which several threads share them.

    NAME_shared(job)

Each takes the next rows until none are left: one whose processor does something else in between holds nobody up.
`job` is i64 words: the next row, the end, how many rows are taken at once, then the arguments of the function, in which
`first` and `last` may hold anything. When every call has returned, all rows are done.
"""

from __future__ import annotations

from collections.abc import Sequence

# Words of a job in front of the arguments.
HEAD = 3


def row_shares(name: str, types: Sequence[str], first: int) -> str:
    """The definition of `NAME_shared`.

    Args:
        name: Of a function without a result.
        types: Of its arguments, `ptr` or `i64`.
        first: Which of them is the first row; the next one is where they end.
    """
    lines, given = [], []
    for place, type_ in enumerate(types):
        if place in (first, first + 1):
            given.append(f"i64 {'%row' if place == first else '%stop'}")
            continue
        lines += [
            f"  %at{place} = getelementptr i64, ptr %job, i64 {HEAD + place}",
            f"  %argument{place} = load {type_}, ptr %at{place}, align 8",
        ]
        given.append(f"{type_} %argument{place}")
    loaded = "\n".join(lines)
    return f"""
define void @{name}_shared(ptr %job) {{
  %end_at = getelementptr i64, ptr %job, i64 1
  %end = load i64, ptr %end_at, align 8
  %step_at = getelementptr i64, ptr %job, i64 2
  %step = load i64, ptr %step_at, align 8
{loaded}
  br label %take
take:
  %row = atomicrmw add ptr %job, i64 %step monotonic
  %is_left = icmp ult i64 %row, %end
  br i1 %is_left, label %work, label %done
work:
  %behind = add i64 %row, %step
  %is_last = icmp ugt i64 %behind, %end
  %stop = select i1 %is_last, i64 %end, i64 %behind
  call void @{name}({", ".join(given)})
  br label %take
done:
  ret void
}}
"""

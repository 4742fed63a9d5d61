"""Speed and memory of an optimised model: prefill and decode rates, peak memory, and bytes read per token."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from jettison.ir.errors import OptionError
from jettison.ir.progress import track
from jettison.ir.text import dtype_text
from jettison.optimized_model import OptimizedModel
from jettison.runtime.device_stream import DeviceStream
from jettison.runtime.executor import Executor
from jettison.runtime.session import Session

SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")
_CPUS = Path("/sys/devices/system/cpu")
_ITEMSIZE = {
    dtype_text(dtype): dtype.itemsize
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
# Operators that read only the rows they are asked for, and which of their operands are tables.
_TABLE_OPERANDS = {
    "aten.embedding": (0,), "jettison.lut_embedding": (1, 3, 4), "jettison.quantized_embedding": (1, 2, 3),
    "jettison.experts": (3, 4), "jettison.quantized_experts": (3, 4, 5, 6, 7, 8), "jettison.selected_linear": (2,),
    "jettison.sparse_linear": (2,),
}  # fmt: skip
# Operators that are asked for as many rows (experts, channels) by each token as one of their operands has columns.
_CHOICES_OPERAND = {
    "jettison.experts": 1, "jettison.quantized_experts": 1, "jettison.quantized_embedding": 0,
    "jettison.selected_linear": 1, "jettison.sparse_linear": 1,
}  # fmt: skip
# Operators that read groups of neurons: operands of which they read the share that a token names, the one whose rows
# are the groups, and where the size of a group is.
_GROUPED_OPERANDS = {
    "jettison.sparse_mlp": ((2, 3, 4, 5), 7, 9),
    "jettison.quantized_sparse_mlp": ((2, 3, 4, 5, 6, 7, 8, 9, 10, 11), 13, 15),
}
_CHOICES_OPERAND |= dict.fromkeys(_GROUPED_OPERANDS, 1)


@dataclass
class PeakMemory:
    """Samples the anonymous memory of this process from a thread, inside a `with` block.

    Mapped file pages (weights) are not anonymous: the kernel can drop and read them again, so they are not counted
    against a limit. A peak shorter than the sampling interval can be missed.

    Attributes:
        anon_bytes: Largest RssAnon seen; None where the system does not tell.
    """

    anon_bytes: int | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        """Take the first sample and start the thread."""
        self._sample()
        if self.anon_bytes is not None:
            self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread and take the last sample."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        now = status_bytes("RssAnon")
        if now is not None:
            self.anon_bytes = max(now, self.anon_bytes or 0)


def status_bytes(name: str) -> int | None:
    """A field of /proc/self/status in bytes, e.g. `VmHWM`; None on systems without it."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def bench(
    model: OptimizedModel,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure an optimised model on random tokens.

    Every round opens a session, runs a prompt through `prefill` and then decodes; the first round warms up and is not
    counted. Sampling and tokenising are not part of the times.

    Args:
        model: A decoder.
        prompt_tokens: Tokens of the prompt of each row.
        new_tokens: Decode steps.
        batch: Rows.
        rounds: Counted rounds.
        seed: Of the tokens.

    Returns:
        By key: `prefill_tokens_per_s` and `decode_tokens_per_s`, medians over the rounds, of all rows together;
        `peak_rss_bytes`, the largest resident size in the life of the process (VmHWM), mapped weights and whatever ran
        before included; `peak_anon_bytes`, the largest RssAnon sampled while the model was opened and measured (both
        None on systems that do not tell); `weight_bytes`, as the target holds them; `state_bytes`, allocated for all
        rows; `bytes_read_per_token`, see `bytes_read_per_token`; `threads` within an operator; `target`. Where
        weights are streamed, also `streamed_bytes_per_step`, `stream_gb_per_s` while reading, `stream_overlap` (reading
        while computing, over the shorter of the two) and `stream_restarts`, prompts included. To a GPU, weights are
        copied from the host, and the rates are of what is read from disk, if anything is; overlap is not counted.

    Raises:
        OptionError: The model is an encoder, a number is below 1, or the tokens do not fit the context.
    """
    _check_settings(model, {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "rounds": rounds})
    total = prompt_tokens + new_tokens
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.info.vocab_size, (batch, total), generator=generator).tolist()
    prefill_rates, decode_rates = [], []
    with PeakMemory() as peak, track("bench", (rounds + 1) * total) as advance:
        executor = model.executor
        for round_ in range(rounds + 1):
            session = model.session(batch, total)
            prefill_seconds, decode_seconds = _time_round(session, tokens, prompt_tokens)
            if round_:
                prefill_rates.append(batch * prompt_tokens / prefill_seconds)
                decode_rates.append(batch * new_tokens / decode_seconds)
            advance(total)
        state_bytes = session.state_bytes
    return {
        "prefill_tokens_per_s": statistics.median(prefill_rates),
        "decode_tokens_per_s": statistics.median(decode_rates),
        "peak_rss_bytes": status_bytes("VmHWM"),
        "peak_anon_bytes": peak.anon_bytes,
        "weight_bytes": executor.weight_bytes,
        "state_bytes": state_bytes,
        "bytes_read_per_token": bytes_read_per_token(model, session, prompt_tokens, new_tokens),
        "threads": threads_of(executor, model.report.target),
        "target": model.report.target,
        **_streamed(executor),
    }


def _streamed(executor: Executor) -> dict[str, Any]:
    """What the stream of weights did, if there is one."""
    stream = getattr(executor, "stream", None)
    if stream is None:
        return {}
    if isinstance(stream, DeviceStream):
        copied = {"streamed_bytes_per_step": stream.step_bytes}
        if stream.disk is None:
            return copied
        read = stream.disk.statistics
        return {**copied, "stream_gb_per_s": round(read.read_gb_per_s, 3), "stream_restarts": read.restarts}
    found = stream.statistics
    return {
        "streamed_bytes_per_step": stream.step_bytes,
        "stream_gb_per_s": round(found.read_gb_per_s, 3),
        "stream_overlap": round(found.overlap, 3),
        "stream_restarts": found.restarts,
    }


def _check_settings(model: OptimizedModel, settings: dict[str, int]) -> None:
    if model.info.kind != "decoder":
        raise OptionError(f"[bench] {model.info.name} is an encoder: it has no prefill and decode to measure.")
    for name, value in settings.items():
        if value < 1:
            raise OptionError(f"[bench] {name}={value}: needs at least 1.")
    prompt_tokens, new_tokens = settings["prompt_tokens"], settings["new_tokens"]
    if prompt_tokens + new_tokens > model.info.context:
        raise OptionError(
            f"[bench] {prompt_tokens} prompt tokens and {new_tokens} new ones: needs at most {model.info.context} "
            f"together, the context of {model.info.name}. Ask for fewer."
        )


def _time_round(session: Session, tokens: list[list[int]], prompt_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of all decode steps."""
    started = time.perf_counter()
    session.prefill([row[:prompt_tokens] for row in tokens])
    filled = time.perf_counter()
    for step in range(prompt_tokens, len(tokens[0])):
        # An approximate head has all logits only where they are asked for.
        if session.has_approximate_head:
            session.decode_best([row[step] for row in tokens], 1)
        else:
            session.decode([row[step] for row in tokens])
    return filled - started, time.perf_counter() - filled


def bytes_read_per_token(model: OptimizedModel, session: Session, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes that generating one token has to read: weights, and the states of its row; the floor of a decode step.

    Weights are those that the `decode` graph reads, in the dtype it computes in: all of each constant, packed parts
    included, but of a table that is only looked up just the rows looked up. A step reads them once for all its rows, so
    each token bears its share. Of the states, ONNX Runtime reads the slots that are filled (on average over the decode
    steps), the torch executor all of them, and either reads all slots of a state of fixed size, and of caches that drop
    tokens the slots that were filled in the end.

    Args:
        model: The model.
        session: A session of the size that was measured.
        prompt_tokens: Tokens of a row before the first decode step.
        new_tokens: Decode steps.
    """
    filled = min(1.0, (prompt_tokens + (new_tokens + 1) / 2) / session.capacity)
    state_bytes = 0.0
    held = {name: sum(taken) / len(taken) / max(1, states.slots) for name, (states, taken) in session.counted().items()}
    for name in model.executor.entries["decode"].states:
        state = model.executor.states[name]
        row_bytes = session.states[name].untyped_storage().nbytes() / session.batch
        shares = {"capacity": filled if model.report.target == "onnx" else 1.0, **held}
        state_bytes += row_bytes * min((shares[size] for size in state.shape if size in shares), default=1.0)
    return round(weight_bytes_per_step(model.graph, session.batch) / session.batch + state_bytes)


def weight_bytes_per_step(graph: str, batch: int) -> int:
    """Weight bytes that one call of the `decode` entry reads.

    Args:
        graph: Canonical text of a program.
        batch: Rows, each with one token.
    """
    constants = {
        name: (_ITEMSIZE[dtype], [int(size) for size in sizes.split(",") if size])
        for name, dtype, sizes in re.findall(r"^constant @(\S+): (\w+)\[([\d,]*)\]", graph, re.MULTILINE)
    }
    lookups: Counter[str] = Counter()
    whole: set[str] = set()
    columns: dict[str, int] = {}
    shares: dict[str, float] = {}
    for value, type_, operator, arguments in re.findall(
        r"^  (%\d+): (.*?) = ([\w.]+)\((.*)\)$", _entry_text(graph, "decode"), re.MULTILINE
    ):
        columns[value] = int((re.findall(r",(\d+)\]$", type_) or ["1"])[0])
        operands = arguments.split(", ")
        # An input has a row for each token.
        rows = columns.get(operands[_CHOICES_OPERAND[operator]], 1) if operator in _CHOICES_OPERAND else 1
        tables = _TABLE_OPERANDS.get(operator, ())
        grouped, stand_ins, size = _GROUPED_OPERANDS.get(operator, ((), None, 0))
        for position, argument in enumerate(operands):
            for name in re.findall(r"@([^\s,\[\]()]+)", argument):
                if position in tables:
                    lookups[name] += rows
                elif position in grouped:
                    neurons = constants[re.findall(r"@([^\s,\[\]()]+)", operands[3 if size == 9 else 5])[0]][1][0]
                    shares[name] = min(1.0, batch * rows * int(operands[size]) / neurons)
                elif position == stand_ins:
                    lookups[name] += rows + 1
                else:
                    whole.add(name)
    total = 0
    for name, (itemsize, sizes) in constants.items():
        if name in whole:
            total += itemsize * torch.Size(sizes).numel()
        elif name in shares:
            total += round(shares[name] * itemsize * torch.Size(sizes).numel())
        else:
            total += itemsize * torch.Size(sizes[1:]).numel() * min(sizes[0], batch * lookups[name])
    return total


def _entry_text(graph: str, entry: str) -> str:
    """The lines of one entry of a canonical text."""
    _, _, after = graph.partition(f"\nentry {entry}(")
    return after.partition("\nentry ")[0]


def threads_of(executor: Executor, target: str) -> int:
    """Threads within an operator.

    Args:
        executor: What runs the entries; one that was given a number of threads tells it as `threads`.
        target: `onnx` or `torch`.
    """
    chosen = getattr(executor, "threads", None)
    if chosen is not None:
        return int(chosen)
    return torch.get_num_threads() if target == "torch" else physical_cores()


def physical_cores() -> int:
    """Processor cores, hyper-threads counted once: the number of threads that ONNX Runtime takes by itself."""
    siblings = set()
    for cpu in _CPUS.glob("cpu[0-9]*/topology/thread_siblings_list"):
        siblings.add(cpu.read_text())
    return len(siblings) or torch.get_num_threads()

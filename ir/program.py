"""Program: what every pass sees, the code generators read and the runtimes execute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx

from jettison.ir.constants import Constant, Packed
from jettison.ir.placement import Placement

CACHE = "past_key_values."
# Where `decode` returns candidates only: the entries that compute all logits and those of some tokens from what the
# head reads, and their inputs.
HEAD, HEAD_ROWS, HEAD_INPUT, HEAD_TOKENS = "head", "head_rows", "head_input", "head_tokens"
# Input of entries that move tokens, where the layers of a cache have constants of their own: `[1] i64`, which it is of
# those that the retention lists.
LAYER = "layer"


def state_name(layer: int | str, short: str) -> str:
    """Name of a state of a layer: `past_key_values.0.key` for layer 0 and `key`; also of a constant of a cache."""
    return f"{CACHE}{layer}.{short}"


@dataclass(frozen=True)
class State:
    """What persists between calls of a program's entries.

    Attributes:
        name: Unique in its program, e.g. `past_key_values.0.key`.
        shape: Sizes; `"batch"` and `"capacity"` are chosen when a session starts, and so are the slots of a
            `Retention` or `Storage`, which have its name.
        dtype: Element type. The initial value is zeros, which means "empty".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Concrete sizes for `batch` rows and `capacity` slots."""
        return tuple(size if isinstance(size, int) else batch if size == "batch" else capacity for size in self.shape)


@dataclass(frozen=True)
class Retention:
    """Some states that keep only some of the tokens, and the entry that drops the others.

    Attributes:
        name: Of the entry, `evict` or `evict_N`; also the size of the states' slots. It takes the states of one layer,
            `mask` and `token_count [B] i64`, the tokens a row has seen; it returns the states and no output.
        mask: Input of every entry: `[B, T] i64`, ones for the tokens that a row holds in these states, this call
            included. Its rows must be of one length in the entry `name`.
        budget: Tokens that a row holds after the entry has run; None if nothing is dropped and there is no entry: the
            tokens leave for a `Storage` then.
        every: Tokens that may come on top before it runs again; None if it runs after prompts only.
        layers: Layers whose states these are. The entry names the states of the first one, and runs once for each.
    """

    name: str
    mask: str
    budget: int | None
    every: int | None
    layers: tuple[int, ...]

    def name_in(self, layer: int, state: str) -> str:
        """The name of a state that the entry takes, in another layer."""
        return state.replace(f".{self.layers[0]}.", f".{layer}.", 1)

    def slots(self, capacity: int, prompt: int = 0) -> int:
        """Slots for a sequence that grows to `capacity` tokens, of which `prompt` come at once."""
        if self.budget is None:
            return capacity
        after = capacity - prompt if self.every is None else self.every
        return min(capacity, self.budget + after)


@dataclass(frozen=True)
class Storage:
    """States that hold tokens in a compressed form, and the entries that compress and decompress them.

    Tokens of a `Retention` move there and leave their slots; they are attended to all the same.

    Attributes:
        name: Of the entry that compresses, `store` or `store_N`; also the size of the states' slots. It takes these
            states of one layer, `new_key` and `new_value` `[B, Hkv, N, tokens, D]` and `stored_slots [B, N] i64`, where
            they go; it returns the states and no output. Both entries may take `LAYER` as well.
        load: Of the entry that decompresses, `load` or `load_N`. It takes the same states and returns `key` and `value`
            `[B, Hkv, C * tokens, D]`, and the states as they are.
        retention: Name of the retention.
        count: Input of every entry that attends: `[B] i64`, slots that a row has filled.
        tokens: Tokens of a slot.
        keep: Tokens that are not moved, the newest ones.
        residual: Slots that the retention has between two calls: when all of them are taken, tokens move.
        takes_dropped: Whether it takes what the retention's entry left behind the budget instead of the oldest tokens.
    """

    name: str
    load: str
    retention: str
    count: str
    tokens: int
    keep: int
    residual: int
    takes_dropped: bool = False

    def moving(self, held: int) -> int:
        """How many slots are filled when a row holds so many tokens in full precision."""
        return max(0, held - self.keep) // self.tokens


def slot_counts(
    retentions: Iterable[Retention], storages: Iterable[Storage], capacity: int, prompt: int
) -> dict[str, int]:
    """Sizes of states that a session chooses, by name.

    Args:
        retentions: Of the program.
        storages: Of the program.
        capacity: Tokens that a sequence grows to.
        prompt: Tokens that come at once.
    """
    counts = {"capacity": capacity} | {kept.name: kept.slots(capacity, prompt) for kept in retentions}
    for storage in storages:
        held = capacity if storage.takes_dropped else counts[storage.retention]
        counts[storage.name] = storage.moving(held)
        if not storage.takes_dropped:
            counts[storage.retention] = min(held, storage.residual)
    return counts


@dataclass(frozen=True)
class ModelInfo:
    """Facts about the captured model that no graph shows.

    Attributes:
        kind: `decoder` (causal, with a language-model head) or `encoder`.
        name: Class name of the captured module.
        context: Most positions a sequence may have.
        vocab_size: Rows of the token embedding; token ids must be below it.
    """

    kind: str
    name: str
    context: int
    vocab_size: int


@dataclass
class MissRecord:
    """A place where a pass could have fired and did not."""

    node: str
    reason: str


@dataclass
class PassRecord:
    """What one pass did to a program.

    Attributes:
        name: Text id.
        rewrites: Places that it changed.
        misses: Places where it could have fired and did not.
        seconds: Wall time.
        bytes_before: Of the weights, before it.
        bytes_after: Of the weights, after it.
        kl: Mean KL(captured || program) in nats per token after it; None without a check.
        max_error: Of the outputs, against the captured program; None without a check.
        top1_agreement: Share of tokens with the same best next token; None without a check.
        where: Weights that what it made reads.
        plan: Text of the passes that it chose, for a pass that plans.
        predicted_kl: Of the plan.
        measured_kl: Of the plan.
        layers: Figures of layers that were treated differently, by name.
        notes: What else a user should know.
    """

    name: str
    rewrites: int = 0
    misses: list[MissRecord] = field(default_factory=list)
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    kl: float | None = None
    max_error: float | None = None
    top1_agreement: float | None = None
    where: list[str] = field(default_factory=list)
    plan: str | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return asdict(self)


@dataclass
class Program:
    """A model as graphs over shared constants and states.

    Attributes:
        entries: `forward` after capture; `prefill` and `decode` once the KV cache has a policy. Placeholders of a
            graph come in the order constants, states, inputs; `node.meta["constant"]` or `["state"]` names what a
            placeholder stands for, all others are inputs. A graph returns a flat tuple: the model's outputs, then the
            new value of each state it takes.
        constants: By name; shared by all entries.
        packed: Weights held in a compressed format, by the name of the dense weight they replace.
        states: By name.
        retentions: By name.
        storages: By name.
        info: Facts about the model.
        outputs: Names of the model's outputs, e.g. `("logits",)`.
        entry_outputs: Names of what an entry returns before its states, where that is not `outputs`.
        history: One record per pass, in order.
        pipeline: Canonical text of the passes applied so far.
        calibration: Returns inputs of `forward` by name, for batches of text; None where there is none.
        finished: What a pass that was interrupted had done, and where it keeps what it does now; None for nowhere.
        target: What will run it (`torch`, `onnx`, `triton`), for passes that ask what is faster; None if nobody said.
        placement: Which constants are not in memory all the time; None if all are.
    """

    entries: dict[str, fx.GraphModule]
    constants: dict[str, Constant]
    info: ModelInfo
    outputs: tuple[str, ...] = ("logits",)
    packed: dict[str, Packed] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    history: list[PassRecord] = field(default_factory=list)
    pipeline: str = ""
    retentions: dict[str, Retention] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    calibration: Callable[[], Sequence[Mapping[str, torch.Tensor]]] | None = None
    finished: Any = None
    entry_outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    target: str | None = None
    placement: Placement | None = None

    def outputs_of(self, entry: str) -> tuple[str, ...]:
        """Names of what an entry returns before its states."""
        if entry in self.entry_outputs:
            return self.entry_outputs[entry]
        if any(storage.load == entry for storage in self.storages.values()):
            return ("key", "value")
        return () if entry in self.state_entries else self.outputs

    @property
    def state_entries(self) -> tuple[str, ...]:
        """Entries that read no weights: they rewrite the states of one layer."""
        dropping = [name for name, kept in self.retentions.items() if kept.budget is not None]
        storing = [entry for storage in self.storages.values() for entry in (storage.name, storage.load)]
        return (*dropping, *storing)

    def copy(self) -> Program:
        """A program whose graphs can be edited without touching this one; constants are shared."""
        entries = {name: copy_graph(entry) for name, entry in self.entries.items()}
        return Program(
            entries, dict(self.constants), self.info, self.outputs, dict(self.packed), dict(self.states),
            list(self.history), self.pipeline, dict(self.retentions), dict(self.storages), self.calibration,
            self.finished, dict(self.entry_outputs), self.target, self.placement,
        )  # fmt: skip

    def used_constants(self) -> dict[str, Constant]:
        """Constants that some entry reads, by name."""
        names = {name for entry in self.entries.values() for name in constant_placeholders(entry)}
        return {name: constant for name, constant in self.constants.items() if name in names}

    def weight_bytes(self) -> int:
        """Stored bytes of every constant that some entry reads."""
        return sum(constant.stored_bytes for constant in self.used_constants().values())

    def state_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of all states of a session whose rows are `capacity` tokens, all of a prompt where that matters."""
        counts = slot_counts(self.retentions.values(), self.storages.values(), capacity, capacity)
        total = 0
        for state in self.states.values():
            slots = next((counts[size] for size in state.shape if size in counts), capacity)
            total += torch.Size(state.sizes(batch, slots)).numel() * state.dtype.itemsize
        return total

    def __str__(self) -> str:
        from jettison.ir.text import program_text

        return program_text(self)


def copy_graph(entry: fx.GraphModule) -> fx.GraphModule:
    """A graph with its own nodes and the same metadata objects."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in entry.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
        mapping[node].meta = dict(node.meta)
    return fx.GraphModule(torch.nn.Module(), graph)


def placeholders(entry: fx.GraphModule) -> Iterator[fx.Node]:
    """Placeholders of a graph, in order."""
    return (node for node in entry.graph.nodes if node.op == "placeholder")


def constant_placeholders(entry: fx.GraphModule) -> dict[str, fx.Node]:
    """Placeholder of each constant a graph takes, by constant name."""
    return {node.meta["constant"]: node for node in placeholders(entry) if "constant" in node.meta}


def constant_reads(program: Program, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every node that reads a constant, in any entry, and the placeholder by which it does."""
    for entry in program.entries.values():
        placeholder = constant_placeholders(entry).get(name)
        for user in placeholder.users if placeholder is not None else ():
            yield user, placeholder


def state_placeholders(entry: fx.GraphModule) -> dict[str, fx.Node]:
    """Placeholder of each state a graph takes, by state name."""
    return {node.meta["state"]: node for node in placeholders(entry) if "state" in node.meta}


def input_placeholders(entry: fx.GraphModule) -> dict[str, fx.Node]:
    """Placeholder of each run-time input of a graph, by name."""
    return {node.name: node for node in placeholders(entry) if "constant" not in node.meta and "state" not in node.meta}


def output_node(entry: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    return next(node for node in reversed(entry.graph.nodes) if node.op == "output")


def fake_mode_of(entry: fx.GraphModule) -> Any:
    """The FakeTensorMode under which a graph's metadata lives."""
    for node in placeholders(entry):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise ValueError("graph has no placeholder with metadata")

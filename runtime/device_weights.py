"""Weights as the kernels of `codegen/triton` read them, each held once: on the device, or elsewhere and streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from jettison.ir.errors import BugError
from jettison.ir.packed_parts import BitmapParts, LutParts, PackedParts
from jettison.ir.program import Program
from jettison.runtime.device_store import DeviceStore
from jettison.runtime.device_stream import DeviceStream
from jettison.runtime.kernel_weights import Weights, bitmap, stacked
from jettison.runtime.segment_file import SegmentFile

CPU = torch.device("cpu")


class DeviceWeights:
    """Weights on the device, each held once.

    Args:
        program: Whose; weights that its placement has on the host or on disk are streamed where linears read them.
        device: Where.
        store: With those on disk; None where there are none.

    Attributes:
        nbytes: Bytes held on the device so far, the ring of streamed weights not included.
        stream: Of the weights elsewhere, or None.
    """

    def __init__(self, program: Program, device: torch.device, store: DeviceStore | None = None) -> None:
        self.program, self.device = program, device
        self.nbytes = 0
        self._tensors: dict[tuple[object, ...], list[Tensor]] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._store = store
        file = None if store is None else SegmentFile(store.source, store.table.segments)
        placement = program.placement
        is_streamed = placement is not None and not {"host", "disk"}.isdisjoint(placement.tiers.values())
        self.stream = (
            DeviceStream(device, placement.ring_bytes, file=file) if placement is not None and is_streamed else None
        )

    def step(self) -> AbstractContextManager[None]:
        """Around everything that a step launches."""
        return nullcontext() if self.stream is None else self.stream.step()

    def of_linear(self, weights: Weights, dtype: torch.dtype) -> Callable[[], AbstractContextManager[list[Tensor]]]:
        """Weights as `stacked`, to be asked for at each use, and streamed if they are elsewhere.

        Args:
            weights: See `stacked`.
            dtype: Likewise.

        Returns:
            A context: within it the tensors are on the device.
        """
        key, stream = (*weights, dtype), self.stream
        # What something else reads too is on the device anyway.
        is_held = key in self._tensors or tuple(weights) in self._tensors
        tiers = set(map(self._tier, weights))
        if stream is None or is_held or tiers not in ({"host"}, {"disk"}):
            held = nullcontext(self.stacked(weights, dtype))
            return lambda: held
        if key not in self._numbers:
            self._numbers[key] = self._add(stream, weights, dtype)
        number = self._numbers[key]

        @contextmanager
        def streamed() -> Iterator[list[Tensor]]:
            yield stream.take(number)
            stream.release(number)

        return streamed

    def _tier(self, weight: PackedParts | LutParts | str) -> str:
        placement = self.program.placement
        return "device" if placement is None else placement.of(weight if isinstance(weight, str) else weight.codes)

    def _add(self, stream: DeviceStream, weights: Weights, dtype: torch.dtype) -> int:
        if self._tier(weights[0]) == "host":
            return stream.add(stacked(self.program, weights, dtype, CPU))
        if self._store is None:
            raise BugError("[stream] weights are on disk, and no store was given")
        return stream.add_stored(self._store.image(self.program, weights, dtype))

    def constant(self, name: str) -> Tensor:
        """A constant as it is."""
        return self._once((name,), lambda: [self.program.constants[name].value().to(self.device).contiguous()])[0]

    def stacked(self, weights: Weights, dtype: torch.dtype) -> list[Tensor]:
        """Weights one below the other: what kernels take for them.

        Args:
            weights: All packed in one form, or all dense.
            dtype: Of scales and offsets.
        """
        if len(weights) == 1 and isinstance(weights[0], str):
            return [self.constant(weights[0])]
        return self._once((*weights, dtype), lambda: stacked(self.program, weights, dtype, self.device))

    def bitmap(self, parts: BitmapParts) -> list[Tensor]:
        """A bitmap weight as its kernels take it.

        Raises:
            ArtifactError: The bitmap and the values do not belong together.
        """
        return self._once((parts,), lambda: bitmap(self.program, parts, self.device))

    def joined(self, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """Biases one behind the other; nothing for none."""
        if not names:
            return []
        make = lambda: [torch.cat([self.program.constants[name].value().to(self.device, dtype) for name in names])]  # noqa: E731
        return self._once(("bias", *names), make)

    def _once(self, key: tuple[object, ...], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        if key not in self._tensors:
            self._tensors[key] = made = make()
            known = {tensor.data_ptr() for other, held in self._tensors.items() if other != key for tensor in held}
            self.nbytes += sum(tensor.nbytes for tensor in made if tensor.data_ptr() not in known)
        return self._tensors[key]

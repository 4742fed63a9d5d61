"""Weights as the kernels of `codegen/triton` read them, each held once: on the device, or on the host and streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from jettison.codegen.triton.word_layout import WordWeight, to_words
from jettison.ir.ops.lut_linear import group_scales
from jettison.ir.packed_parts import BitmapParts, LutParts, PackedParts
from jettison.ir.program import Program
from jettison.runtime.bitmap_weight import row_begins
from jettison.runtime.device_stream import DeviceStream

CPU = torch.device("cpu")


class DeviceWeights:
    """Weights on the device, each held once.

    Args:
        program: Whose; weights that its placement has on the host are streamed where linears read them.
        device: Where.

    Attributes:
        nbytes: Bytes held on the device so far, the ring of streamed weights not included.
        stream: Of the weights on the host, or None.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.nbytes = 0
        self._tensors: dict[tuple[object, ...], list[Tensor]] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        placement = program.placement
        is_streamed = placement is not None and "host" in placement.tiers.values()
        self.stream = DeviceStream(device, placement.ring_bytes) if placement is not None and is_streamed else None

    def step(self) -> AbstractContextManager[None]:
        """Around everything that a step launches."""
        return nullcontext() if self.stream is None else self.stream.step()

    def of_linear(
        self, weights: Sequence[PackedParts | LutParts | str], dtype: torch.dtype
    ) -> Callable[[], AbstractContextManager[list[Tensor]]]:
        """Weights as `stacked`, to be asked for at each use, and streamed if they are on the host.

        Args:
            weights: See `stacked`.
            dtype: Likewise.

        Returns:
            A context: within it the tensors are on the device.
        """
        key, stream = (*weights, dtype), self.stream
        # What something else reads too is on the device anyway.
        is_held = key in self._tensors or tuple(weights) in self._tensors
        if stream is None or is_held or not all(map(self._is_on_host, weights)):
            held = nullcontext(self.stacked(weights, dtype))
            return lambda: held
        if key not in self._numbers:
            self._numbers[key] = stream.add(self._stack(weights, dtype, CPU))
        number = self._numbers[key]

        @contextmanager
        def streamed() -> Iterator[list[Tensor]]:
            yield stream.take(number)
            stream.release(number)

        return streamed

    def _is_on_host(self, weight: PackedParts | LutParts | str) -> bool:
        assert self.program.placement is not None, "there is a stream"
        return self.program.placement.of(weight if isinstance(weight, str) else weight.codes) == "host"

    def constant(self, name: str) -> Tensor:
        """A constant as it is."""
        return self._once((name,), lambda: [self.program.constants[name].value().to(self.device).contiguous()])[0]

    def stacked(self, weights: Sequence[PackedParts | LutParts | str], dtype: torch.dtype) -> list[Tensor]:
        """Weights one below the other: what kernels take for them.

        Args:
            weights: All packed in one form, or all dense.
            dtype: Of scales and offsets.
        """
        if len(weights) == 1 and isinstance(weights[0], str):
            return [self.constant(weights[0])]
        return self._once((*weights, dtype), lambda: self._stack(weights, dtype, self.device))

    def _stack(
        self, weights: Sequence[PackedParts | LutParts | str], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        dense = [each for each in weights if isinstance(each, str)]
        if dense:
            return [torch.cat([self.program.constants[name].value().to(device) for name in dense])]
        own = [self._words(each, dtype, device) for each in weights if not isinstance(each, str)]
        if len(own) == 1:
            return own[0].tensors
        # The table is the same for all of them.
        rows = [[each for each in weight.tensors if each is not weight.table] for weight in own]
        table = [] if own[0].table is None else [own[0].table]
        return [*(torch.cat(parts) for parts in zip(*rows, strict=True)), *table]

    def _words(self, parts: PackedParts | LutParts, dtype: torch.dtype, device: torch.device) -> WordWeight:
        if isinstance(parts, LutParts):
            return self._looked_up(parts, dtype, device)
        codes, scales, zeros = (
            None if name is None else self.program.constants[name].value()
            for name in (parts.codes, parts.scales, parts.zeros)
        )
        assert codes is not None, "only zero points may be missing"
        assert scales is not None, "only zero points may be missing"
        return to_words(codes, scales, zeros, parts.bits, parts.group, dtype, device)

    def _looked_up(self, parts: LutParts, dtype: torch.dtype, device: torch.device) -> WordWeight:
        codes, lut, scales, steps = (
            None if name is None else self.program.constants[name].value()
            for name in (parts.codes, parts.lut, parts.scales, parts.steps)
        )
        found = group_scales(scales, steps)
        assert codes is not None, "only steps may be missing"
        assert found is not None, "only steps may be missing"
        assert lut is not None, "only steps may be missing"
        return to_words(codes, found, None, parts.bits, parts.group, dtype, device, lut.flatten())

    def bitmap(self, parts: BitmapParts) -> list[Tensor]:
        """A bitmap weight, and where in its values each row begins: what kernels take for it.

        Raises:
            ArtifactError: The bitmap and the values do not belong together.
        """
        return self._once((parts,), lambda: self._bitmap(parts))

    def _bitmap(self, parts: BitmapParts) -> list[Tensor]:
        bitmap, starts, values = (
            self.program.constants[name].value() for name in (parts.bitmap, parts.starts, parts.values)
        )
        begins = row_begins(bitmap, starts, values, parts.bits)
        scales = [] if parts.scales is None else [self.program.constants[parts.scales].value()]
        held = [bitmap.contiguous().view(torch.int32), begins[:-1].clone(), values, *scales]
        return [each.to(self.device).contiguous() for each in held]

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

"""The file that a GPU is given weights from: what each launch reads, as it lies in the ring on the device.

An *image* is the weights of one launch in the layout of its kernel, cut into segments that are read at once and copied
on as they come. Images lie in the order in which a step launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, fx

from jettison.codegen.triton.emit import EmittedProgram
from jettison.codegen.triton.steps import LinearStep
from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.ir.packed_parts import LutParts
from jettison.ir.program import Program, constant_reads
from jettison.ir.text import dtype_text
from jettison.runtime.kernel_weights import Weights, stacked, stacked_shapes
from jettison.runtime.segment_file_writer import (
    Part,
    Segment,
    SegmentFileWriter,
    bytes_of,
    part_from_dict,
    segments_from_dict,
    written_to_temporary_file,
)
from jettison.runtime.streamed_reads import constants_on_disk

# Where tensors begin in an image; what the allocator of PyTorch gives on a GPU, and kernels may rely on.
ALIGNMENT = 512
# Of a segment: a copy of so much to the device takes ten times as long as to begin it.
SEGMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class Image:
    """The weights of a launch, one part behind the other.

    Attributes:
        parts: What kernels take; offsets count from the start of the image.
        segments: Numbers of those that hold it, none while it is not in a file.
    """

    parts: tuple[Part, ...]
    segments: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """With what aligns the parts."""
        return sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in self.parts)


def image_of(tensors: Sequence[Tensor]) -> Image:
    """How tensors lie in an image."""
    parts, offset = [], 0
    for tensor in tensors:
        parts.append(Part(tensor.dtype, tuple(tensor.shape), offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Image(tuple(parts))


@dataclass(frozen=True)
class DeviceTable:
    """What is where in a file.

    Attributes:
        segments: In the order of the file.
        images: By `image_name`.
    """

    segments: tuple[Segment, ...]
    images: dict[str, Image]

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return max((segment.offset + segment.padded for segment in self.segments), default=0)


@dataclass(frozen=True)
class DeviceStore:
    """A file on this machine.

    Attributes:
        table: What is where.
        source: Its path, or the descriptor of a temporary file, which whoever opens it takes over.
    """

    table: DeviceTable
    source: Path | int

    def image(self, program: Program, weights: Weights, dtype: torch.dtype) -> Image:
        """Where the weights of a launch are.

        Args:
            program: Whose.
            weights: Which.
            dtype: Of scales and offsets.

        Raises:
            ArtifactError: They are not there, or others.
        """
        name = image_name(weights, dtype)
        found = self.table.images.get(name)
        wanted = image_of(stacked_shapes(program, weights, dtype)).parts
        if found is None or found.parts != wanted:
            shown = self.source if isinstance(self.source, Path) else "the temporary file of streamed weights"
            raise ArtifactError(
                f"[{shown}] does not hold {name} as the program reads it. The artifact is damaged: copy it again, or "
                "write it again with `jettison optimize`."
            )
        return found


def image_name(weights: Weights, dtype: torch.dtype) -> str:
    """What an image is found by.

    Args:
        weights: Of a launch.
        dtype: Of scales and offsets.
    """
    names = (each if isinstance(each, str) else each.codes for each in weights)
    return f"{' '.join(names)} {dtype_text(dtype)}"


def write_device_store(
    program: Program, emitted: EmittedProgram, file: IO[bytes], on_bytes: Callable[[int], object] | None = None
) -> DeviceTable:
    """Write the weights of a program that are placed on disk, an image at a time.

    Args:
        program: With a `placement`.
        emitted: What `emit` made of it.
        file: Where to write; empty.
        on_bytes: Called with the number of bytes after each write.

    Returns:
        What is where.

    Raises:
        UnsupportedError: A constant is on disk that is not streamed to a GPU.
        OSError: The file cannot be written.
    """
    writer = SegmentFileWriter(file, on_bytes)
    images: dict[str, Image] = {}
    for weights, dtype in _images_on_disk(program, emitted):
        tensors = stacked(program, weights, dtype, torch.device("cpu"))
        first = len(writer.segments)
        for tensor in tensors:
            writer.fill(bytes_of(tensor), SEGMENT_BYTES)
            writer.fill(memoryview(bytes(-tensor.nbytes % ALIGNMENT)), SEGMENT_BYTES)
        writer.close()
        segments = tuple(range(first, len(writer.segments)))
        images[image_name(weights, dtype)] = Image(image_of(tensors).parts, segments)
    return DeviceTable(tuple(writer.segments), images)


def temporary_device_store(program: Program, emitted: EmittedProgram) -> DeviceStore:
    """Write the store of a program that was not saved to a file without a name, which goes with its descriptor.

    Args:
        program: With a `placement`.
        emitted: What `emit` made of it.

    Raises:
        UnsupportedError: As `write_device_store`.
        ArtifactError: The temporary folder has no room.
    """
    needed = sum(program.constants[name].nbytes for name in constants_on_disk(program))

    def write(file: IO[bytes]) -> tuple[DeviceTable, int]:
        table = write_device_store(program, emitted, file)
        return table, table.file_bytes

    return DeviceStore(*written_to_temporary_file(needed, write))


def _images_on_disk(program: Program, emitted: EmittedProgram) -> list[tuple[Weights, torch.dtype]]:
    """What linears read, each once, in the order of a step.

    Raises:
        UnsupportedError: A constant is on disk that something else reads, or that is read with one that is not.
    """
    on_disk = constants_on_disk(program)
    streamed: dict[str, LinearStep] = {}
    nodes: set[fx.Node] = set()
    covered: set[str] = set()
    # A decode step is what is repeated.
    for _, steps in sorted(emitted.steps.items(), key=lambda item: item[0] != "decode"):
        for step in steps:
            names = _constants(step.weights) if isinstance(step, LinearStep) else ()
            if isinstance(step, LinearStep) and on_disk.issuperset(names):
                streamed.setdefault(image_name(step.weights, step.form.dtype), step)
                nodes.update(step.nodes)
                covered.update(names)
    read_elsewhere = {name for name in on_disk for user, _ in constant_reads(program, name) if user not in nodes}
    left = sorted(on_disk - covered | read_elsewhere)
    if left:
        others = f" and {len(left) - 1} others are" if len(left) > 1 else " is"
        raise UnsupportedError(
            f"[placement] {left[0]}{others} on disk; only weights of linears that kernels multiply can be streamed to "
            "a GPU, with all of their parts and all that one launch reads. Leave the tier of the others out, so that "
            "they stay on the device."
        )
    return [(step.weights, step.form.dtype) for step in streamed.values()]


def _constants(weights: Weights) -> tuple[str, ...]:
    """Names of all constants that weights are made of."""
    found: list[str | None] = []
    for each in weights:
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, LutParts):
            found += [each.codes, each.lut, each.scales, each.steps]
        else:
            found += [each.codes, each.scales, each.zeros]
    return tuple(name for name in found if name is not None)


def device_table_as_dict(table: DeviceTable) -> dict[str, Any]:
    """What `device_table_from_dict` reads, as JSON-ready values."""
    images = {
        name: {"parts": [part.as_dict() for part in image.parts], "segments": list(image.segments)}
        for name, image in table.images.items()
    }
    return {
        "format": "jettison device stream", "version": 1, "segments": [asdict(each) for each in table.segments],
        "images": images,
    }  # fmt: skip


def device_table_from_dict(document: Any, path: Path) -> DeviceTable:
    """Read what a file says of itself; trusts nothing in it.

    Args:
        document: Of JSON.
        path: Of the file, for messages.

    Raises:
        ArtifactError: It is damaged, or written by a newer version.
    """
    try:
        if document["format"] != "jettison device stream" or document["version"] != 1:
            raise ArtifactError(
                f"[{path}] found version {document['version']!r} of {document['format']!r}; needed version 1 of "
                "'jettison device stream'. Upgrade with `pip install -U jettison`."
            )
        segments = segments_from_dict(document["segments"])
        images = {}
        for name, value in document["images"].items():
            numbers = tuple(int(number) for number in value["segments"])
            if min(numbers, default=0) < 0:
                raise ValueError(f"segment {min(numbers)}")
            size = sum(segments[number].bytes for number in numbers)
            images[str(name)] = image = Image(tuple(part_from_dict(part, size) for part in value["parts"]), numbers)
            if image.nbytes != size or any(part.offset % ALIGNMENT for part in image.parts):
                raise ValueError(f"{size} bytes of segments for an image of {image.nbytes}")
        return DeviceTable(segments, images)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"[{path}] found {type(error).__name__}: {str(error)[:200]}; needed the table of a weight store. The "
            "artifact is damaged: copy it again, or write it again with `jettison optimize`."
        ) from error

"""Machine code that was compiled ahead, handed to Triton, which then does not compile.

Triton looks for what it needs in its own cache, under a hash of the source, the types, the options, the GPU and its own
version. So what is stored is put there, under the hash that it was stored with: a Triton that would compile something
else asks for another hash, finds nothing, and compiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from jettison.ir.errors import ArtifactError


@dataclass(frozen=True)
class StoredKernel:
    """Files of a kernel for one architecture.

    Attributes:
        name: Of the kernel.
        cubin: Its machine code.
        metadata: What Triton noted beside it.
    """

    name: str
    cubin: Path
    metadata: Path


def architecture() -> str | None:
    """Of the GPU here, such as `sm_90`; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def restore(stored: Iterable[StoredKernel]) -> str | None:
    """Put kernels into Triton's cache.

    Args:
        stored: For the GPU that is here.

    Returns:
        Why they are not used, or None.

    Raises:
        ArtifactError: A file is not what Triton wrote.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    for kernel in stored:
        text = kernel.metadata.read_text()
        try:
            noted = json.loads(text)
            made_with, key, name = noted["triton_version"], str(noted["hash"]), noted["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"[load] {kernel.metadata}: not what Triton notes beside machine code.") from error
        if name != kernel.name or not (len(key) == 64 and all(digit in "0123456789abcdef" for digit in key)):
            raise ArtifactError(f"[load] {kernel.metadata}: notes of another kernel than {kernel.name}.")
        if made_with != triton.__version__:
            return f"they were compiled with Triton {made_with}, and {triton.__version__} is installed"
        cache = get_cache_manager(key)
        # Triton cuts names so that they fit into a folder.
        short = name[:150]
        files = {
            f"{short}.cubin": cache.put(kernel.cubin.read_bytes(), f"{short}.cubin", binary=True),
            f"{short}.json": cache.put(text, f"{short}.json", binary=False),
        }
        cache.put_group(f"{short}.json", files)
    return None

"""Compiles LLVM IR in this process and calls it; calls let go of the interpreter, so that threads run side by side."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

from jettison.ir.allocator import forget_library

_LOCK = threading.Lock()
# Modules that were compiled live as long as the process: pointers to their code are handed out.
_ENGINES: list[Any] = []


@functools.cache
def host_features() -> frozenset[str]:
    """What this processor can do, by the names of LLVM."""
    from llvmlite import binding

    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


@functools.cache
def is_available() -> bool:
    """Whether LLVM can compile for this machine."""
    try:
        compile_source("define void @nothing() { ret void }")("nothing", 0)()
    except (ImportError, OSError, RuntimeError):
        return False
    return True


@functools.cache
def host_name() -> str:
    """The name of this processor in LLVM."""
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


def compile_source(source: str, features: frozenset[str] | None = None) -> Callable[[str, int], Any]:
    """Compile a module for this machine.

    Args:
        source: LLVM IR.
        features: Those that instructions are chosen from; all of this processor unless given.

    Returns:
        From the name of a function without a result and the number of its arguments, which are all pointers or i64, the
        function: it takes integers.
    """
    from llvmlite import binding

    with _LOCK:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        module = binding.parse_assembly(source)
        module.verify()
        chosen = host_features() if features is None else features
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=host_name() if features is None else "",
            features=",".join(f"+{name}" for name in sorted(chosen)),
            opt=3,
        )
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(module, builder)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _ENGINES.append((engine, machine))
        # Most of what it holds is its own code, which is read again for the next module.
        forget_library("llvmlite")

    def function(name: str, arguments: int) -> Any:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_size_t] * arguments)(engine.get_function_address(name))

    return function

"""Which operators may stand in a stored program, by what name, and whether a call fits one.

The allow-list is what makes `program.json` data: loading one can compute shapes, and nothing else.
"""

from __future__ import annotations

import keyword
import operator
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from jettison.ir import ops as _register_ops  # noqa: F401

# Functions of Python that stand in graphs, on sizes: name to function and number of operands.
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    f"{library}.{name}": (getattr(module, name), int(count))
    for library, module, arities in (
        ("operator", operator, "getitem=2 add=2 sub=2 mul=2 floordiv=2 truediv=2 mod=2 pow=2 neg=1 not_=1"),
        ("operator", operator, "eq=2 ne=2 lt=2 le=2 gt=2 ge=2 and_=2 or_=2"),
        ("torch", torch, "sym_max=2 sym_min=2 sym_int=1 sym_float=1 sym_not=1 sym_ite=3"),
    )
    for name, count in (arity.split("=") for arity in arities.split())
}
FUNCTION_NAMES = {function: name for name, (function, _) in FUNCTIONS.items()}
_LARGEST_EXPONENT = 64  # numbers must not grow without bound while a file is loaded

# ATen operators are functions of tensors without effects, except these: they touch files, or read memory through
# pointers that a tensor holds. Of the private ones, only what torch.export and make_fx leave in the graphs of models.
_REFUSED_ATEN = re.compile(
    r"(from_file|data|set|lift|get_gradients)$|(fbgemm|quantized|empty_quantized|mkldnn|miopen|cudnn|mps|sparse|to_mkldnn|to_sparse)"
)
_PRIVATE_ATEN = re.compile(
    r"_(adaptive_avg_pool2d|assert_async|assert_scalar|assert_tensor_metadata|conj|convolution|functional_assert_async"
    r"|functional_assert_scalar|functional_sym_constrain_range|functional_sym_constrain_range_for_size|grouped_mm|int_mm"
    r"|local_scalar_dense|log_softmax|make_dep_token|native_batch_norm_legit_no_training|safe_softmax"
    r"|scaled_dot_product_attention_math|scaled_dot_product_flash_attention_for_cpu|shape_as_tensor|softmax|to_copy"
    r"|unsafe_index|unsafe_view|weight_norm|_and__|_or__|_xor__|_lshift__|_rshift__)$"
)
_STRANGE_ARGUMENT = re.compile(r"Storage|Stream|__torch__|Dict|Future")


def refused_operator(target: Any) -> str | None:
    """Why a target may not stand in a file, or None if it may."""
    if not isinstance(target, torch._ops.OpOverload):
        is_known = isinstance(target, types.FunctionType | types.BuiltinFunctionType) and target in FUNCTION_NAMES
        return None if is_known else "neither an operator of ATen or jettison nor a known function of sizes"
    schema = target._schema
    namespace, name = schema.name.split("::")
    if namespace not in ("aten", "jettison") or not torch._C._dispatch_has_kernel(target.name()):
        return f"an operator of {'TorchScript' if namespace == 'aten' else namespace}"
    if schema.is_mutable:
        return "an operator that writes to its input"
    is_refused = _REFUSED_ATEN.match(name) or (name.startswith("_") and not _PRIVATE_ATEN.match(name))
    if namespace == "aten" and (is_refused or any(_STRANGE_ARGUMENT.search(str(a.type)) for a in schema.arguments)):
        return "an operator that models do not need"
    return None


def find_target(name: str) -> Any:
    """The function or operator of a name, which may not be allowed; None if there is none."""
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    # A keyword would not compile where the graph becomes Python code (`aten.random.from`).
    if not re.fullmatch(r"(aten|jettison)\.\w+\.\w+", name) or any(map(keyword.iskeyword, name.split("."))):
        return None
    namespace, packet, overload = name.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return target if isinstance(target, torch._ops.OpOverload) and str(target) == name else None


def misfit(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the number or the names of arguments, or None."""
    if target in FUNCTION_NAMES:
        count = FUNCTIONS[FUNCTION_NAMES[target]][1]
        if kwargs or len(args) != count:
            return f"{len(args)} arguments and {len(kwargs)} named ones, where it takes {count}"
        fits = all(isinstance(operand, fx.Node | int | float) for operand in args)
        if target is operator.getitem:
            fits = isinstance(args[0], fx.Node) and isinstance(args[1], fx.Node | int)
        elif target is operator.pow and fits:
            fits = isinstance(args[1], int | float) and abs(args[1]) <= _LARGEST_EXPONENT
        return None if fits else "operands that are no sizes"
    declared = target._schema.arguments
    positional = [argument.name for argument in declared if not argument.kwarg_only]
    given = [*positional[: len(args)], *kwargs]
    missing = [a.name for a in declared if a.name not in given and not a.has_default_value()]
    strange = [key for key in kwargs if given.count(key) > 1 or all(key != a.name for a in declared)]
    if len(args) > len(positional):
        return f"{len(args)} positional arguments, where it takes {len(positional)}"
    wrong = f"the arguments {', '.join(map(repr, missing or strange))} {'missing' if missing else 'unknown'}"
    return wrong if missing or strange else None

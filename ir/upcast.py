"""Run an eager model in a wider dtype than its weights are stored in, converting each weight only while it is used.

This is how a memory-mapped bf16 checkpoint is evaluated in fp32 (the reference of every quality figure) without
holding it in memory a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from jettison.ir.constants import Constant
from jettison.ir.interpret import embedding_of, linear_by_rows


class UpcastWeights(TorchFunctionMode):
    """Inside this mode, parameters and buffers of `model` with another floating dtype act as if they had `dtype`.

    Args:
        model: Its floating-point parameters and narrow buffers are converted on use; buffers in fp32 stay as they are.
        dtype: The dtype to compute in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.dtype != torch.float32)]
        self._narrow = {id(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.dtype != dtype}

    def _is_narrow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._narrow

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Convert narrow tensors among the arguments; large linear weights and embeddings only row by row."""
        kwargs = kwargs or {}
        if func == Tensor.dtype.__get__ and self._is_narrow(args[0]):
            return self.dtype  # models cast activations to the dtype of a weight
        if getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel", "is_floating_point"):
            read = func(*args, **kwargs)  # attribute reads (shape, device) must not copy a weight
            return read.to(self.dtype) if isinstance(read, Tensor) and self._is_narrow(args[0]) else read  # weight.T
        if func is F.linear and len(args) >= 2 and self._is_narrow(args[1]):
            bias: Any = args[2] if len(args) > 2 else kwargs.get("bias")
            bias = bias.to(self.dtype) if self._is_narrow(bias) else bias
            return linear_by_rows(args[0], Constant("weight", args[1].detach(), self.dtype), bias)
        if func is F.embedding and len(args) >= 2 and self._is_narrow(args[1]):
            return embedding_of(Constant("weight", args[1].detach(), self.dtype), args[0])
        if func is Tensor.__getitem__ and self._is_narrow(args[0]):
            return func(*args, **kwargs).to(self.dtype)
        args, kwargs = tree_map_only(
            Tensor, lambda value: value.to(self.dtype) if self._is_narrow(value) else value, (args, kwargs)
        )
        return func(*args, **kwargs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode again.

    Args:
        module: Possibly in training, with some submodules frozen in eval mode.
    """
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, is_training in modes.items():
            each.training = is_training

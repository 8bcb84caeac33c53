"""Seeing what a forward pass calls: modules and plain functions alike, by torch's function mode and not by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTION_CALLS = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
)
LINEAR_CALLS = frozenset({F.linear})
RELU_CALLS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6})
# Piecewise linear with its kink at zero, so that the sign of the input is the code; and hardtanh from zero (ReLU6).
LEAKY_CALLS = frozenset({F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, F.rrelu})
BATCH_NORM_CALLS = frozenset({F.batch_norm, torch.batch_norm})
NORM_CALLS = BATCH_NORM_CALLS | {
    F.instance_norm, F.group_norm, F.layer_norm, torch.instance_norm, torch.group_norm, torch.layer_norm
}  # fmt: skip
DROPOUT_CALLS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)
EMBEDDING_CALLS = frozenset({F.embedding})
POOLING_CALLS = frozenset({F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d})
MEAN_CALLS = frozenset({torch.mean, torch.Tensor.mean})
ZERO_CALLS = frozenset({torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__})

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Watch(TorchFunctionMode):
    """Inside `with`, calls `handle(function, args, kwargs)` in place of every torch function.

    Calls that a Python function of torch makes by itself (attention's projections, for one) are not seen one by one.
    """

    def __init__(self, handle: Handler):
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.handle(func, args, kwargs or {})


def argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any = None) -> Any:
    """An argument given by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def is_relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is ReLU, ReLU6, LeakyReLU, PReLU or RReLU."""
    if func in RELU_CALLS or func in LEAKY_CALLS:
        return True
    return func in (F.hardtanh, F.hardtanh_) and argument("min_val", 1, args, kwargs, -1.0) == 0


def changes_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument: `relu_`, `+=`, item assignment, `inplace=True`."""
    name = getattr(func, "__name__", "")
    if name == "__setitem__" or kwargs.get("inplace") is True:
        return True
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
    return name.endswith("_") or (name in ("relu", "leaky_relu", "relu6", "elu", "hardtanh") and True in args[1:])


def without_norms(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A handler that turns every normalisation and dropout into the identity."""
    skipped = func in NORM_CALLS or func in DROPOUT_CALLS
    return argument("input", 0, args, kwargs) if skipped else func(*args, **kwargs)


def reachable(output: torch.Tensor) -> set[Any]:
    """The autograd nodes that a backward pass from `output` visits."""
    found: set[Any] = set()
    waiting = [output.grad_fn] if output.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found

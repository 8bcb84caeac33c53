"""torch's normalisations with the activation behind them, and a residual between the two, as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import by_operator, check_dense, recomputing, resolve
from kernels.handwritten import functions
from search_spaces.common.errors import UserError


def activation_of(module: Any) -> tuple[str, float | None] | None:
    """The handwritten kernels' name and setting for an activation module; None for one they lack."""
    kind = type(module)
    if kind is nn.GELU:
        return ("gelu" if module.approximate == "none" else "gelu-tanh"), None
    if kind is nn.LeakyReLU:
        return "leaky-relu", float(module.negative_slope)
    if kind is nn.ELU:
        return "elu", float(module.alpha)
    plain = {
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.Sigmoid: "sigmoid",
        nn.Tanh: "tanh",
        nn.SiLU: "silu",
        nn.Hardswish: "hardswish",
        nn.Mish: "mish",
    }
    return (plain[kind], None) if kind in plain else None


class FusedNorm(nn.Module):
    """What the classes below have in common: `act(norm(x) + residual)`.

    Each is a subclass of torch's module, with its parameters, buffers and state dict, and runs that one's own forward
    where no kernel runs, during export and for float64. `act` is the activation module. Under autocast the type of x
    stays, where torch's GroupNorm, LayerNorm and RMSNorm go to float32 on CUDA. Batch statistics are this process's.
    """

    act: nn.Module
    backend: str

    @classmethod
    def of(cls, norm: nn.Module, act: nn.Module, backend: str = "auto", *, rewritten: bool = False) -> FusedNorm:
        """The fused form of a normalisation and its activation. It shares all tensors, hooks and settings of `norm`.

        rewritten: part of a rewritten graph, and cannot be taken apart on its own.
        """
        fused = cls.__new__(cls)
        fused.__dict__.update(norm.__dict__, backend=resolve(backend), _replaced=(norm,), rewritten=rewritten)
        fused.__dict__["_modules"] = {"act": act}  # the normalisation has no modules of its own
        return fused

    def unfused(self) -> nn.Module:
        """The normalisation that this one was made of, in its present state.

        Errors: UserError in a rewritten graph, whose calls of the activation are gone.
        """
        if self.__dict__["rewritten"]:
            raise UserError("a copy of a rewritten model", "the model that `fuse` returned, to undo it")
        (norm,) = self.__dict__["_replaced"]
        mine = ("backend", "_replaced", "rewritten", "_modules")
        norm.__dict__.update({k: v for k, v in self.__dict__.items() if k not in mine})
        return norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_dense(x)
        fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        # The default eps of RMSNorm depends on the type.
        plain = getattr(self, "eps", None) is not None or x.dtype == torch.float32
        if fits and plain and x.numel() and by_operator(x, self.backend):
            name, alpha = activation_of(self.act) or ("identity", None)
            return self._fused(x, {"residual": residual, "act": name, "alpha": alpha})
        y = super().forward(x)  # type: ignore[misc]
        return self.act(y if residual is None else y + residual)

    def _fused(self, x: Tensor, behind: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


def _batch_norm(norm: Any, x: Tensor, behind: dict[str, Any]) -> Tensor:
    norm._check_input_dim(x)
    mean, var = norm.running_mean, norm.running_var
    if norm.training and recomputing():
        mean = var = None  # updated before
    elif norm.training and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
    settings: dict[str, Any] = {"training": norm.training, "momentum": norm.momentum, "eps": norm.eps}
    return functions.batch_norm_act(x, mean, var, norm.weight, norm.bias, **settings, **behind)


def _row_norm(norm: Any, x: Tensor, behind: dict[str, Any]) -> Tensor:
    if behind.pop("residual") is not None:  # kernels add it before the norm
        raise UserError("residual", f"no residual behind {type(norm).__name__}")
    if x.ndim == 0 or x.shape[-1] != norm.normalized_shape[-1]:
        raise UserError(list(x.shape), f"an input of shape [..., {norm.normalized_shape[-1]}]")
    if isinstance(norm, nn.LayerNorm):
        return functions.layer_norm_act(x, norm.weight, norm.bias, eps=norm.eps, **behind)  # type: ignore[return-value]
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return functions.rms_norm_act(x, norm.weight, eps=eps, **behind)  # type: ignore[return-value]


class FusedBatchNorm1d(FusedNorm, nn.BatchNorm1d):
    """See FusedNorm."""

    _fused = _batch_norm


class FusedBatchNorm2d(FusedNorm, nn.BatchNorm2d):
    """See FusedNorm."""

    _fused = _batch_norm


class FusedBatchNorm3d(FusedNorm, nn.BatchNorm3d):
    """See FusedNorm."""

    _fused = _batch_norm


class FusedGroupNorm(FusedNorm, nn.GroupNorm):
    """See FusedNorm."""

    def _fused(self, x: Tensor, behind: dict[str, Any]) -> Tensor:
        return functions.group_norm_act(x, self.num_groups, self.weight, self.bias, eps=self.eps, **behind)


class FusedLayerNorm(FusedNorm, nn.LayerNorm):
    """See FusedNorm; over the last dimension, without residual."""

    _fused = _row_norm


class FusedRMSNorm(FusedNorm, nn.RMSNorm):
    """See FusedNorm; over the last dimension, without residual."""

    _fused = _row_norm


FUSED: dict[type[nn.Module], type[FusedNorm]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.BatchNorm3d: FusedBatchNorm3d,
    nn.GroupNorm: FusedGroupNorm,
    nn.LayerNorm: FusedLayerNorm,
    nn.RMSNorm: FusedRMSNorm,
}


def refusal(norm: nn.Module, act: nn.Module) -> str:
    """Why a normalisation and an activation are not fused, or ""."""
    if type(norm) not in FUSED:
        return f"no kernel for {type(norm).__name__}"
    if activation_of(act) is None:
        return f"no kernel for {type(act).__name__} behind a normalisation"
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.momentum is None:
        return "its running statistics are cumulative averages (momentum=None)"
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) != 1:
        return f"it normalises {len(norm.normalized_shape)} dimensions; kernels take the last alone"
    if next(norm.children(), None) is not None:
        return "it has modules of its own"
    for module in (norm, act):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it or its activation has hooks"
    return ""


class Moved(nn.Identity):
    """Stands where an activation was that moved into the normalisation before it."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.__dict__["_replaced"] = (act,)

    def unfused(self) -> nn.Module:
        """The activation."""
        (act,) = self.__dict__["_replaced"]
        act.training = self.training
        return act

"""Normalisations that are an affine map in evaluation, merged exactly into a neighbouring linear layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from search_spaces.common.errors import UserError
from search_spaces.primitives.batch_norms import L1BatchNorm, PRepBN, RepBN
from search_spaces.primitives.power_norms import PowerNorm, PowerNormV
from search_spaces.primitives.unified_norm import UnifiedNorm

Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def evaluation_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [C]: in evaluation `norm` is x * scale + shift per channel.

    For BatchNorm, L1BatchNorm, RepBN, PRepBN and UnifiedNorm; for PowerNorm what follows its GroupScaling.
    Errors: UserError for a normalisation that needs statistics of its input.
    """
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        return scale, shift if norm.bias is None else shift + norm.bias
    if isinstance(norm, L1BatchNorm | RepBN | PRepBN | PowerNorm | PowerNormV | UnifiedNorm):
        return norm.evaluation_affine()
    raise UserError(type(norm).__name__, "a normalisation that is an affine map in evaluation, such as batch-norm")


@torch.no_grad()
def merge_into_next(norm: nn.Module, layer: Linear) -> nn.Module:
    """A new module equal to `layer(norm(x))` in evaluation, without `norm`; of PowerNorm its GroupScaling stays.

    Errors: UserError if the channels do not fit, or if `layer` pads with zeros a normalisation that has a shift: its
    borders would differ.
    """
    scale, shift = evaluation_affine(norm)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    if layer.weight.shape[1] * groups != scale.numel():
        raise UserError(layer.weight.shape[1] * groups, f"a layer of {scale.numel()} input channels")
    if not isinstance(layer, nn.Linear):
        pads = layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)
        if pads and bool((shift != 0).any()):
            raise UserError(f"padding={layer.padding}", "a layer without zero padding after a normalisation with shift")
    merged = copy.deepcopy(layer)
    # weight [out, in / groups, ...]: the outputs of group g read the g-th part of the input channels.
    weight = layer.weight.unflatten(0, (groups, -1))
    per_group = (groups, 1, -1) + (1,) * (layer.weight.dim() - 2)
    merged.weight.copy_((weight * scale.view(per_group)).flatten(0, 1))
    constant = (weight * shift.view(per_group)).flatten(0, 1).flatten(1).sum(1)
    merged.bias = nn.Parameter(constant if layer.bias is None else layer.bias + constant)
    if isinstance(norm, PowerNorm | PowerNormV):
        return nn.Sequential(copy.deepcopy(norm.scaling), merged)
    return merged


@torch.no_grad()
def merge_into_previous(layer: Linear, norm: nn.Module) -> nn.Module:
    """A new layer equal to `norm(layer(x))` in evaluation.

    Errors: UserError if the channels do not fit, or for PowerNorm, whose GroupScaling stands between.
    """
    if isinstance(norm, PowerNorm | PowerNormV):
        raise UserError(
            type(norm).__name__, "a normalisation without scaling by its input; merge it into the next layer"
        )
    scale, shift = evaluation_affine(norm)
    if layer.weight.shape[0] != scale.numel():
        raise UserError(layer.weight.shape[0], f"a layer of {scale.numel()} output channels")
    merged = copy.deepcopy(layer)
    merged.weight.copy_(layer.weight * scale.view((-1,) + (1,) * (layer.weight.dim() - 1)))
    merged.bias = nn.Parameter(shift.clone() if layer.bias is None else layer.bias * scale + shift)
    return merged

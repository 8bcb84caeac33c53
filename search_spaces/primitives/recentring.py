"""A pre-norm transformer with LayerNorm rewritten, exactly, as one with RMSNorm or compressed RMSNorm.

LayerNorm is RMSNorm of the centred vector. If everything that is added to the main branch has mean zero over the
channels, so has the main branch, and nothing is left to centre (Jiang, Gu, Zhu and Pan, NeurIPS 2023, arXiv 2305.14858,
Section 3). What writes to the main branch is only ever read through a LayerNorm, so centring it changes no output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.norms import RMSNorm
from search_spaces.primitives.transformer_norms import CRMSNorm


def _find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    found = dict(model.named_modules()) | dict(model.named_parameters())
    if name not in found:
        raise UserError(name, f"the name of a module or parameter of the model ({one_of(found)})", nearest(name, found))
    return found[name]


def _outputs(writer: nn.Module | nn.Parameter, name: str = "") -> list[tuple[Tensor, int]]:
    """The tensors that hold the output channels of what writes to the main branch, and in which dimension."""
    if isinstance(writer, nn.Parameter):
        return [(writer, -1)]
    if isinstance(writer, nn.Embedding):
        return [(writer.weight, -1)]
    if isinstance(writer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return [(writer.weight, 0)] + ([] if writer.bias is None else [(writer.bias, 0)])
    raise UserError(name or type(writer).__name__, "a Linear, a convolution, an Embedding or a parameter [..., C]")


@torch.no_grad()
def recentre_(writer: nn.Module | nn.Parameter) -> None:
    """Change a Linear, convolution, Embedding or parameter [..., C] in place so that its output has mean 0 over C.

    Its output is the former one minus its mean: W - mean_rows(W) and b - mean(b). Errors: UserError for other modules.
    """
    for tensor, dim in _outputs(writer):
        tensor.sub_(tensor.mean(dim, keepdim=True))


def _layer_norm(model: nn.Module, name: str) -> nn.LayerNorm:
    norm = _find(model, name)
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        raise UserError(name, "a LayerNorm over the last dimension")
    return norm


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _like(new: nn.Module, norm: nn.LayerNorm) -> nn.Module:
    return new if norm.weight is None else new.to(norm.weight.device, norm.weight.dtype)


@torch.no_grad()
def to_rms_norms(model: nn.Module, writers: Iterable[str], norms: Iterable[str]) -> nn.Module:
    """A copy of a pre-norm transformer that computes the same with RMSNorms (with bias) for its LayerNorms.

    writers: the names of all that is added to the main branch: embeddings, position parameters, the output projection
    of every attention, the last Linear of every feed-forward. norms: the names of all LayerNorms that read it; nothing
    else may read it. Errors: UserError for names that do not exist or are no such module.
    """
    model = copy.deepcopy(model)
    for name in writers:
        _outputs(_find(model, name), name)
        recentre_(_find(model, name))
    for name in norms:
        norm = _layer_norm(model, name)
        new = RMSNorm(norm.normalized_shape[0], norm.eps, bias=norm.bias is not None)
        if norm.weight is not None:
            new.weight.copy_(norm.weight)
        if norm.bias is not None and new.bias is not None:
            new.bias.copy_(norm.bias)
        _replace(model, name, _like(new, norm))
    return model


@torch.no_grad()
def to_crms_norms(model: nn.Module, writers: Iterable[str], norms: Mapping[str, Sequence[str]]) -> nn.Module:
    """A copy of a pre-norm transformer that computes the same with a main branch of d - 1 channels and CRMSNorms.

    writers: as in `to_rms_norms`; their last output channel is dropped. norms: for each LayerNorm the names of the
    Linears that read it; they take over its gain and shift and the column of the dropped channel, which is minus the
    sum of the others. Errors: UserError for names that do not exist or are no such module.
    """
    model = copy.deepcopy(model)
    for name in writers:
        writer = _find(model, name)
        for tensor, dim in _outputs(writer, name):
            tensor.sub_(tensor.mean(dim, keepdim=True))
            tensor.data = tensor.data.narrow(dim, 0, tensor.shape[dim] - 1).clone()
        for size in ("out_features", "embedding_dim", "out_channels"):
            if hasattr(writer, size):
                setattr(writer, size, getattr(writer, size) - 1)
    for name, readers in norms.items():
        norm = _layer_norm(model, name)
        for reader_name in readers:
            reader = _find(model, reader_name)
            if not isinstance(reader, nn.Linear):
                raise UserError(reader_name, f"a Linear that reads {name}")
            weight, bias = reader.weight, reader.bias
            if norm.bias is not None:
                shift = weight @ norm.bias
                reader.bias = nn.Parameter(shift if bias is None else bias + shift)
            weight = weight if norm.weight is None else weight * norm.weight
            reader.weight = nn.Parameter(weight[:, :-1] - weight[:, -1:])
            reader.in_features -= 1
        _replace(model, name, _like(CRMSNorm(norm.normalized_shape[0] - 1, norm.eps, affine=False), norm))
    return model

"""Normalize-and-Project: after every optimiser step each weight matrix returns to its initial Frobenius norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest


class ProjectWeights:
    """Rescales every weight matrix of a model to the Frobenius norm it has now; call it after `optimiser.step()`.

    Weight matrices are the parameters of at least two dimensions (a convolution's kernel as a whole); vectors (biases,
    gains) are left alone, and so are the names in `exclude` and matrices that are zero now. It can be registered:
    `optimiser.register_step_post_hook(ProjectWeights(model))`.

    A layer followed by a normalisation computes the same for every length of its weights, so a step of length lr turns
    them by lr / |W|: where |W| grows during training the effective learning rate falls by itself, lr / |W|^2 for SGD.
    With |W| fixed it follows the schedule that was asked for and nothing else. The method also wants a LayerNorm before
    every nonlinearity, its scale and offset left out or drawn towards their initial values; the last layer, which no
    normalisation follows, belongs in `exclude`.

    Source: Lyle et al., Normalization and effective learning rates in reinforcement learning (2024, arXiv 2407.01800).
    Errors: UserError for a name in `exclude` that is no parameter.
    """

    def __init__(self, model: nn.Module, exclude: Iterable[str] = ()):
        named = dict(model.named_parameters())
        left_out = set(exclude)
        for name in left_out:
            if name not in named:
                raise UserError(name, f"the name of a parameter ({one_of(named)})", nearest(name, named))
        matrices = {name: p for name, p in named.items() if p.dim() >= 2 and name not in left_out}
        norms = {name: _frobenius(p) for name, p in matrices.items()}
        self.parameters = {name: p for name, p in matrices.items() if norms[name] > 0}
        self.norms = {name: norms[name] for name in self.parameters}

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        for name, parameter in self.parameters.items():
            norm = _frobenius(parameter)
            if norm > 0:
                parameter.mul_((self.norms[name].to(norm) / norm).to(parameter.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """The initial norms, for a checkpoint."""
        return dict(self.norms)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the norms of a checkpoint. Errors: UserError unless it is of the same parameters."""
        for name in sorted(state.keys() ^ self.norms.keys()):
            raise UserError(name, "the norms of the same parameters")
        self.norms = dict(state)


def _frobenius(parameter: Tensor) -> Tensor:
    return torch.linalg.vector_norm(parameter.detach(), dtype=torch.promote_types(parameter.dtype, torch.float32))

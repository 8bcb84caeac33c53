"""Drop-path for networks that name the modules it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError


class DropPath:
    """Sets a module's whole output to zero for some samples in training, and scales the others up.

    Larsson et al. 2017 (FractalNet, arXiv 1605.07648), per sample as in the published code of DARTS. A forward hook,
    so that the network stays what it is. `keep` is a tensor that all hooks share: compiled code sees it change.
    """

    def __init__(self, model: nn.Module):
        names = getattr(model, "drop_path_modules", None)
        if names is None:
            raise UserError(type(model).__name__, "a network with drop_path_modules(), such as those of darts")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.keep = torch.ones((), device=device)
        self.handles = [model.get_submodule(name).register_forward_hook(self._drop) for name in names()]

    def set(self, probability: float) -> None:
        """Drop with this probability from now on."""
        self.keep.fill_(1.0 - probability)

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self.handles:
            handle.remove()

    def _drop(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        mask = torch.rand(len(output), 1, 1, 1, device=output.device) < self.keep
        return output * (mask / self.keep).to(output.dtype)

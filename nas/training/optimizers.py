"""Optimisers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.layers.module import parameter_groups as weights_and_vectors

if TYPE_CHECKING:
    from nas.training.recipe import Recipe

Group = dict[str, Any]
DECAYS = ("weights", "all")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the trainable parameters of `model`. Errors: UserError if there are none."""
    if recipe.decay == "all":
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained, "weight_decay": recipe.weight_decay}] if trained else []
    else:
        groups = weights_and_vectors(model, recipe.weight_decay)
    if not groups:
        raise UserError(type(model).__name__, "a model with parameters to train")
    return OPTIMIZERS[recipe.optimizer](groups, recipe)


def sgd(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(list(groups), recipe.learning_rate, recipe.momentum, nesterov=recipe.nesterov)


def adamw(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    return torch.optim.AdamW(list(groups), recipe.learning_rate, betas=recipe.betas)


def rmsprop(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """RMSProp as NAS-Bench-101 trained with it."""
    return TensorFlowRMSprop(list(groups), recipe.learning_rate, recipe.momentum)


class TensorFlowRMSprop(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 defines it: eps inside the root, mean squares begin at 1, momentum on the scaled step.

    PyTorch's has eps outside the root and begins at 0, which with eps = 1 is another method. The gradient includes
    weight decay as an L2 term. Defaults: decay .9 (TensorFlow's), eps 1 (google-research/nasbench, model_builder.py).
    """

    def __init__(self, groups: Any, lr: float, momentum: float = 0.9, decay: float = 0.9, eps: float = 1.0):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure`, if given, computes the loss anew first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean_square"], state["momentum"] = torch.ones_like(p), torch.zeros_like(p)
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                square, buffer = state["mean_square"], state["momentum"]
                square.lerp_(gradient.square(), 1 - group["decay"])
                scaled = gradient * (square + group["eps"]).rsqrt()
                buffer.mul_(group["momentum"]).add_(scaled, alpha=group["lr"])
                p.sub_(buffer)
        return loss


OPTIMIZERS: dict[str, Callable[[Sequence[Group], Recipe], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "rmsprop": rmsprop,
}

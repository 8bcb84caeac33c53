"""The two levels of differentiable search: gradients of the validation loss to the architecture parameters alpha.

    min_alpha  L_val(w*(alpha), alpha)    with    w*(alpha) = argmin_w L_train(w, alpha)

Nothing here knows a network. A loss is a function without arguments that reads the weights and alphas where they lie;
called twice it must give the same value, so noise (drop-path, sampled paths) is fixed or redrawn from a saved state.
Gradients are returned and `p.grad` is left alone (but by `relaxed_step`, which takes its steps itself);
`set_gradients` hands them to an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from search_spaces.common.errors import UserError

Loss = Callable[[], Tensor]
Average = Callable[[Sequence[Tensor]], None]


def first_order(val_loss: Loss, alphas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The validation loss and its gradient to `alphas` at the present weights, as if these did not depend on alpha.

    Liu et al. 2019 (DARTS, arXiv 1806.09055), section 2.3 with xi = 0.
    """
    loss = val_loss()
    return loss.detach(), gradients(loss, alphas)


def second_order(
    train_loss: Loss,
    val_loss: Loss,
    alphas: Sequence[Tensor],
    optimizer: torch.optim.SGD,
    *,
    buffers: Sequence[Tensor] = (),
    exact: bool = False,
    radius: float = 0.01,
    average: Average | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The validation loss after one step of the weights, and its gradient to `alphas` through that step.

    The step w' is the one that `optimizer` would take on the training loss: learning rate xi, momentum, Nesterov and
    weight decay of each of its groups, its momentum buffers as they are; gradients are not clipped. With
    v = dL_val/dw' the gradient is dL_val/dalpha - xi d(v . dL_train/dw)/dalpha. The mixed second derivative is by
    default the central difference over w +- eps v, eps = radius / ||v||; `exact=True` differentiates twice, which
    needs operations with second derivatives and the memory of a graph of gradients. Weights, and the `buffers` given
    (BatchNorm's statistics), have the same bits afterwards, also after an exception.
    average: overwrites gradients with their means over several processes that each see a share of both batches; the
    finite difference is then that of the whole batch.
    Source: DARTS, equations 6 to 8; radius .01 from quark0/darts, cnn/architect.py. Errors: UserError for an optimiser
    with dampening or maximisation.
    """
    weights, plain, decays, momenta = _step_of(optimizer)
    with kept(buffers):
        mean = average or (lambda gradients: None)
        slopes = torch.autograd.grad(train_loss(), weights, allow_unused=True)
        mean([slope for slope in slopes if slope is not None])
        # As in SGD, a weight that the loss does not use stands still.
        moved = [i for i, slope in enumerate(slopes) if slope is not None]
        with kept(weights):
            with torch.no_grad():
                for i in moved:
                    w, slope = weights[i], slopes[i]
                    w.sub_(plain[i] * (slope + decays[i] * w) + momenta[i])
            loss = val_loss()
            both = gradients(loss, [*alphas, *(weights[i] for i in moved)])
            mean(both)
        direct, slopes_after = both[: len(alphas)], both[len(alphas) :]
        # The learning rate (and Nesterov's factor) of each group goes into the vector, so that groups may differ.
        vector = [plain[i] * v for i, v in zip(moved, slopes_after)]
        product = _mixed_exact if exact else _mixed_by_difference
        through = product(train_loss, [weights[i] for i in moved], alphas, vector, radius)
        mean(through)
    return loss.detach(), [d - t for d, t in zip(direct, through)]


def relaxed_step(
    train_loss: Loss,
    val_loss: Loss,
    train_optimizer: torch.optim.Optimizer,
    val_optimizer: torch.optim.Optimizer,
    alpha_optimizer: torch.optim.Optimizer,
    *,
    train_weight: float,
    coupling: float,
    clip: float | None = None,
    average: Average | None = None,
) -> tuple[Tensor, Tensor]:
    """One iteration of RARTS's single-level problem; the training and validation losses that alpha's step saw.

    Two copies of the weights, w for training and y for validation, share alpha and attract each other:

        L = L_val(y, alpha) + train_weight * L_train(w, alpha) + coupling / 2 * ||y - w||^2

    descended by w, then y, then alpha, each seeing the steps before it, without second derivatives. `train_optimizer`
    holds w, which `train_loss` reads; `val_optimizer` holds y in the same order, which `val_loss` reads. clip: the
    largest norm of the gradient of either copy, with its attraction (None = any). average: as in `second_order`. The
    minimum tends to the two-level solution as both factors grow, and is off it at finite ones. Source: Xue, Qi and Xin
    2022 (RARTS, arXiv 2008.03901); no code of the authors was found to compare with, so neither factor has a default.
    Errors: UserError for copies of different shapes or factors that are not positive.
    """
    if train_weight <= 0 or coupling <= 0:
        raise UserError(min(train_weight, coupling), "a positive train_weight and coupling")
    w, y, alphas = (_parameters(o) for o in (train_optimizer, val_optimizer, alpha_optimizer))
    if [p.shape for p in w] != [p.shape for p in y]:
        raise UserError(
            f"{len(w)} and {len(y)} weights", "two copies of the weights, alike in number, order and shapes"
        )

    mean = average or (lambda gradients: None)

    def descend(optimizer: torch.optim.Optimizer, own: list[Tensor], loss: Tensor, other: list[Tensor]) -> None:
        slopes = gradients(loss, own)
        mean(slopes)
        set_gradients(own, [g + coupling * (a.detach() - b.detach()) for g, a, b in zip(slopes, own, other)])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(own, clip)
        optimizer.step()

    descend(train_optimizer, w, train_weight * train_loss(), y)
    descend(val_optimizer, y, val_loss(), w)
    train, val = train_loss(), val_loss()
    slopes = gradients(train_weight * train + val, alphas)
    mean(slopes)
    set_gradients(alphas, slopes)
    alpha_optimizer.step()
    return train.detach(), val.detach()


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `loss`; zeros for tensors it does not use."""
    return list(torch.autograd.grad(loss, list(tensors), allow_unused=True, materialize_grads=True))


def set_gradients(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Make `values` the `.grad` of `tensors`, for an optimiser's step."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.grad = value.detach().to(tensor.dtype)


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens inside, `tensors` have the same bits afterwards."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _step_of(optimizer: torch.optim.SGD) -> tuple[list[Tensor], list[float], list[float], list[Tensor | float]]:
    """Weights; for each, the factor of its decayed gradient in the step, its decay, and momentum's part of the step."""
    weights: list[Tensor] = []
    plain: list[float] = []
    decays: list[float] = []
    momenta: list[Tensor | float] = []
    for group in optimizer.param_groups:
        if group.get("dampening") or group.get("maximize") or "nesterov" not in group:
            raise UserError(type(optimizer).__name__, "SGD without dampening that minimises, to unroll one step of it")
        rate, momentum = float(group["lr"]), group["momentum"]
        for p in group["params"]:
            if not p.requires_grad:
                continue
            buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
            # step = buffer' = m buffer + g; Nesterov: step = g + m buffer'. Before the first step the buffer is empty
            # and buffer' = g.
            weights.append(p)
            plain.append(rate * (1 + momentum if group["nesterov"] else 1))
            decays.append(group["weight_decay"])
            share = rate * momentum * (momentum if group["nesterov"] else 1)
            momenta.append(0.0 if buffer is None else share * buffer.detach())
    return weights, plain, decays, momenta


def _mixed_by_difference(
    train_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor], vector: Sequence[Tensor], radius: float
) -> list[Tensor]:
    """d(vector . dL_train/dw)/dalpha from the gradients to alpha at two weights; 0 for a vector of zeros."""
    norm = torch.sqrt(sum((v.square().sum() for v in vector), start=torch.zeros(())))
    if norm == 0:
        return [torch.zeros_like(a) for a in alphas]
    epsilon = radius / norm.item()
    sides = []
    for sign in (1, -1):
        with kept(weights):
            with torch.no_grad():
                for w, v in zip(weights, vector):
                    w.add_(v, alpha=sign * epsilon)
            sides.append(gradients(train_loss(), alphas))
    return [(above - below) / (2 * epsilon) for above, below in zip(*sides)]


def _mixed_exact(
    train_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor], vector: Sequence[Tensor], radius: float
) -> list[Tensor]:
    """The same by double backward; `radius` is not used."""
    slopes = torch.autograd.grad(train_loss(), list(weights), create_graph=True) if weights else ()
    along = sum(((s * v).sum() for s, v in zip(slopes, vector)), start=torch.zeros(()))
    return gradients(along, alphas) if along.requires_grad else [torch.zeros_like(a) for a in alphas]

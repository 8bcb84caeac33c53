"""A step of the architecture parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nas.supernet.bilevel import first_order, second_order, set_gradients
from nas.supernet.losses import alphas_loss, cross_entropy
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState
from nas.training.batches import Batch


def alpha_step(state: SearchState, recipe: Recipe, batch: Batch, epoch: int) -> float:
    """One step of the alphas; the cross-entropy they saw."""
    supernet, optimizer = state.supernet, state.alpha_optimizer
    assert optimizer is not None
    alphas = supernet.architecture_parameters()
    held_out = state.held_out_batch()
    seen: list[Tensor] = []

    def val_loss() -> Tensor:
        loss = cross_entropy(supernet(held_out.images), held_out, recipe)
        share = state.share(held_out, state.alpha_batches)
        seen.append(share * loss.detach())
        return alphas_loss(share * loss, state, recipe, epoch)

    if recipe.solver == "second-order":
        rewound = _rewinding(supernet, state.random)

        def train_loss() -> Tensor:
            rewound()
            return state.share(batch) * cross_entropy(supernet(batch.images), batch, recipe)

        def val_after() -> Tensor:
            rewound()
            return val_loss()

        buffers = list(supernet.network.buffers())
        average = state.processes.average
        _, slopes = second_order(train_loss, val_after, alphas, state.optimizer, buffers=buffers, average=average)  # type: ignore[arg-type]
    else:
        weights = _watched_weights(state)
        _, slopes = first_order(val_loss, [*alphas, *weights])
        state.processes.average(slopes)
        set_gradients(weights, slopes[len(alphas) :])
        slopes = slopes[: len(alphas)]
    set_gradients(alphas, slopes)
    for part in state.parts.values():
        part.before_alphas(state, recipe, held_out)
    loss = state.mean(seen[-1])
    descend_alphas(state, recipe, loss)
    return loss


def _watched_weights(state: SearchState) -> list[nn.Parameter]:
    """The weights whose gradients of the validation loss a part of the search wants; none where no part does."""
    if not any(part.wants_held_out_gradients for part in state.parts.values()):
        return []
    return [p for p in state.supernet.weight_parameters() if p.requires_grad]


def descend_alphas(state: SearchState, recipe: Recipe, loss: float) -> None:
    """The step of the alphas by the gradients they have, unless something is not finite."""
    alphas = state.supernet.architecture_parameters()
    assert state.alpha_optimizer is not None
    limit = math.inf if recipe.alpha_clip is None else recipe.alpha_clip
    norm = clipped_norm(alphas, limit)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(loss) else "gradient"
        state.fail(f"the {what} of the alphas became {loss if what == 'loss' else norm}")
        return
    state.alpha_optimizer.step()
    state.alpha_optimizer.zero_grad(set_to_none=True)


def clipped_norm(parameters: list[nn.Parameter], limit: float) -> float:
    """The norm of the gradients before they are clipped to `limit`."""
    if limit < math.inf:
        return nn.utils.clip_grad_norm_(parameters, limit).item()
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def _rewinding(supernet: Supernet, random: dict[str, Tensor]) -> Callable[[], None]:
    """A function that puts all generators back to where they are now, so that a loss called again is the same."""
    mixing, own = supernet.generator.get_state(), torch.get_rng_state()

    def rewind() -> None:
        supernet.generator.set_state(mixing)
        torch.set_rng_state(own)

    if "cuda" not in random:
        return rewind
    device = next(supernet.parameters()).device
    there = torch.cuda.get_rng_state(device)

    def rewind_all() -> None:
        rewind()
        torch.cuda.set_rng_state(there, device)

    return rewind_all

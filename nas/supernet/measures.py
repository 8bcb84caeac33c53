"""What is measured of a supernet between its epochs; the search goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nas.supernet.bilevel import kept
from nas.supernet.edges import edges_into_nodes
from nas.supernet.hessian import extreme_eigenvalues
from nas.supernet.losses import cross_entropy
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.supernet.relaxation import noiseless
from nas.supernet.state import SearchState
from nas.training.batches import evaluation_batches
from nas.training.data import Dataset
from nas.training.loop import evaluate, random_states, training_errors
from search_spaces.cells.darts_network import FactorizedReduce
from search_spaces.cells.operations import Zero


def curvature(state: SearchState, recipe: Recipe) -> float:
    """The largest eigenvalue of the Hessian of the validation loss in the alphas, on the next batch of the alphas.

    Of the mixture without the noise of sampled weights, so that recipes compare (a single sampled path has no curvature
    of its own, a Dirichlet sample no second derivative). The search goes on as if it had not been measured.
    """
    supernet = state.supernet
    held_out = state.held_out_batch()
    random = {name: value.clone() for name, value in state.random.items()}
    relaxation = supernet.relaxation
    supernet.relaxation = noiseless(relaxation)  # draws nothing
    supernet.train()
    try:
        with (
            kept(list(supernet.network.buffers())),
            random_states(random, state.device),
            training_errors(recipe.training.batch_size),
        ):
            _, largest = extreme_eigenvalues(
                lambda: cross_entropy(supernet(held_out.images), held_out, recipe),
                list(supernet.alphas.values()),
                torch.Generator().manual_seed(state.step),
                tolerance=0.01,  # of the residual; an eigenvalue's error is of its square
            )
    finally:
        supernet.relaxation = relaxation
    return largest


def mixture_accuracy(state: SearchState, data: Dataset, recipe: Recipe) -> dict[str, float]:
    """`acc` and `loss` of the supernet on the images of the alphas, by each batch's statistics."""
    supernet = state.supernet
    before, random = supernet.generator.get_state(), dict(state.random)
    val, size = data.val, recipe.training.eval_batch_size
    batches = evaluation_batches(val.images, val.labels, size, normalize=data.normalize)
    try:
        with random_states(random, state.device), training_errors(size, "eval_batch_size"):
            return evaluate(supernet, batches, batch_statistics=True)
    finally:
        supernet.generator.set_state(before)


def skip_share(supernet: Supernet, selection: Mapping[str, int]) -> float:
    """Of the places where `selection` has an operation other than `none`, the share that only passes its input on."""
    edges = edges_into_nodes(selection)
    labels = [label for entering in edges.values() for label in entering] or list(selection)
    empty, passing = empty_candidates(supernet), passing_candidates(supernet)
    kept = [label for label in labels if selection[label] not in empty[label]]
    return sum(selection[label] in passing[label] for label in kept) / max(len(kept), 1)


def passing_candidates(supernet: Supernet) -> dict[str, tuple[int, ...]]:
    """{label: its candidates that only pass their input on: skip connections, strided ones too}."""
    return _of_kind(supernet, (nn.Identity, FactorizedReduce))


def empty_candidates(supernet: Supernet) -> dict[str, tuple[int, ...]]:
    """{label: its candidates that are `none`}."""
    return _of_kind(supernet, (Zero,))


def _of_kind(supernet: Supernet, kinds: tuple[type[nn.Module], ...]) -> dict[str, tuple[int, ...]]:
    found = {label: supernet._mixed[label][0].candidates for label in supernet.labels}
    return {label: tuple(k for k, c in enumerate(modules) if isinstance(c, kinds)) for label, modules in found.items()}

"""What a supernet says in between: the architecture it favours, and its strengths for the log."""

from __future__ import annotations

from typing import Any

import torch

from nas.supernet.discretization import Rules, discretize, softmax
from nas.supernet.measures import empty_candidates, passing_candidates, skip_share
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from search_spaces.space import SearchSpace


def read_off(space: SearchSpace, supernet: Supernet, recipe: Recipe) -> Any:
    """The architecture that alphas and betas favour among the candidates there are, read off as the recipe says."""
    strength = torch.sigmoid if recipe.discretization == "sigmoid" else softmax
    rules = Rules(
        kept=supernet.kept,
        passing=passing_candidates(supernet),
        empty=empty_candidates(supernet),
        skip_cap=recipe.skip_cap,
        threshold=recipe.gate_threshold,
    )
    return discretize(space, supernet.alphas, supernet.betas or None, strength, rules)


def alpha_row(space: SearchSpace, supernet: Supernet, recipe: Recipe) -> dict[str, Any]:
    """The architecture, its share of skip connections, and the strengths of all candidates, 0 for those left out."""
    arch = read_off(space, supernet, recipe)
    gates = torch.sigmoid if recipe.discretization == "sigmoid" else softmax
    strengths, entropies = {}, []
    for label, alpha in supernet.alphas.items():
        kept = list(supernet.candidates_of(label))
        among = alpha.detach().cpu()[kept]
        strengths[label] = torch.zeros(len(alpha), dtype=among.dtype).index_copy(0, torch.tensor(kept), gates(among))
        entropies.append(-(among.softmax(0) * among.log_softmax(0)).sum())
    row: dict[str, Any] = {
        "arch": space.encode(arch),
        "skip_share": skip_share(supernet, space.select(arch)),
        "entropy": float(torch.stack(entropies).mean()),
        "alphas": {label: values.tolist() for label, values in strengths.items()},
    }
    if supernet.betas:
        row["betas"] = {node: b.detach().cpu().softmax(0).tolist() for node, b in supernet.betas.items()}
    return row

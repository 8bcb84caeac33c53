"""Paths that are drawn together, so that no candidate of a label is trained more than another."""

from __future__ import annotations

import math

import torch

from nas.supernet.network import Draw, Supernet
from nas.supernet.relaxation import Weights


def fair_draws(supernet: Supernet) -> list[Draw]:
    """As many paths as a label has candidates; each candidate of each label is in exactly one of them.

    A random permutation for every label. Where labels differ in the number of candidates there are as many paths as the
    largest has, and the others go on with further permutations: their candidates' counts differ by one at most.
    Source: Chu, Zhang and Xu, FairNAS, ICCV 2021 (arXiv 1907.01845), strict fairness.
    """
    free = {label: supernet.candidates_of(label) for label in supernet.labels if label not in supernet.fixed}
    count = max((len(candidates) for candidates in free.values()), default=1)
    orders: dict[str, list[int]] = {}
    for label, candidates in free.items():
        rounds = math.ceil(count / len(candidates))
        places = [torch.randperm(len(candidates), generator=supernet.generator).tolist() for _ in range(rounds)]
        orders[label] = [candidates[place] for order in places for place in order]
    one_hot = {label: torch.eye(len(a), dtype=a.dtype, device=a.device) for label, a in supernet.alphas.items()}
    scales = supernet.scales()
    return [
        Draw({label: Weights(one_hot[label][order[path]], (order[path],)) for label, order in orders.items()}, scales)
        for path in range(count)
    ]

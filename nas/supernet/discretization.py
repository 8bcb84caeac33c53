"""From architecture parameters to one architecture of the space."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from search_spaces.cells.darts import Darts
from search_spaces.cells.darts_genotype import CONCAT, PARTS, Genotype
from search_spaces.cells.darts_network import OPERATIONS
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layered import LayeredArchitecture, LayeredSpace
from search_spaces.space import SearchSpace, TupleSpace, places

Parameters = Mapping[str, torch.Tensor]
Strength = Callable[[torch.Tensor], torch.Tensor]


def softmax(alpha: torch.Tensor) -> torch.Tensor:
    """The strengths of candidates that compete: softmax over all of them, `none` included."""
    return alpha.softmax(0)


def discretize(space: SearchSpace, alphas: Parameters, betas: Parameters | None = None, strength: Strength = softmax):
    """The architecture of `space` that the parameters of its supernet favour.

    DARTS: see `genotype`. Spaces of tuples: the candidate with the largest alpha at every label, `none` included (each
    edge stands alone, so betas change nothing). `with_layers`: also the largest of its `norm` and `act`.
    strength: alpha -> strengths that compare between edges, softmax or `torch.sigmoid`.
    Errors: UserError for a missing label, another number of candidates, parameters that are not finite, another space.
    """
    if isinstance(space, LayeredSpace):
        best = {part: _strongest(alphas, part, len(getattr(space, f"{part}s"))) for part in ("norm", "act")}
        inner = discretize(space.space, alphas, betas, strength)
        return LayeredArchitecture(inner, list(space.norms)[best["norm"]], list(space.acts)[best["act"]])
    if isinstance(space, Darts):
        return genotype(alphas, betas, strength)
    if isinstance(space, TupleSpace):
        return _tuple(space, alphas)
    raise UserError(space.name, "a space whose architectures can be read off alphas: tuples of choices, or darts")


def strongest(alphas: Parameters) -> dict[str, int]:
    """{label: the candidate with the largest alpha, the first among equals}, for `Supernet.select`.

    Errors: UserError for parameters that are not finite.
    """
    return {label: _strongest(alphas, label) for label in alphas}


def genotype(alphas: Parameters, betas: Parameters | None = None, strength: Strength = softmax) -> Genotype:
    """The two edges into every node whose best operation is strongest, with that operation.

    `none` competes in the softmax and is never chosen. Liu et al., DARTS, ICLR 2019, section 2.4; with betas strengths
    are products with the softmax of beta over the edges into a node (Xu et al., PC-DARTS, ICLR 2020, section 3.3).
    alphas: {`normal_0_2`: [8], ...} in the order of `darts_network.OPERATIONS`. betas: {`normal_2`: [2], ...}.
    Among equals the earlier edge and the earlier operation are taken. Errors: UserError as `discretize`.
    """
    cells: dict[str, tuple] = {}
    for part in PARTS:
        pairs: list[tuple[str, int]] = []
        for node in CONCAT:
            labels = [f"{part}_{source}_{node}" for source in range(node)]
            of_edges = torch.stack([strength(_parameter(alphas, label, len(OPERATIONS))) for label in labels])
            if betas:
                of_edges = of_edges * _parameter(betas, f"{part}_{node}", node).softmax(0)[:, None]
            values, best = of_edges[:, 1:].max(1)  # without `none`
            kept = sorted(range(node), key=lambda source: -float(values[source]))[:2]
            pairs += [(OPERATIONS[1 + int(best[source])], source) for source in kept]
        cells[part] = tuple(pairs)
    return Genotype(cells["normal"], CONCAT, cells["reduce"], CONCAT)


def _tuple(space: TupleSpace, alphas: Parameters) -> tuple[int, ...]:
    """The tuple that `space.select` turns into the strongest candidates."""
    arch: list[int] = []
    for found, size in zip(places(space), space.sizes, strict=True):
        labels = [label for label, indices in found.items() if len(set(indices)) == size]
        if len(labels) != 1:
            raise UserError(space.name, "a space with one Choice for every position of an architecture")
        arch.append(found[labels[0]].index(_strongest(alphas, labels[0], size)))
    return tuple(arch)


def _strongest(parameters: Parameters, label: str, count: int | None = None) -> int:
    values = _parameter(parameters, label, count)
    return int((values == values.max()).nonzero()[0])


def _parameter(parameters: Parameters, label: str, count: int | None = None) -> torch.Tensor:
    if label not in parameters:
        raise UserError(label, f"a label of the parameters ({one_of(parameters)})", nearest(label, parameters))
    found = parameters[label].detach()
    if count is not None and found.shape != (count,):
        raise UserError(list(found.shape), f"{count} parameters for {label!r}")
    if not bool(torch.isfinite(found).all()):
        raise UserError(found.tolist(), f"finite parameters for {label!r}")
    return found

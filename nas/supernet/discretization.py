"""From architecture parameters to one architecture of the space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nas.supernet.edges import edges_into_nodes
from search_spaces.cells.darts import Darts
from search_spaces.cells.darts_genotype import CONCAT, PARTS, Genotype
from search_spaces.cells.darts_network import OPERATIONS
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layered import LayeredArchitecture, LayeredSpace
from search_spaces.space import SearchSpace, TupleSpace, places

Parameters = Mapping[str, torch.Tensor]
Strength = Callable[[torch.Tensor], torch.Tensor]
OUT = -1.0  # the strength of a candidate that cannot be chosen; all others have 0 or more


def softmax(alpha: torch.Tensor) -> torch.Tensor:
    """The strengths of candidates that compete: softmax over all of them, `none` included."""
    return alpha.softmax(0)


@dataclass(frozen=True)
class Rules:
    """How architectures are read off beyond the strongest candidates; the defaults change nothing.

    kept: {label: candidates it is restricted to}. passing, empty: {label: its candidates that only pass their input
    on, those that are `none`}. skip_cap: at most so many passing operations, reduction cells not counted: the weakest
    is taken off its edge and all is read off again (Chen et al., P-DARTS, ICCV 2019, section 3.3.2; the code's
    `delete_min_sk_prob`; recollection). threshold: candidates at or below it are not chosen (Chu et al., Fair DARTS,
    ECCV 2020): an edge without a stronger one is `none`, but the strongest edge into a node stays where no other does.
    Where edges cannot be `none` or are no edges, and in the space darts, whose nodes have two inputs in any case, the
    strongest candidates are chosen as without it.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    passing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    empty: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skip_cap: int | None = None
    threshold: float | None = None


def discretize(
    space: SearchSpace,
    alphas: Parameters,
    betas: Parameters | None = None,
    strength: Strength = softmax,
    rules: Rules = Rules(),
):
    """The architecture of `space` that the parameters of its supernet favour.

    DARTS: see `genotype`. Spaces of tuples: the candidate with the largest alpha at every label, `none` included (each
    edge stands alone, so betas change nothing). `with_layers`: also the largest of its `norm` and `act`.
    strength: alpha -> strengths that compare between edges, softmax or `torch.sigmoid`.
    Errors: UserError for a missing label, another number of candidates, parameters that are not finite, another space.
    """
    strengths = {label: _strengths(alphas, label, strength, rules.kept.get(label)) for label in alphas}
    found = _read(space, strengths, betas, rules)
    if rules.skip_cap is None:
        return found
    while True:
        chosen = space.select(found)
        skips = [label for label, k in chosen.items() if k in rules.passing.get(label, ()) and _counted(label)]
        if len(skips) <= rules.skip_cap:
            return found
        weakest = min(skips, key=lambda label: float(strengths[label][chosen[label]]))
        strengths[weakest][chosen[weakest]] = OUT
        found = _read(space, strengths, betas, rules)


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
    return _genotype({label: _strengths(alphas, label, strength) for label in alphas}, betas)


def _read(space: SearchSpace, strengths: Parameters, betas: Parameters | None, rules: Rules) -> Any:
    if isinstance(space, LayeredSpace):
        best = {part: _strongest(strengths, part, len(getattr(space, f"{part}s"))) for part in ("norm", "act")}
        inner = _read(space.space, strengths, betas, rules)
        return LayeredArchitecture(inner, list(space.norms)[best["norm"]], list(space.acts)[best["act"]])
    if isinstance(space, Darts):
        return _genotype(strengths, betas)
    if isinstance(space, TupleSpace):
        return _tuple(space, strengths if rules.threshold is None else _above(strengths, rules))
    raise UserError(space.name, "a space whose architectures can be read off alphas: tuples of choices, or darts")


def _genotype(strengths: Parameters, betas: Parameters | None) -> Genotype:
    cells: dict[str, tuple] = {}
    for part in PARTS:
        pairs: list[tuple[str, int]] = []
        for node in CONCAT:
            labels = [f"{part}_{source}_{node}" for source in range(node)]
            of_edges = torch.stack([_parameter(strengths, label, len(OPERATIONS)) for label in labels])
            if betas:
                of_edges = of_edges * _parameter(betas, f"{part}_{node}", node).double().softmax(0)[:, None]
            values, best = of_edges[:, 1:].max(1)  # without `none`
            kept = sorted(range(node), key=lambda source: -float(values[source]))[:2]
            if min(float(values[source]) for source in kept) < 0:
                raise UserError(labels, "labels of which two or more are not restricted to `none`")
            pairs += [(OPERATIONS[1 + int(best[source])], source) for source in kept]
        cells[part] = tuple(pairs)
    return Genotype(cells["normal"], CONCAT, cells["reduce"], CONCAT)


def _above(strengths: Parameters, rules: Rules) -> dict[str, torch.Tensor]:
    """The strengths with edges below the threshold made `none`."""
    assert rules.threshold is not None
    found = {label: values.clone() for label, values in strengths.items()}
    for labels in edges_into_nodes(strengths).values():
        if not all(rules.empty.get(label) for label in labels):
            continue
        for label in labels:
            found[label][list(rules.empty[label])] = OUT
        best = {label: float(found[label].max()) for label in labels}
        first = max(labels, key=lambda label: best[label])
        for label in labels:
            if best[label] <= rules.threshold and label != first:
                found[label][:] = OUT
                found[label][rules.empty[label][0]] = 1.0
    return found


def _tuple(space: TupleSpace, strengths: Parameters) -> tuple[int, ...]:
    """The tuple that `space.select` turns into the strongest candidates."""
    arch: list[int] = []
    for found, size in zip(places(space), space.sizes, strict=True):
        labels = [label for label, indices in found.items() if len(set(indices)) == size]
        if len(labels) != 1:
            raise UserError(space.name, "a space with one Choice for every position of an architecture")
        arch.append(found[labels[0]].index(_strongest(strengths, labels[0], size)))
    return tuple(arch)


def _strengths(alphas: Parameters, label: str, strength: Strength, kept: tuple[int, ...] | None = None) -> torch.Tensor:
    """In double precision, so that equal strengths are equal alphas; OUT for candidates that are not kept."""
    alpha = _parameter(alphas, label).double()
    if kept is None:
        return strength(alpha).clone()
    found = torch.full_like(alpha, OUT)
    found[list(kept)] = strength(alpha[list(kept)])
    return found


def _counted(label: str) -> bool:
    """Whether the cap on skip connections is for this label's cell."""
    return not label.startswith("reduce_")


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

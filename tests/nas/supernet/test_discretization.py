"""Discretisation: against brute force over whole cells, and in the published notations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from nas.supernet.discretization import discretize, genotype, strongest
from search_spaces.cells.darts import DARTS_V1, DARTS_V2, PCDARTS, Darts
from search_spaces.cells.darts_network import OPERATIONS
from search_spaces.common.errors import UserError
from search_spaces.layered import with_layers
from search_spaces.registry import load_space

PARTS = ("normal", "reduce")


def darts_parameters(rng: np.random.Generator, spread: float) -> tuple[dict, dict]:
    alphas = {
        f"{part}_{source}_{node}": torch.tensor(spread * rng.normal(size=8))
        for part in PARTS
        for node in range(2, 6)
        for source in range(node)
    }
    betas = {f"{part}_{node}": torch.tensor(rng.normal(size=node)) for part in PARTS for node in range(2, 6)}
    return alphas, betas


def brute_force_node(alphas: dict, beta: np.ndarray, part: str, node: int, strength) -> set:
    """The two edges with an operation each whose strengths have the largest sum, among all such pairs."""
    strengths = np.array([strength(alphas[f"{part}_{source}_{node}"].numpy()) for source in range(node)])
    strengths = strengths * beta[:, None]
    pairs = itertools.combinations(range(node), 2)
    options = [(edges, ops) for edges in pairs for ops in itertools.product(range(1, 8), repeat=2)]
    edges, ops = max(options, key=lambda o: strengths[o[0][0], o[1][0]] + strengths[o[0][1], o[1][1]])
    return {(OPERATIONS[op], edge) for op, edge in zip(ops, edges)}


@pytest.mark.parametrize("kind", ["plain", "edge normalised", "sigmoid"])
@pytest.mark.parametrize("spread", [1e-3, 2.0])
def test_genotypes_against_brute_force(kind, spread, rng):
    space, sensitive = Darts(), 0
    for _ in range(5):
        alphas, betas = darts_parameters(rng, spread)
        strength = (torch.sigmoid, expit) if kind == "sigmoid" else (lambda a: a.softmax(0), softmax)
        found = genotype(alphas, betas if kind == "edge normalised" else None, strength[0])
        for part, node in itertools.product(PARTS, range(2, 6)):
            beta = softmax(betas[f"{part}_{node}"].numpy()) if kind == "edge normalised" else np.ones(node)
            expected = brute_force_node(alphas, beta, part, node, strength[1])
            assert set(getattr(found, part)[2 * (node - 2) : 2 * (node - 1)]) == expected
        assert space.decode(space.encode(found)) == found
        assert discretize(space, alphas, betas if kind == "edge normalised" else None, strength[0]) == found
        sensitive += found != genotype(alphas)
    assert sensitive == 0 or kind != "plain"
    assert sensitive > 0 or kind == "plain" or (kind, spread) == ("sigmoid", 1e-3)


@pytest.mark.parametrize("published", [DARTS_V1, DARTS_V2, PCDARTS])
def test_published_genotypes_come_back(published, rng):
    alphas, _ = darts_parameters(rng, 0.1)
    for part in PARTS:
        for place, (op, source) in enumerate(getattr(published, part)):
            alphas[f"{part}_{source}_{place // 2 + 2}"][OPERATIONS.index(op)] += 3
    assert genotype(alphas) == published


def test_none_weakens_an_edge_and_is_never_chosen():
    alphas = {label: torch.zeros(8) for label in darts_parameters(np.random.default_rng(0), 1)[0]}
    alphas["normal_1_3"] = torch.tensor([5.0, 0, 0, 0, 2, 0, 0, 0])  # its best is weaker than a uniform edge
    alphas["normal_2_3"] = torch.tensor([2.0, 0, 0, 0, 0, 0, 2, 0])
    found = genotype(alphas)
    assert found.normal[2:4] == (("max_pool_3x3", 0), ("dil_conv_3x3", 2))
    everywhere_none = genotype({label: torch.tensor([9.0] + 7 * [0.0]) for label in alphas})
    assert everywhere_none.reduce[:2] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))


@pytest.mark.parametrize("name", ["nas-bench-201", "nas-bench-macro"])
def test_tuples_against_all_architectures(name, rng):
    """The architecture whose selected alphas have the largest sum, among all of the space."""
    space = load_space(name)
    labels = list(space.select((0,) * len(space.sizes)))
    every = np.array(list(space))
    for _ in range(3):
        values = rng.normal(size=(len(labels), space.sizes[0]))
        alphas = dict(zip(labels, torch.tensor(values)))
        best = tuple(every[values[np.arange(len(labels)), every].sum(1).argmax()].tolist())
        found = discretize(space, alphas)
        assert found == best
        assert space.select(found) == strongest(alphas)
        assert space.decode(space.encode(found)) == found
        assert discretize(space, dict(reversed(alphas.items()))) == best  # labels count, not their order


def test_spaces_with_layers(rng):
    space = with_layers(load_space("darts"), norms=("batch-norm", "group-norm"), acts=("relu", "silu", "gelu"))
    alphas, betas = darts_parameters(rng, 1.0)
    alphas |= {"norm": torch.tensor([0.1, 0.2]), "act": torch.tensor([0.0, 0.5, 0.2])}
    found = discretize(space, alphas, betas)
    assert (found.norm, found.act) == ("group-norm", "silu")
    assert found.arch == genotype(alphas, betas)
    assert space.decode(space.encode(found)) == found


def test_bad_parameters_are_refused(rng):
    space, (alphas, betas) = load_space("nas-bench-201"), darts_parameters(rng, 1.0)
    with pytest.raises(UserError, match="'reduce_4_5': expected a label of the parameters"):
        genotype({label: alpha for label, alpha in alphas.items() if label != "reduce_4_5"})
    with pytest.raises(UserError, match="8 parameters for 'reduce_0_2'"):
        genotype(alphas | {"reduce_0_2": torch.zeros(5)})
    with pytest.raises(UserError, match="2 parameters for 'normal_2'"):
        genotype(alphas, betas | {"normal_2": torch.zeros(3)})
    with pytest.raises(UserError, match="finite"):
        genotype(alphas | {"normal_0_2": torch.full((8,), float("nan"))})
    with pytest.raises(UserError, match="edge_0_1"):
        discretize(space, alphas)
    with pytest.raises(UserError, match="tuples of choices"):
        discretize(load_space("nas-bench-101"), alphas)
    with pytest.raises(UserError, match="finite"):
        strongest({"x": torch.tensor([float("inf"), 0.0])})

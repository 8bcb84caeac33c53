"""Discretisation: against brute force over whole cells, and in the published notations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from nas.supernet.discretization import Rules, discretize, genotype, strongest
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


# -- rules ---------------------------------------------------------------------------------------------------------


def capped_cell(alphas: dict, cap: int) -> tuple[list, int]:
    """The normal cell with at most `cap` skip connections, by numpy; how many were taken off."""
    table = {label: softmax(a.numpy())[1:] for label, a in alphas.items() if label.startswith("normal")}
    for removed in itertools.count():
        cell = []
        for node in range(2, 6):
            best = sorted(range(node), key=lambda source: -table[f"normal_{source}_{node}"].max())[:2]
            cell += [(int(table[f"normal_{source}_{node}"].argmax()), source, node) for source in sorted(best)]
        skips = [(table[f"normal_{s}_{n}"][op], s, n) for op, s, n in cell if OPERATIONS[op + 1] == "skip_connect"]
        if len(skips) <= cap:
            return [(OPERATIONS[op + 1], source) for op, source, _ in cell], removed
        _, source, node = min(skips)
        table[f"normal_{source}_{node}"][OPERATIONS.index("skip_connect") - 1] = 0


@pytest.mark.parametrize("cap", [0, 2])
def test_the_cap_takes_the_weakest_skip_connections_off_the_normal_cell(cap, rng):
    removed = []
    for _ in range(5):
        alphas, _ = darts_parameters(rng, 1.0)
        for label in alphas:
            alphas[label][3] += 1.5
        rules = Rules(passing=dict.fromkeys(alphas, (3,)), skip_cap=cap)
        found, plain = discretize(Darts(), alphas, rules=rules), genotype(alphas)
        expected, count = capped_cell(alphas, cap)
        assert list(found.normal) == expected
        assert found.reduce == plain.reduce
        removed.append(count)
    assert max(removed) > 2


def test_the_cap_on_tuples_gives_an_edge_its_next_best():
    space = load_space("nas-bench-201")
    labels = list(space.select((0,) * 6))
    rows = [[0, 5, 0, 1, 0], [0, 4, 2, 0, 0], [0, 3, 0, 0, 1], [9, 0, 0, 0, 0], [0, 0, 0, 9, 0], [0, 6, 0, 0, 5]]
    alphas = {label: torch.tensor(row, dtype=torch.float32) for label, row in zip(labels, rows)}
    rules = Rules(passing=dict.fromkeys(labels, (1,)), skip_cap=2)
    assert discretize(space, alphas) == (1, 1, 1, 0, 3, 1)
    # softmax of the skips: .97, .83, .81, -, -, .73: the last two leave
    assert discretize(space, alphas, rules=rules) == (1, 1, 4, 0, 3, 4)


def test_candidates_left_out_are_not_chosen(rng):
    alphas, _ = darts_parameters(rng, 1.0)
    edges = [label for label in alphas if label.endswith("_4")]
    kept = dict.fromkeys(edges[:2], (2,)) | dict.fromkeys(edges[2:4], (0,))
    kept |= dict.fromkeys(edges[4:], (5, 6))
    found = discretize(Darts(), alphas, rules=Rules(kept=kept))
    pairs = dict.fromkeys(found.normal[4:6])
    assert pairs.keys() == {("avg_pool_3x3", 0), ("avg_pool_3x3", 1)}
    assert {op for op, _ in found.reduce[4:6]} <= {"sep_conv_5x5", "dil_conv_3x3"}
    none = {label: (0,) for label in alphas if label.endswith("_2")}
    with pytest.raises(UserError, match="restricted to `none`"):
        discretize(Darts(), alphas, rules=Rules(kept=none))
    space = load_space("nas-bench-201")
    six = {label: torch.arange(5.0) for label in space.select((0,) * 6)}
    assert discretize(space, six, rules=Rules(kept={"edge_0_2": (0, 3, 1)})) == (4, 3, 4, 4, 4, 4)


def test_gates_below_the_threshold_leave_edges_empty_but_nodes_keep_one(rng):
    space = load_space("nas-bench-201")
    labels = ["edge_0_1", "edge_0_2", "edge_1_2", "edge_0_3", "edge_1_3", "edge_2_3"]
    gates = [
        *([0.9, 0.2, 0.3, 0.1, 0.1],),  # the gate of `none` counts for nothing; alone into its node it stays
        *([0.1, 0.1, 0.1, 0.86, 0.9], [0.5, 0.1, 0.84, 0.1, 0.1]),  # the second is below
        *([0.1, 0.1, 0.1, 0.5, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6], [0.99, 0.5, 0.1, 0.1, 0.1]),  # all are: the best stays
    ]
    alphas = {label: torch.tensor(row).logit() for label, row in zip(labels, gates)}
    rules = Rules(empty=dict.fromkeys(labels, (0,)), threshold=0.85)
    chosen = space.select(discretize(space, alphas, strength=torch.sigmoid, rules=rules))
    assert [chosen[label] for label in labels] == [2, 4, 0, 0, 4, 0]
    parameters, _ = darts_parameters(rng, 2.0)
    rules = Rules(empty=dict.fromkeys(parameters, (0,)), threshold=0.85)
    assert discretize(Darts(), parameters, strength=torch.sigmoid, rules=rules) == genotype(
        parameters, strength=torch.sigmoid
    )

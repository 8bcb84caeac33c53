"""Restricted labels: as if the other candidates had never been there; candidates taken out of a draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.supernet.network import Supernet
from nas.supernet.relaxation import Dirichlet, GumbelHard, GumbelSoft, Relaxation, Sigmoid, Softmax, UniformPath
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError

RELAXATIONS = [Softmax(), Sigmoid(), GumbelSoft(5.0, 1.0), GumbelHard(), Dirichlet(), UniformPath()]


class Counting(nn.Linear):
    """A linear layer that counts how often it runs."""

    runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return super().forward(x)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layers() -> list[Counting]:
    torch.manual_seed(0)
    return [Counting(4, 4).double() for _ in range(5)]


def net(relaxation: Relaxation, candidates: list) -> Supernet:
    return Supernet(nn.Sequential(Choice(candidates, "x")), relaxation, generator=generator()).double()


@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=lambda r: type(r).__name__)
def test_a_restricted_label_is_one_with_fewer_candidates(relaxation):
    kept = (1, 2, 4)
    whole, few = net(relaxation, layers()), net(relaxation, [layers()[k] for k in kept])
    values = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        whole.alphas["x"].copy_(values)
        few.alphas["x"].copy_(values[list(kept)])
    whole.restrict("x", (4, 1, 2))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(4):
        whole.generator.manual_seed(7)
        few.generator.manual_seed(7)
        expected, found = few(x), whole(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    if not isinstance(relaxation, UniformPath):
        (slope,) = torch.autograd.grad(found.square().sum(), [whole.alphas["x"]])
        (reference,) = torch.autograd.grad(expected.square().sum(), [few.alphas["x"]])
        torch.testing.assert_close(slope[list(kept)], reference)
        assert slope[[0, 3]].tolist() == [0, 0]
    candidates = whole.network[0].candidates
    assert candidates[0].runs == candidates[3].runs == 0
    assert sum(candidate.runs for candidate in candidates) > 0


def test_one_candidate_has_weight_one_and_all_lift_the_restriction():
    found = net(Softmax(), layers())
    found.restrict("x", [3])
    weights = found.draw().weights["x"]
    assert weights.values.tolist() == [0, 0, 0, 1, 0]
    assert weights.active == (3,)
    assert found.candidates_of("x") == (3,)
    found.restrict("x", range(5))
    assert found.kept == {}
    assert found.candidates_of("x") == (0, 1, 2, 3, 4)
    torch.testing.assert_close(found.draw().weights["x"].values, found.alphas["x"].softmax(0))


def test_without_takes_candidates_out_and_leaves_the_others_weights():
    found = net(Softmax(), layers())
    found.restrict("x", (0, 2, 3))
    before = found.draw().weights["x"].values
    with found.without("x", (2,)):
        inside = found.draw().weights["x"]
        assert inside.values.tolist() == [before[0], 0, 0, before[3], 0]
        assert inside.active == (0, 3)
        with found.without("x"):
            assert torch.equal(found(torch.ones(2, 4).double()), torch.zeros(2, 4).double())
        assert found.draw().weights["x"].active == (0, 3)
    assert torch.equal(found.draw().weights["x"].values, before)


@pytest.mark.parametrize(
    ("label", "kept", "named"),
    [("y", (0,), "one of x"), ("x", (), "at least one"), ("x", (1, 1), "different"), ("x", (5,), "0 to 4")],
)
def test_bad_restrictions_are_named(label, kept, named):
    with pytest.raises(UserError, match=named):
        net(Softmax(), layers()).restrict(label, kept)

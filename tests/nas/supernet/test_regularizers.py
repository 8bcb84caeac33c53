"""Regularisers of alpha: against plain loops over floats, finite differences, and known extremes."""

from __future__ import annotations

import math

import pytest
import torch

from nas.supernet.regularizers import (
    auxiliary_skip_weight,
    beta_decay,
    entropy,
    linear,
    zero_one,
)
from search_spaces.common.errors import UserError


def alphas():
    """Two tables with different numbers of candidates and one lone edge."""
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 5), (2, 3, 3), (7,)]
    return [(2 * torch.randn(*s, generator=g, dtype=torch.float64)).requires_grad_() for s in shapes]


def rows(tensors):
    return [row for t in tensors for row in t.detach().reshape(-1, t.shape[-1]).tolist()]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def brute_beta(tensors):
    return mean(math.log(math.fsum(math.exp(a) for a in row)) for row in rows(tensors))


def gates(tensors):
    return [1 / (1 + math.exp(-a)) for row in rows(tensors) for a in row]


def brute_entropy(tensors):
    total = []
    for row in rows(tensors):
        whole = math.fsum(math.exp(a) for a in row)
        total.append(-math.fsum(math.exp(a) / whole * math.log(math.exp(a) / whole) for a in row))
    return mean(total)


TERMS = {
    "beta decay": (beta_decay, brute_beta),
    "zero-one l2": (zero_one, lambda t: -mean((g - 0.5) ** 2 for g in gates(t))),
    "zero-one l1": (lambda t: zero_one(t, "l1"), lambda t: -mean(abs(g - 0.5) for g in gates(t))),
    "entropy": (entropy, brute_entropy),
}


@pytest.mark.parametrize("name", TERMS)
def test_values_are_those_of_a_plain_loop(name):
    term, brute = TERMS[name]
    tensors = alphas()
    assert term(tensors).item() == pytest.approx(brute(tensors), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences_of_the_plain_loop(name):
    term, brute = TERMS[name]
    tensors = alphas()
    term(tensors).backward()
    for t in tensors:
        flat = t.detach().view(-1)
        for i in range(0, flat.numel(), 3):
            sides = []
            for h in (1e-5, -2e-5):
                flat[i] += h
                sides.append(brute(tensors))
            flat[i] += 1e-5
            assert t.grad.view(-1)[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8)


def test_the_gradient_of_beta_decay_is_the_softmax():
    """Which is why it works against alpha wherever softmax is large (beta-DARTS, section 3)."""
    table = alphas()[0]
    beta_decay([table]).backward()
    torch.testing.assert_close(table.grad, table.detach().softmax(-1) / 4)


def test_extremes():
    undecided, decided = torch.zeros(3, 8), torch.tensor([[100.0, -100, -100], [-100, 100, -100]])
    assert entropy([undecided]).item() == pytest.approx(math.log(8))
    assert entropy([decided]).item() == pytest.approx(0, abs=1e-6)
    assert zero_one([undecided]).item() == 0
    assert zero_one([decided]).item() == pytest.approx(-0.25)
    assert zero_one([decided], "l1").item() == pytest.approx(-0.5)
    assert beta_decay([undecided]).item() == pytest.approx(math.log(8))
    # Far from 0, where exp would overflow.
    assert beta_decay([torch.tensor([1000.0, 1000.0])]).item() == pytest.approx(1000 + math.log(2))


def test_ramps_reach_what_the_papers_code_prints():
    """50 * epoch / 100 (beta-DARTS); (T - epoch) / T and half a cosine (DARTS-)."""
    assert [linear(0.0, 50.0, e, 100) for e in (0, 1, 50, 99)] == pytest.approx([0, 0.5, 25, 49.5])
    assert [auxiliary_skip_weight(e) for e in (0, 10, 49, 50)] == pytest.approx([1, 0.8, 0.02, 0])
    assert auxiliary_skip_weight(10, 40, decay="cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert auxiliary_skip_weight(20, 40, start=2.0, decay="slow-cosine") == pytest.approx(2 * math.sqrt(0.5))
    assert [auxiliary_skip_weight(50, 50, decay=d) for d in ("cosine", "slow-cosine")] == pytest.approx([0, 0])
    assert [linear(3.0, 1.0, e, 4) for e in range(5)] == [3, 2.5, 2, 1.5, 1]


@pytest.mark.parametrize("bad", [[], [torch.zeros(2, 0)], [torch.tensor(1.0)]])
def test_terms_need_alphas(bad):
    for term, _ in TERMS.values():
        with pytest.raises(UserError, match="none empty"):
            term(bad)


def test_bad_settings_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="'l2'"):
        zero_one(alphas(), "l3")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        auxiliary_skip_weight(1, 50, decay="cosin")
    for epoch in (-1, 51):
        with pytest.raises(UserError, match="an epoch from 0 to 50"):
            auxiliary_skip_weight(epoch, 50)

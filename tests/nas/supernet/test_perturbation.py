"""Perturbed mixing weights: ascent against corners, grids and random draws; the simplex; old bits afterwards."""

from __future__ import annotations

import pytest
import torch

from nas.supernet.perturbation import adversarial_perturbation, radius_at, random_perturbation, to_simplex
from search_spaces.common.errors import UserError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(size, seed, tilt=1.0):
    """One leaf tensor [1, size] and a convex loss of the rows of such a tensor: |v A|^2 + tilt g' v."""
    g = rng(seed)
    root, slope = torch.randn(size, size, generator=g).double(), torch.randn(size, generator=g).double()
    values = torch.randn(1, size, generator=g).double().requires_grad_()

    def at(v):
        return (v @ root).square().sum(-1) + tilt * v @ slope

    return values, at


def test_the_radius_grows_as_in_the_papers_code():
    assert [radius_at(e, 50) for e in (0, 25, 50)] == pytest.approx([0.03, 0.165, 0.3])
    assert radius_at(5, 10, end=0.4) == pytest.approx(0.215)


def test_to_simplex_row_by_row():
    """Cut to [0, 1], divide by the sum, or all to the largest: each row by hand."""
    rows = torch.tensor([[0.2, 0.3, 0.5], [-1.0, 0.5, 2.0], [-0.3, -0.1, -0.2], [0.5, 0.5, 1.0]])
    expected = torch.tensor([[0.2, 0.3, 0.5], [0, 1 / 3, 2 / 3], [0, 1, 0], [0.25, 0.25, 0.5]])
    torch.testing.assert_close(to_simplex(rows), expected)
    torch.testing.assert_close(to_simplex(rows[2]), expected[2])
    wild = to_simplex(3 * torch.randn(500, 4, generator=rng()))
    assert (wild >= 0).all()
    torch.testing.assert_close(wild.sum(-1), torch.ones(500))


def test_random_noise_is_uniform_in_the_box_and_goes_away():
    values = torch.full((200, 50), 3.0, requires_grad=True)
    before = values.detach().clone()
    with random_perturbation([values], 0.2, rng(), project=None):
        noise = (values - before).detach()
        assert noise.abs().max() <= 0.2 + 1e-6
        # Uniform on [-r, r]: mean 0, variance r^2 / 3, a quarter below -r / 2; 10,000 draws.
        assert noise.mean().abs() < 5 * 0.2 / 3**0.5 / 100
        assert noise.var().item() == pytest.approx(0.04 / 3, rel=0.05)
        assert (noise < -0.1).float().mean().item() == pytest.approx(0.25, abs=0.02)
        values.sum().backward()  # the block trains with gradients
    assert torch.equal(values, before)


def test_random_noise_is_the_generators():
    values = torch.full((2, 3), 1 / 3, requires_grad=True)
    drawn = []
    for seed in (1, 1, 2):
        with random_perturbation([values], 0.1, rng(seed)):
            drawn.append(values.detach().clone())
            torch.testing.assert_close(drawn[-1].sum(-1), torch.ones(2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("seed", range(5))
def test_in_two_dimensions_ascent_reaches_the_maximum_of_a_grid(seed):
    """A slope steep enough that its signs hold in the whole box, whose worst point is then one corner."""
    values, at = quadratic(2, seed, tilt=40.0)
    axis = torch.linspace(-0.3, 0.3, 61, dtype=torch.float64)
    grid = at(values.detach() + torch.cartesian_prod(axis, axis)).max().item()
    with adversarial_perturbation(lambda: at(values).sum(), [values], 0.3, rng(seed), project=None):
        assert at(values).item() == pytest.approx(grid, rel=1e-9)


def test_ascent_beats_random_draws_of_the_same_budget():
    """Convex quadratics in six dimensions without a dominant slope; nine evaluations each, in 20 problems."""
    wins = 0
    for seed in range(20):
        values, at = quadratic(6, seed)
        with adversarial_perturbation(lambda: at(values).sum(), [values], 0.3, rng(seed), project=None):  # noqa: B023
            found = at(values).item()
        draws, g = [at(values).item()], rng(100 + seed)
        for _ in range(8):
            with random_perturbation([values], 0.3, g, project=None):
                draws.append(at(values).item())
        assert found >= draws[0]
        wins += found >= max(draws)
    assert wins >= 19


def test_on_the_simplex_ascent_finds_the_worst_mixture_within_reach():
    """A linear loss of both signs over three mixing weights: against all mixtures of a grid that noise could reach."""
    price = torch.tensor([-1.0, -0.5, 2.0])
    values = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    start, axis = (values @ price).item(), torch.linspace(-0.15, 0.15, 13)
    reach = (to_simplex(values.detach() + torch.cartesian_prod(axis, axis, axis)) @ price).max().item()
    with adversarial_perturbation(lambda: values @ price, [values], 0.15, rng()):
        torch.testing.assert_close(values.sum(), torch.tensor(1.0))
        gain, largest = (values @ price).item() - start, reach - start
        assert 0.9 * largest < gain < largest + 1e-6  # dividing by the sum holds the last steps back a little
        assert (values >= 0).all()
    assert values.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_one_step_is_the_sign_of_the_gradient_at_the_random_start():
    values, at = quadratic(4, 3)
    with random_perturbation([values], 0.05, rng(7), project=None):
        start = values.detach().clone()
        (slope,) = torch.autograd.grad(at(values).sum(), [values])
    expected = values.detach() + (start + 0.1 * slope.sign() - values.detach()).clamp(-0.05, 0.05)
    with adversarial_perturbation(lambda: at(values).sum(), [values], 0.05, rng(7), steps=1, project=None):
        torch.testing.assert_close(values.detach(), expected)


def test_a_loss_that_only_falls_leaves_the_values_alone():
    """At its maximum every perturbation lowers the loss, so none is kept."""
    values = torch.zeros(5, requires_grad=True)
    with adversarial_perturbation(lambda: -values.square().sum(), [values], 0.1, rng(), project=None):
        assert not values.any()


def test_calls_statistics_and_bits():
    """steps + 2 losses; BatchNorm's statistics are back when the block begins, the values when it ends by an error."""
    norm, x = torch.nn.BatchNorm1d(3), torch.randn(8, 3, generator=rng())
    values = torch.rand(2, 3, generator=rng()).requires_grad_()
    before, statistics, calls = values.detach().clone(), [b.clone() for b in norm.buffers()], []

    def loss():
        calls.append(None)
        return (norm(x) * values[0] + values[1]).square().sum()

    def block():
        with adversarial_perturbation(loss, [values], 0.1, rng(), project=None, buffers=list(norm.buffers())):
            assert not torch.equal(values, before)
            assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), statistics))
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        block()
    assert len(calls) == 9
    assert torch.equal(values, before)
    assert values.grad is None


def test_bad_settings_are_refused():
    values = torch.zeros(3, requires_grad=True)
    with pytest.raises(UserError, match="a radius of at least 0"), random_perturbation([values], -0.1, rng()):
        pass
    with pytest.raises(UserError, match="leaf tensors"), random_perturbation([values.softmax(0)], 0.1, rng()):
        pass
    with (
        pytest.raises(UserError, match="at least one step"),
        adversarial_perturbation(lambda: values.sum(), [values], 0.1, rng(), steps=0),
    ):
        pass

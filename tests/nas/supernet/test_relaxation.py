"""Relaxations: gradients with the noise held fixed, distributions of samples, which candidates run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, log_softmax, softmax

from nas.supernet.relaxation import Dirichlet, GumbelHard, GumbelSoft, Sigmoid, Softmax, UniformPath, noiseless
from search_spaces.common.errors import UserError

ALPHA = np.array([0.3, -0.8, 1.1, 0.2])
COSTS = np.array([1.0, -2.0, 0.5, 3.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objective(weights):
    """A curved function of the weights, so that the gradient depends on where they are."""
    return (weights * torch.as_tensor(COSTS) + (weights - 0.2) ** 3).sum()


def gradient(relaxation, progress: float = 0.3, seed: int = 0) -> np.ndarray:
    alpha = torch.tensor(ALPHA, requires_grad=True)
    drawn = relaxation.draw(alpha, generator(seed), progress)
    return torch.autograd.grad(objective(drawn.values), alpha)[0].numpy()


def differences(weights_of) -> np.ndarray:
    """Central differences of the objective of `weights_of(alpha)`, a NumPy function with its noise fixed."""
    steps = 1e-5 * np.eye(len(ALPHA))
    values = [[float(objective(torch.as_tensor(weights_of(ALPHA + s * e)))) for s in (1, -1)] for e in steps]
    return np.array([(up - down) / 2e-5 for up, down in values])


def noise(seed: int) -> np.ndarray:
    return -np.log(torch.empty(len(ALPHA), dtype=torch.float64).exponential_(generator=generator(seed)).numpy())


@pytest.mark.parametrize(
    ("relaxation", "formula"),
    [
        (Softmax(), softmax),
        (Sigmoid(), expit),
        (GumbelSoft(5.0, 0.5), lambda a: softmax((log_softmax(a) + noise(0)) / (5.0 + 0.3 * (0.5 - 5.0)))),
    ],
)
def test_smooth_relaxations_against_the_formula(relaxation, formula):
    drawn = relaxation.draw(torch.tensor(ALPHA), generator(), 0.3)
    assert drawn.active is None
    np.testing.assert_allclose(drawn.values, formula(ALPHA), rtol=1e-12)
    np.testing.assert_allclose(gradient(relaxation), differences(formula), rtol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_hard_gumbel_is_one_in_value_and_soft_in_gradient(seed):
    relaxation, progress = GumbelHard(), 0.8
    logits = (log_softmax(ALPHA) + noise(seed)) / (10 + 0.8 * (0.1 - 10))
    chosen = int(logits.argmax())
    drawn = relaxation.draw(torch.tensor(ALPHA), generator(seed), progress)
    assert drawn.active == (chosen,)
    assert drawn.values.tolist() == np.eye(len(ALPHA))[chosen].tolist()

    def surrogate(alpha):  # the factor of the candidate that runs: a constant plus its soft weight
        soft = softmax((log_softmax(alpha) + noise(seed)) / (10 + 0.8 * (0.1 - 10)))
        return np.eye(len(alpha))[chosen] * (1 - softmax(logits)[chosen] + soft[chosen])

    np.testing.assert_allclose(gradient(relaxation, progress, seed), differences(surrogate), rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_dirichlet_gradient_against_quantiles(seed):
    """With the noise fixed, a Gamma sample moves along its quantile; SciPy has these."""
    state = generator(seed)
    concentration = np.where(ALPHA > 0, ALPHA, np.expm1(ALPHA)) + 1
    gamma = torch._standard_gamma(torch.tensor(concentration + 1), generator=state).numpy()
    uniform = 1 - torch.rand(len(ALPHA), generator=state, dtype=torch.float64).numpy()
    levels = stats.gamma.cdf(gamma, concentration + 1)

    def sample(alpha):
        a = np.where(alpha > 0, alpha, np.expm1(alpha)) + 1
        parts = stats.gamma.ppf(levels, a + 1) * uniform ** (1 / a)
        return parts / parts.sum()

    drawn = Dirichlet().draw(torch.tensor(ALPHA), generator(seed), 0.0)
    np.testing.assert_allclose(drawn.values, sample(ALPHA), rtol=1e-9)
    np.testing.assert_allclose(gradient(Dirichlet(), seed=seed), differences(sample), rtol=2e-3, atol=1e-5)


def test_dirichlet_samples_and_mean_gradient():
    """Marginals are Beta distributions; the gradient of the mean is known: d/da_i of a_0 / sum(a)."""
    state, alpha = generator(), torch.tensor([0.5, -0.7, 0.0], dtype=torch.float64, requires_grad=True)
    draws = torch.stack([Dirichlet().draw(alpha, state, 0.0).values for _ in range(1500)])
    concentration = np.array([1.5, np.exp(-0.7), 1.0])
    total = concentration.sum()
    for k in range(3):
        beta = stats.beta(concentration[k], total - concentration[k])
        assert stats.kstest(draws[:, k].detach().numpy(), beta.cdf).pvalue > 1e-3
    (found,) = torch.autograd.grad(draws[:, 0].mean(), alpha)
    expected = (np.array([total, 0, 0]) - concentration[0]) / total**2 * np.array([1, np.exp(-0.7), 1])
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_dirichlet_stays_exact_at_small_concentrations():
    """At concentrations of 1e-3 nearly every sample is a corner, each with probability 1 / K; none is NaN."""
    alpha = torch.full((4,), float(np.log(1e-3)), requires_grad=True)
    state = generator()
    draws = torch.stack([Dirichlet().draw(alpha, state, 0.0).values for _ in range(400)])
    assert (draws.max(1).values > 0.99).float().mean() > 0.95
    assert stats.chisquare(np.bincount(draws.argmax(1), minlength=4)).pvalue > 1e-3
    (found,) = torch.autograd.grad(draws.sum(), alpha)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("relaxation", "shares"), [(GumbelHard(), softmax(ALPHA)), (UniformPath(), np.full(4, 0.25))])
def test_sampled_candidates_have_their_probabilities(relaxation, shares):
    state, alpha = generator(), torch.tensor(ALPHA)
    draws = [relaxation.draw(alpha, state, 0.5) for _ in range(1000)]
    chosen = [draw.active[0] for draw in draws]
    assert all(draw.values.tolist() == np.eye(4)[k].tolist() for draw, k in zip(draws, chosen))
    assert stats.chisquare(np.bincount(chosen, minlength=4), 1000 * shares).pvalue > 1e-3


def test_soft_gumbel_becomes_hard_as_its_temperature_falls():
    alpha, means = torch.tensor(ALPHA), []
    for progress in (0.0, 0.5, 1.0):
        state = generator()
        means.append(
            float(np.mean([GumbelSoft(5, 0.01).draw(alpha, state, progress).values.max() for _ in range(200)]))
        )
    assert 0.25 < means[0] < means[1] < means[2]
    assert means[2] > 0.97


@pytest.mark.parametrize("relaxation", [GumbelSoft(5, 1), GumbelHard(), Dirichlet(), UniformPath()])
def test_draws_come_from_the_generator_alone(relaxation):
    alpha = torch.tensor(ALPHA)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [relaxation.draw(alpha, state, 0.5).values for state in [generator(3)] for _ in range(5)]
    assert torch.equal(before, torch.get_rng_state())
    again = [relaxation.draw(alpha, state, 0.5).values for state in [generator(3)] for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="above zero"):
        GumbelSoft(1.0, 0.0)
    with pytest.raises(UserError, match="above zero"):
        GumbelHard(start=float("nan"))
    with pytest.raises(UserError, match="0 to 1"):
        GumbelHard().draw(torch.zeros(2), generator(), 1.5)


def test_the_noiseless_mixture_is_the_mean_of_samples():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.tensor([0.5, -0.4, 1.2, 0.0])
    for relaxation in (Dirichlet(), GumbelHard(1.0, 1.0), Softmax(), Sigmoid()):
        samples = torch.stack([relaxation.draw(alpha, generator, 0.0).values for _ in range(4000)])
        mean = noiseless(relaxation).draw(alpha, generator, 0.0).values
        torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.03)  # three standard errors

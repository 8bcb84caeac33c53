"""The Gaussian process against its closed formulas with an explicit inverse, and against scikit-learn's."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

import predictors.gaussian_process
from predictors.gaussian_process import correlation, fit_process
from search_spaces.common.errors import UserError

KERNELS = {"rbf": RBF, "matern-5/2": lambda length: Matern(length, nu=2.5)}


@pytest.fixture(params=list(KERNELS))
def kernel(request):
    return request.param


@pytest.fixture
def problem(rng):
    """50 noisy values of a smooth function of four columns, with a mean of zero."""
    inputs = rng.normal(size=(50, 4))
    targets = np.sin(inputs[:, 0]) + 0.5 * inputs[:, 1] ** 2 + 0.1 * rng.normal(size=50)
    return inputs, targets - targets.mean()


def logarithm_of_likelihood(kernel, inputs, targets, log_length, log_amplitude, log_noise):
    """Rasmussen and Williams, equation 5.8, with an inverse and a determinant."""
    amplitude = np.exp(log_amplitude)
    matrix = amplitude * correlation(kernel, cdist(inputs, inputs) / np.exp(log_length))
    matrix += (np.exp(log_noise) + 1e-8 * amplitude) * np.eye(len(inputs))
    return -0.5 * (
        targets @ np.linalg.inv(matrix) @ targets + np.linalg.slogdet(matrix)[1] + len(inputs) * np.log(2 * np.pi)
    )


def test_correlations_are_those_of_scikit_learn(kernel, rng):
    first, second = rng.normal(size=(20, 3)), rng.normal(size=(30, 3))
    np.testing.assert_allclose(
        correlation(kernel, cdist(first, second) / 0.7), KERNELS[kernel](0.7)(first, second), rtol=1e-10
    )


def test_mean_and_deviation_are_the_closed_formulas(kernel, problem, rng, monkeypatch):
    inputs, targets = problem
    process = fit_process(inputs, targets, kernel=kernel)
    places = np.concatenate([rng.normal(size=(40, 4)), inputs[:3]])
    matrix = process.amplitude * correlation(kernel, cdist(inputs, inputs) / process.length)
    inverse = np.linalg.inv(matrix + (process.noise + 1e-8 * process.amplitude) * np.eye(len(inputs)))
    cross = process.amplitude * correlation(kernel, cdist(places, inputs) / process.length)
    mean, std = process.predict(places, std=True)
    np.testing.assert_allclose(mean, cross @ inverse @ targets, atol=1e-6)
    variance = process.amplitude - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    np.testing.assert_allclose(std, np.sqrt(variance), atol=1e-5)
    assert std[-3:].max() ** 2 < process.noise < std[:-3].max() ** 2  # where it was told, surer than one measurement
    monkeypatch.setattr(predictors.gaussian_process, "CHUNK", 7)
    again = process.predict(places, std=True)
    np.testing.assert_allclose(again, (mean, std), rtol=1e-7)
    assert np.isnan(process.predict(places)[1]).all()


def test_far_from_the_data_it_returns_to_the_prior(kernel, problem):
    process = fit_process(*problem, kernel=kernel)
    mean, std = process.predict(np.full((1, 4), 1e3 * process.length), std=True)
    assert mean[0] == pytest.approx(0, abs=1e-9)
    assert std[0] == pytest.approx(np.sqrt(process.amplitude), rel=1e-9)


def test_it_is_scikit_learns_process_with_the_same_hyper_parameters(kernel, problem, rng):
    inputs, targets = problem
    process = fit_process(inputs, targets, kernel=kernel)
    both = ConstantKernel(process.amplitude) * KERNELS[kernel](process.length)
    theirs = GaussianProcessRegressor(both, alpha=process.noise + 1e-8 * process.amplitude, optimizer=None)
    theirs.fit(inputs, targets)
    places = rng.normal(size=(30, 4))
    mean, std = theirs.predict(places, return_std=True)
    np.testing.assert_allclose(process.predict(places, std=True), (mean, std), atol=1e-5)


def test_hyper_parameters_maximise_the_marginal_likelihood(kernel, problem):
    """The gradient by central differences vanishes, and scikit-learn finds nothing better from ten starts."""
    inputs, targets = problem
    process = fit_process(inputs, targets, kernel=kernel)
    found = np.log([process.length, process.amplitude, process.noise])
    best = logarithm_of_likelihood(kernel, inputs, targets, *found)
    for axis in range(3):
        step = 1e-3 * np.eye(3)[axis]
        ahead, behind = (logarithm_of_likelihood(kernel, inputs, targets, *(found + s)) for s in (step, -step))
        assert (ahead - behind) / 2e-3 == pytest.approx(0, abs=0.02)
        assert ahead < best + 1e-4
        assert behind < best + 1e-4
    start = ConstantKernel(1.0, (1e-3, 1e4)) * KERNELS[kernel](1.0) + WhiteKernel(0.1)
    theirs = GaussianProcessRegressor(start, n_restarts_optimizer=10, random_state=0).fit(inputs, targets)
    assert best > theirs.log_marginal_likelihood_value_ - 0.05


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_it_finds_the_noise_that_was_added(noise, rng):
    inputs = rng.uniform(-2, 2, (150, 2))
    targets = np.sin(2 * inputs[:, 0]) * inputs[:, 1] + noise * rng.normal(size=150)
    process = fit_process(inputs, targets - targets.mean())
    assert np.sqrt(process.noise) == pytest.approx(noise, rel=0.35)


def test_deviations_cover_what_was_held_out(kernel):
    """Eight functions drawn from the process' own prior: nine tenths to all of the values lie within two deviations,
    and about two thirds within one."""
    inside = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        inputs = rng.uniform(-2, 2, (120, 2))
        covariance = KERNELS[kernel](0.8)(inputs) + 1e-10 * np.eye(120)
        values = np.linalg.cholesky(covariance) @ rng.normal(size=120)
        noisy = values[:60] + 0.1 * rng.normal(size=60)
        process = fit_process(inputs[:60], noisy - noisy.mean(), kernel=kernel)
        mean, std = process.predict(inputs[60:], std=True)
        inside.append(np.abs(values[60:] - noisy.mean() - mean) / std)
    share = np.concatenate(inside)
    assert 0.88 < (share < 2).mean() <= 1
    assert 0.5 < (share < 1).mean() < 0.85


def test_equal_inputs_and_few_points_are_no_trouble(kernel):
    inputs = np.repeat(np.arange(3.0)[:, None], 2, 0)  # each of three points twice, with different values
    targets = np.array([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0])
    process = fit_process(inputs, targets, kernel=kernel)
    assert process.predict(inputs[::2])[0] == pytest.approx([-1.5, 0, 1.5], abs=0.4)
    mean, std = fit_process(np.zeros((3, 1)), np.array([-1.0, 0.0, 1.0]), kernel=kernel).predict(
        np.zeros((1, 1)), std=True
    )
    assert mean[0] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(std).all()


def test_an_unknown_kernel_is_refused(problem):
    with pytest.raises(UserError, match="matern-5/2"):
        fit_process(*problem, kernel="matern-3/2")

"""Gaussian process regression with its few hyper-parameters set by the marginal likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from search_spaces.common.names import match

KERNELS = ("rbf", "matern-5/2")
CHUNK = 8192  # rows predicted at a time
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # starts of the length scale, in units of the median distance


@dataclass(frozen=True)
class Process:
    """A fitted process: kernel amplitude * k(distance / length) + noise on the diagonal, zero mean."""

    kernel: str
    inputs: np.ndarray
    length: float
    amplitude: float
    noise: float
    factor: np.ndarray  # lower Cholesky factor of the kernel matrix
    weights: np.ndarray  # its inverse times the targets

    def predict(self, inputs: np.ndarray, *, std: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Mean [M] and standard deviation [M] (without noise; NaN unless `std`) at inputs [M, F]."""
        mean, deviation = np.empty(len(inputs)), np.full(len(inputs), np.nan)
        for start in range(0, len(inputs), CHUNK):
            rows = slice(start, start + CHUNK)
            cross = self.amplitude * correlation(self.kernel, _distances(inputs[rows], self.inputs) / self.length)
            mean[rows] = cross @ self.weights
            if std:
                half = scipy.linalg.solve_triangular(self.factor, cross.T, lower=True, check_finite=False)
                deviation[rows] = np.sqrt(np.maximum(self.amplitude - (half**2).sum(0), 0))
        return mean, deviation


def correlation(kernel: str, distance: np.ndarray) -> np.ndarray:
    """`rbf` or `matern-5/2` of a scaled distance.

    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 4.9 and 4.17.
    """
    if kernel == "rbf":
        return np.exp(-0.5 * distance**2)
    scaled = np.sqrt(5) * distance
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)


def fit_process(inputs: np.ndarray, targets: np.ndarray, *, kernel: str = "rbf") -> Process:
    """The process with the highest marginal likelihood over length, amplitude and noise (equation 5.8 there), found by
    L-BFGS from the best of several lengths. inputs: [N, F], standardised; targets: [N], zero mean.

    Errors: UserError for an unknown kernel.
    """
    kernel = match(kernel, KERNELS, "a kernel")
    distance = _distances(inputs, inputs)
    typical = float(np.median(distance[np.triu_indices(len(inputs), 1)])) or 1.0

    def cost(parameters: np.ndarray) -> float:
        length, amplitude, noise = np.exp(parameters)
        matrix = amplitude * correlation(kernel, distance / length)
        matrix[np.diag_indices_from(matrix)] += noise + 1e-8 * amplitude
        try:
            factor = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return 1e10
        half = scipy.linalg.solve_triangular(factor, targets, lower=True, check_finite=False)
        return float(0.5 * half @ half + np.log(np.diag(factor)).sum())

    starts = [np.log([typical * length, targets.var(), 0.1 * targets.var()]) for length in LENGTHS]
    start = min(starts, key=cost)
    bounds = [(np.log(typical / 50), np.log(typical * 50)), *((v - 8, v + 6) for v in start[1:])]
    found = scipy.optimize.minimize(cost, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
    length, amplitude, noise = np.exp(found.x)
    matrix = amplitude * correlation(kernel, distance / length)
    matrix[np.diag_indices_from(matrix)] += noise + 1e-8 * amplitude
    factor = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
    weights = scipy.linalg.cho_solve((factor, True), targets, check_finite=False)
    return Process(kernel, inputs, float(length), float(amplitude), float(noise), factor, weights)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances by one matrix product, several times faster than pair by pair; exact to 1e-7 of the norms."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0))

"""Curvature in alpha: against torch's whole Hessian, known spectra, and Robust DARTS's stop as a running record."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nas.supernet.hessian import early_stop, extreme_eigenvalues, hessian_vector_product
from search_spaces.common.errors import UserError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(spectrum, seed=0):
    """A quadratic whose Hessian has these eigenvalues in a random basis."""
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=rng(seed), dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    alpha = torch.randn(size, generator=rng(seed + 1), dtype=torch.float64).requires_grad_()
    return alpha, lambda: alpha @ matrix @ alpha / 2 + alpha.sum()


SPECTRA = {
    "positive": [5.0, 3.0, 1.0, 0.5],
    "negative": [-4.0, -2.5, -1.0],
    "the larger magnitude is negative": [-10.0, 2.0, 1.0, 0.0],
    "repeated": [3.0, 3.0, 3.0, -1.0, -1.0],
    "one value": [2.0] * 6,
    "flat": [0.0] * 4,
    "one outlier": [50.0] + [0.01 * i for i in range(30)],
    "one end found long before the other": [10.0] + [0.1 * i - 5 for i in range(80)],
    "the other end long before": [-10.0] + [5 - 0.1 * i for i in range(80)],
    "plus and minus": [7.0, -7.0, 7.0, -7.0, 0.0],
    "one alpha": [-1.5],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name):
    spectrum = SPECTRA[name]
    alpha, loss = with_spectrum(spectrum)
    found = extreme_eigenvalues(loss, [alpha], rng())
    assert found == pytest.approx((min(spectrum), max(spectrum)), abs=1e-3 * max(1e-6, *map(abs, spectrum)))


def test_fewer_products_than_dimensions_do():
    """One for each different eigenvalue: 3 for 40 alphas; the loss itself is called once."""
    counted = []

    def counting(loss):
        def call():
            counted.clear()
            value = loss()
            leaf = value * 1.0
            leaf.register_hook(lambda g: counted.append(None))
            return leaf

        return call

    alpha, loss = with_spectrum([4.0] * 10 + [1.0] * 20 + [-2.0] * 10)
    assert extreme_eigenvalues(loss, [alpha], rng()) == pytest.approx((-2, 4), abs=1e-9)
    assert extreme_eigenvalues(loss, [alpha], rng(), steps=3) == pytest.approx((-2, 4), abs=1e-9)
    coarse = extreme_eigenvalues(loss, [alpha], rng(), steps=2)
    assert -2 < coarse[0] < coarse[1] < 4  # Ritz values lie inside
    assert extreme_eigenvalues(counting(loss), [alpha], rng()) == pytest.approx((-2, 4), abs=1e-9)
    assert len(counted) == 1  # one gradient of the loss; products go through its graph


def mixture(dtype=torch.float64):
    """A small supernet's loss: two tables of alpha, one of them unused by the loss in part."""
    g = rng(3)
    x, y = torch.randn(10, 4, generator=g, dtype=dtype), torch.randn(10, 4, generator=g, dtype=dtype)
    weights = torch.randn(3, 4, 4, generator=g, dtype=dtype)

    def at(first, second):
        h = sum(p * torch.tanh(x @ w) for p, w in zip(first.softmax(-1)[0], weights))
        h = sum(p * torch.sin(h @ w) for p, w in zip(second.softmax(-1), weights))
        return 3 * (h - y).square().mean()

    tables = [torch.randn(2, 3, generator=g, dtype=dtype).requires_grad_() for _ in range(1)]
    tables.append(torch.randn(3, generator=g, dtype=dtype).requires_grad_())
    return tables, at


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_against_torchs_whole_hessian(dtype, tolerance):
    tables, at = mixture(dtype)
    blocks = torch.autograd.functional.hessian(at, tuple(tables))
    whole = torch.cat([torch.cat([b.reshape(t.numel(), -1) for b in row], 1) for t, row in zip(tables, blocks)])
    product, size = hessian_vector_product(lambda: at(*tables), tables)
    vector = torch.randn(size, generator=rng(9), dtype=torch.float64)
    torch.testing.assert_close(product(vector), whole.double() @ vector, rtol=tolerance, atol=tolerance)
    expected = torch.linalg.eigvalsh(whole.double())
    assert expected[0] < 0 < expected[-1]
    found = extreme_eigenvalues(lambda: at(*tables), tables, rng(), tolerance=1e-6)
    assert found == pytest.approx(
        (expected[0].item(), expected[-1].item()), abs=tolerance * expected.abs().max().item()
    )


def test_losses_without_curvature_or_without_use_of_alpha_have_eigenvalue_0():
    alpha, other = torch.zeros(4, requires_grad=True), torch.ones(2, requires_grad=True)
    assert extreme_eigenvalues(lambda: (2 * alpha).sum(), [alpha, other], rng()) == (0, 0)
    # Curved in one table, linear in another.
    found = extreme_eigenvalues(lambda: 3 * other.square().sum() + alpha.sum(), [alpha, other], rng())
    assert found == pytest.approx((0, 6), abs=1e-5)


def test_a_loss_that_is_no_number_gives_nan():
    alpha = torch.ones(3, requires_grad=True)
    assert all(map(math.isnan, extreme_eigenvalues(lambda: (alpha - 2).sqrt().sum(), [alpha], rng())))
    with pytest.raises(UserError, match="at least one alpha"):
        extreme_eigenvalues(lambda: alpha.square().sum(), [torch.zeros(0, requires_grad=True)], rng())


def running_stop(eigenvalues, epochs, ratio=1.3, first=10):
    """The rule told as the paper does, one epoch at a time: (epoch asked, epoch returned to) of the first stop."""
    smooth = {}
    for n, epoch in enumerate(epochs):
        if n >= 2:  # two newer measurements complete the window around measurement n - 2
            smooth[n - 2] = sum(eigenvalues[max(0, n - 4) : n + 1]) / min(5, n + 1)
        past = n - 2 - 4
        if past >= 0 and epochs[past] >= first and smooth[n - 2] > ratio * smooth[past]:
            return epoch, epochs[past]
    return None


@pytest.mark.parametrize("every", [1, 2])
def test_the_stop_is_the_papers_rule(every):
    """Random histories that grow slowly or fast, at any point; a search asks after every measurement."""
    g, stops = np.random.default_rng(0), 0
    for _ in range(60):
        epochs = list(range(0, 50, every))
        history = list(np.exp(np.cumsum(g.normal(g.uniform(-0.01, 0.12), 0.05, len(epochs)))))
        expected = running_stop(history, epochs)
        found = None
        for n in range(1, len(epochs) + 1):
            back = early_stop(history[:n], epochs[:n])
            if back is not None:
                found = (epochs[n - 1], back)
                break
        assert found == expected
        stops += found is not None
    assert 10 < stops < 60  # both cases occur


def test_a_step_in_the_curvature_stops_and_a_plateau_does_not():
    assert early_stop([0.2] * 40) is None
    assert early_stop([0.2] * 20 + [0.25] * 20) is None  # 1.25 times
    history = [0.2] * 20 + [0.4] * 20
    stops = [n for n in range(1, 41) if early_stop(history[:n]) is not None]
    # The average around 19 (17 to 21) is .28, 1.4 times the one around 15; it is complete after 22 measurements.
    assert stops[0] == 22
    assert early_stop(history[:22]) == 15
    # The same growth too early in the search does not count.
    assert all(early_stop(([0.2] * 5 + [0.4] * 20)[:n]) is None for n in range(1, 26))


def test_no_ratio_no_stop():
    assert early_stop([-1.0] * 18 + [5.0] * 3) is None
    assert early_stop([1.0] * 18 + [5.0] * 3) == 14
    assert early_stop([1.0] * 18 + [math.nan] * 8) is None
    assert early_stop([]) is None


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="odd window"):
        early_stop([1.0] * 30, window=4)
    with pytest.raises(UserError, match="one epoch for each of 3"):
        early_stop([1.0] * 3, [0, 1])

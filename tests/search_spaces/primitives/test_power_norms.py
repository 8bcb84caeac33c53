"""PowerNorm, PN-V and Unified Normalization against the published rules, written out channel by channel in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search_spaces.common.errors import UserError
from search_spaces.primitives.power_norms import GroupScaling, PowerNorm, power_norm, power_norm_v
from search_spaces.primitives.unified_norm import UnifiedNorm, unified_norm

EPS = 1e-5


class SlowPower:
    """PowerNorm on rows [n, C] after the group scaling, one channel at a time."""

    def __init__(self, channels, warmup, keep=0.9):
        self.warmup, self.keep, self.t = warmup, keep, 0
        self.phi, self.nu = [1.0] * channels, [0.0] * channels

    def step(self, rows, grads, weight, bias):
        self.t += 1
        out, back = np.zeros_like(rows), np.zeros_like(rows)
        weight_grad = np.zeros(rows.shape[1])
        for c in range(rows.shape[1]):
            x, dy = rows[:, c], grads[:, c]
            own = sum(v * v for v in x) / len(x)
            used = own if self.t <= self.warmup else self.phi[c]
            if self.t < self.warmup:
                self.phi[c] = self.phi[c] * (self.t - 1) / self.t + own / self.t
            self.phi[c] = self.keep * self.phi[c] + (1 - self.keep) * own
            z = x / np.sqrt(used + EPS)
            out[:, c] = weight[c] * z + bias[c]
            weight_grad[c] = (dy * z).sum()
            g = weight[c] * dy - (1 - self.keep) * self.nu[c] * z
            self.nu[c] += (g * z).mean()
            back[:, c] = g / np.sqrt(own + EPS)
        return out, back, weight_grad


def scaled(x, groups):
    """(GroupScaling(x), the function that takes its gradient back), rows [n, C]."""
    parts = x.reshape(len(x), groups, -1)
    r = np.sqrt((parts**2).mean(2, keepdims=True) + EPS)
    y = parts / r

    def back(g):
        g = g.reshape(parts.shape)
        return ((g - y * (g * y).mean(2, keepdims=True)) / r).reshape(x.shape)

    return y.reshape(x.shape), back


@pytest.mark.parametrize("groups", [1, 2])
def test_power_norm_forward_and_backward_through_warm_up_and_beyond(groups):
    rng = np.random.default_rng(0)
    module = power_norm(4, layout="tokens", groups=groups, warmup=5).double()
    slow = SlowPower(4, warmup=5)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rng.normal(1, 0.3, 4)))
        module.bias.copy_(torch.tensor(rng.normal(0, 0.3, 4)))
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    for step in range(12):
        x = rng.normal(0.2, 1 + 0.3 * step, (3, 6, 4))
        dy = rng.normal(0, 1, (3, 6, 4))
        given = torch.tensor(x, requires_grad=True)
        y = module(given)
        module.zero_grad()
        y.backward(torch.tensor(dy))
        rows, back = scaled(x.reshape(-1, 4), groups)
        out, g, weight_grad = slow.step(rows, dy.reshape(-1, 4), weight, bias)
        np.testing.assert_allclose(y.detach().numpy().reshape(-1, 4), out, atol=1e-10)
        np.testing.assert_allclose(given.grad.numpy().reshape(-1, 4), back(g), atol=1e-10)
        np.testing.assert_allclose(module.weight.grad.numpy(), weight_grad, atol=1e-9)
        np.testing.assert_allclose(module.bias.grad.numpy(), dy.reshape(-1, 4).sum(0), atol=1e-9)
        np.testing.assert_allclose(module.running_moment.numpy(), slow.phi, atol=1e-12)
        np.testing.assert_allclose(module.gradient_average.numpy(), slow.nu, atol=1e-10)
    expected = rows / np.sqrt(np.array(slow.phi) + EPS) * weight + bias
    np.testing.assert_allclose(module.eval()(given).detach().numpy().reshape(-1, 4), expected, atol=1e-10)


def test_power_norm_in_the_first_step_keeps_the_whole_gradient():
    """nu is 0 and phi that of the batch: the gradient is that of a constant divisor."""
    module = PowerNorm(3)
    x = torch.randn(5, 7, 3, requires_grad=True)
    scaled_x = module.scaling(x)
    moment = scaled_x.detach().square().mean((0, 1))
    expected = torch.autograd.grad((scaled_x / (moment + EPS).sqrt()).pow(3).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(module(x).pow(3).sum(), x)[0], expected)


def test_power_norm_of_images_is_that_of_tokens():
    tokens, images = power_norm(4, layout="tokens", warmup=1), power_norm(4, warmup=1)
    for _ in range(4):
        x = torch.randn(2, 4, 3, 5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = images(a), tokens(b.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)
        torch.testing.assert_close(y, z)
        y.pow(2).sum().backward(), z.pow(2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_group_scaling_gives_unit_power_per_group():
    x = torch.randn(2, 6, 4, 4) * 3
    y = GroupScaling(2, channel_dim=1)(x)
    torch.testing.assert_close(y.view(2, 2, 3, 4, 4).square().mean(2), torch.ones(2, 2, 4, 4), atol=1e-3, rtol=0)


def test_pn_v_gradient_is_exact_and_evaluation_is_a_running_mean():
    module = power_norm_v(3, layout="tokens", groups=3).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    module = power_norm_v(2, layout="tokens").double()
    running = np.ones(2)
    for _ in range(3):
        x = np.random.default_rng(0).normal(size=(2, 4, 2))
        rows, _ = scaled(x.reshape(-1, 2), 1)
        y = module(torch.tensor(x))
        np.testing.assert_allclose(y.detach().numpy().reshape(-1, 2), rows / np.sqrt((rows**2).mean(0) + EPS))
        running = 0.9 * running + 0.1 * (rows**2).mean(0)
    np.testing.assert_allclose(
        module.eval()(torch.tensor(x)).detach().numpy().reshape(-1, 2), rows / np.sqrt(running + EPS)
    )


class SlowUnified:
    """Unified Normalization on rows [n, C] with lists for windows."""

    def __init__(self, channels, window, warmup, filtered):
        self.channels, self.m, self.warmup, self.filtered = channels, window, warmup, filtered
        self.t, self.skips = 0, 0
        self.running, self.ema = np.ones(channels), np.zeros(channels)
        self.squares = {i: np.zeros(channels) for i in range(window)}
        self.gzs = {i: np.zeros(channels) for i in range(window)}

    def step(self, rows, grads, weight, bias):
        self.t += 1
        slot = self.t % self.m
        own = (rows**2).mean(0)
        before = np.sqrt(np.array(list(self.squares.values())))
        spread = ((before - before.mean()) ** 2).sum() / (before.size - 1)
        self.squares[slot] = own
        skip = self.m == 1
        if self.filtered and self.t >= self.warmup:
            outlier = False
            for c in range(self.channels):
                values = [self.squares[i][c] for i in range(self.m)]
                geometric = float(np.prod(values)) ** (1 / self.m)
                outlier = outlier or sum(values) / self.m - geometric > spread * self.m
            if outlier:
                self.squares[slot] = self.running.copy()
                self.skips += 1
                skip = True
        own_only = skip or self.t <= self.m or self.t < self.warmup
        used = own if own_only else np.prod(list(self.squares.values()), axis=0) ** (1 / self.m)
        r = np.sqrt((used + EPS) / (self.running + EPS))
        r = np.minimum(np.maximum(r, 0.2), 5)
        if skip or self.t <= max(1000, self.warmup):
            r = np.ones(self.channels)
        self.running = 0.9 * self.running + 0.1 * used
        z = rows / np.sqrt(used + EPS)
        g = grads * weight * r
        gz = (g * z).mean(0)
        self.gzs[slot] = self.ema.copy() if skip else gz
        mean = gz if own_only else sum(self.gzs.values()) / self.m
        self.ema = 0.9 * self.ema + 0.1 * mean
        back = (g - (mean if skip else self.ema) * z) / np.sqrt(used + EPS)
        return weight * z + bias, back, (grads * z * r).sum(0)


@pytest.mark.parametrize(
    ("window", "warmup", "filtered"),
    [(4, 6, True), (4, 6, False), (2, 6, True), (1, 6, False), (4, 2, True), (4, 0, False)],
)
@pytest.mark.parametrize("layout", ["tokens", "channels-first"])
def test_unified_norm_through_warm_up_outliers_and_gradient_compensation(window, warmup, filtered, layout):
    rng = np.random.default_rng(1)
    module = unified_norm(3, layout=layout, window=window, warmup=warmup, filter_outliers=filtered).double()
    slow = SlowUnified(3, window, warmup, filtered)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rng.normal(1, 0.3, 3)))
        module.bias.copy_(torch.tensor(rng.normal(0, 0.3, 3)))
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    skipped_before = 0
    for step in range(24):
        if step == 14:  # from here on gradients are compensated
            module.batches.fill_(2000)
            slow.t = 2000
        scale = [1.0, 1.1, 0.9, 1.3, 0.6][step % 5] * (30.0 if step in (9, 18) else 1.0)
        x = rng.normal(0.2, scale, (4, 5, 3))
        dy = rng.normal(0.1, 1, (4, 5, 3))
        given = torch.tensor(x if layout == "tokens" else x.transpose(0, 2, 1).copy(), requires_grad=True)
        y = module(given)
        module.zero_grad()
        y.backward(torch.tensor(dy if layout == "tokens" else dy.transpose(0, 2, 1).copy()))
        out, back, weight_grad = slow.step(x.reshape(-1, 3), dy.reshape(-1, 3), weight, bias)
        y, gradient = (t.detach() if layout == "tokens" else t.detach().transpose(1, 2) for t in (y, given.grad))
        np.testing.assert_allclose(y.numpy().reshape(-1, 3), out, atol=1e-9)
        np.testing.assert_allclose(gradient.numpy().reshape(-1, 3), back, atol=1e-9)
        np.testing.assert_allclose(module.weight.grad.numpy(), weight_grad, atol=1e-8)
        np.testing.assert_allclose(module.running_moment.numpy(), slow.running, rtol=1e-10)
        assert int(module.skipped) == slow.skips
        if step in (9, 18) and filtered:
            assert slow.skips > skipped_before  # the outlier was meant to be one
        skipped_before = slow.skips
    y = module.eval()(given).detach()
    y = y.numpy() if layout == "tokens" else y.transpose(1, 2).numpy()
    np.testing.assert_allclose(
        y.reshape(-1, 3), x.reshape(-1, 3) / np.sqrt(slow.running + EPS) * weight + bias, atol=1e-9
    )


def test_unified_norm_averages_after_warm_up_and_only_then():
    module = UnifiedNorm(2, window=2, warmup=4, filter_outliers=False)
    for t, scale in enumerate([1.0, 2.0, 4.0, 8.0, 2.0], start=1):
        y = module(torch.full((1, 3, 2), scale))
        before = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8}[t]  # sigma = sqrt(this batch's * the one's before) from t = 4 on
        sigma = scale if t < 4 else (scale * before) ** 0.5
        torch.testing.assert_close(y, torch.full((1, 3, 2), scale / sigma), atol=1e-4, rtol=0)


def test_wrong_settings():
    with pytest.raises(UserError, match="divisor of 6 channels; did you mean '3'"):
        power_norm(6, groups=4)
    with pytest.raises(UserError):
        power_norm(6, warmup=-1)
    with pytest.raises(UserError):
        unified_norm(6, window=0)

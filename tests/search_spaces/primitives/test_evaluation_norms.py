"""alpha-BN, UnMix-TNS and AdaB2N against their rules written out, and the ways in and out of evaluation modes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.adab2n import AdaB2N, adab2n, adab2n_loss, set_tasks
from search_spaces.primitives.evaluation_norms import AlphaBN, UnMixTNS, alpha_bn, unmix_tns


def trained_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    )
    for _ in range(5):
        model(torch.randn(4, 3, 8, 8) * 2 + 1)
    return model.eval()


def trained_norm(channels: int = 3) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels))
        norm.bias.copy_(torch.randn(channels))
    for _ in range(4):
        norm(torch.randn(4, channels, 5, 5) * 2 + 1)
    return norm.eval()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_alpha_bn_mixes_both_statistics(alpha):
    norm = trained_norm()
    x = torch.randn(4, 3, 6, 6) * 3 - 1
    rows = x.permute(1, 0, 2, 3).reshape(3, -1).double()
    mean = (1 - alpha) * norm.running_mean + alpha * rows.mean(1)
    variance = (1 - alpha) * norm.running_var + alpha * rows.var(1)  # unbiased
    expected = (x - mean.view(1, 3, 1, 1)) / (variance + 1e-5).sqrt().view(1, 3, 1, 1)
    expected = expected * norm.weight.view(1, 3, 1, 1) + norm.bias.view(1, 3, 1, 1)
    torch.testing.assert_close(AlphaBN(norm, alpha).eval()(x), expected.float(), atol=1e-5, rtol=1e-5)
    if alpha == 0:
        torch.testing.assert_close(AlphaBN(norm, alpha).eval()(x), norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [alpha_bn, unmix_tns])
def test_modes_come_and_go(mode):
    model = trained_model()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 3, 8, 8) - 2
    before = model(x)
    modules = list(model.modules())
    with mode(model):
        assert not torch.allclose(model(x), before, atol=1e-3)
        assert not any(m.training for m in model.modules())
    assert list(model.modules()) == modules
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError), mode(model):
        model(x[:, :1])  # too few channels
    assert torch.equal(model(x), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_modes_want_batch_norms():
    with pytest.raises(UserError, match="running statistics"), alpha_bn(nn.Sequential(nn.Linear(2, 2))):
        pass
    with pytest.raises(UserError, match="between 0 and 1"), alpha_bn(trained_model(), 2):
        pass
    with pytest.raises(UserError, match="is a BatchNorm"), alpha_bn(nn.BatchNorm2d(3)):
        pass


def slow_unmix(x, means, variances, rate, norm):
    """One batch [B, C, n], component by component, in numpy; returns output, means, variances."""
    out = np.zeros_like(x)
    mean_steps, variance_steps = np.zeros_like(means), np.zeros_like(variances)
    for b, sample in enumerate(x):
        m, v = sample.mean(1), sample.var(1)
        similarity = [m @ mu / (np.linalg.norm(m) * np.linalg.norm(mu)) / 0.07 for mu in means]
        e = np.exp(np.array(similarity) - max(similarity))
        p = e / e.sum()
        mixed_m = np.array([(1 - p[k]) * means[k] + p[k] * m for k in range(len(p))])
        mixed_v = np.array([(1 - p[k]) * variances[k] + p[k] * v for k in range(len(p))])
        centre = mixed_m.mean(0)
        total = mixed_v.mean(0) + (mixed_m**2).mean(0) - centre**2
        z = (sample - centre[:, None]) / np.sqrt(total + 1e-5)[:, None]
        out[b] = z * norm.weight.detach().numpy()[:, None] + norm.bias.detach().numpy()[:, None]
        for k in range(len(p)):
            mean_steps[k] += p[k] * (m - means[k]) / len(x)
            variance_steps[k] += p[k] * (v - variances[k]) / len(x)
    return out, means + rate * mean_steps, variances + rate * variance_steps


def test_unmix_tns_over_batches():
    norm = trained_norm().double()
    module = UnMixTNS(norm, components=4, batch_size=16, generator=torch.Generator().manual_seed(0)).eval()
    assert module.rate == pytest.approx(1 - 0.9**0.25)
    means, variances = module.means.numpy().copy(), module.variances.numpy().copy()
    rng = np.random.default_rng(0)
    for step in range(4):
        x = rng.normal(step, 1 + step, (5, 3, 12))
        y = module(torch.tensor(x.reshape(5, 3, 3, 4))).detach()
        expected, means, variances = slow_unmix(x, means, variances, module.rate, norm)
        np.testing.assert_allclose(y.numpy().reshape(5, 3, 12), expected, atol=1e-9)
        np.testing.assert_allclose(module.means.numpy(), means, atol=1e-10)
        np.testing.assert_allclose(module.variances.numpy(), variances, atol=1e-10)


def test_unmix_tns_components_begin_with_the_moments_of_the_source():
    """The mixture of the components has the mean and the variance of the training, whatever their number."""
    norm = trained_norm(2000)
    with torch.no_grad():
        norm.running_var.fill_(4.0)
    module = UnMixTNS(norm, components=16, generator=torch.Generator().manual_seed(0))
    between = module.means.var(0, correction=0).mean().item()
    assert between + module.variances.mean().item() == pytest.approx(4, rel=0.02)
    assert (module.means - norm.running_mean).mean().abs() < 0.03
    assert module.variances.unique().tolist() == [2.0]
    one = UnMixTNS(norm, components=1)
    assert torch.equal(one.means[0], norm.running_mean)
    assert torch.equal(one.variances[0], norm.running_var)


def test_unmix_tns_leaves_batch_norms_of_vectors_alone():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    x = torch.randn(4, 3)
    assert torch.equal(UnMixTNS(norm.eval()).eval()(x), norm(x))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_adab2n_without_tasks_is_batch_norm_with_another_momentum(kappa):
    module = adab2n(3, kappa=kappa).double()
    mean, variance, eta = np.zeros(3), np.ones(3), None
    rng = np.random.default_rng(0)
    for n in range(1, 6):
        x = rng.normal(1, 2, (4, 3, 2, 3))
        y = module(torch.tensor(x))
        m, v = x.mean((0, 2, 3)), x.var((0, 2, 3))
        np.testing.assert_allclose(
            y.detach().numpy(), (x - m[:, None, None]) / np.sqrt(v + 1e-5)[:, None, None], atol=1e-10
        )
        if kappa == 0:
            eta = 1 / n
        elif kappa == 1:
            eta = 0.1
        else:
            eta = 0.1**kappa if eta is None else eta / (eta + 0.9**kappa)
        mean, variance = mean + eta * (m - mean), variance + eta * (v - variance)
        np.testing.assert_allclose(module.running_mean.numpy(), mean, atol=1e-6)  # eta is kept in float32
        np.testing.assert_allclose(module.running_var.numpy(), variance, atol=1e-6)
        expected = ((m - mean) ** 2).mean() + ((v - variance) ** 2).mean()
        assert module.loss.item() == pytest.approx(expected, rel=1e-5)
    expected = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    np.testing.assert_allclose(module.eval()(torch.tensor(x)).detach().numpy(), expected, atol=1e-5)


def test_adab2n_weighs_tasks():
    module = AdaB2N(2, tasks=3).double()
    with torch.no_grad():
        module.theta.copy_(torch.tensor([0.5, -1.0, 2.0]))
    tasks = [0, 1, 1, 1, 0, 1]
    module.set_tasks(torch.tensor(tasks))
    x = np.random.default_rng(0).normal(size=(6, 2, 3, 3))
    shares = np.array([math.exp(0.5) + 2, math.exp(-1.0) + 4])  # the third task was not seen yet
    shares /= shares.sum()
    weights = np.array([shares[t] / tasks.count(t) for t in tasks])
    assert weights.sum() == pytest.approx(1)
    mean = (weights[:, None] * x.mean((2, 3))).sum(0)
    variance = (weights[:, None] * ((x - mean[:, None, None]) ** 2).mean((2, 3))).sum(0)
    y = module(torch.tensor(x))
    expected = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-10)
    module.loss.backward()
    assert module.theta.grad[:2].abs().min() > 0
    assert module.theta.grad[2] == 0
    module.set_tasks(torch.tensor([0, 0, 2, 2, 2, 2]))
    weights = module.sample_weights(module.batch_tasks)
    missing = math.exp(-1.0) / (sum(math.exp(t) for t in (0.5, -1.0, 2.0)) + 6)
    assert weights.sum().item() == pytest.approx(1 - missing)


def test_adab2n_in_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), adab2n(4, tasks=2), nn.Conv2d(4, 4, 3), adab2n(4, tasks=2))
    with pytest.raises(UserError, match="forward pass"):
        adab2n_loss(model)
    set_tasks(model, torch.tensor([0, 1, 1]))
    model(torch.randn(3, 3, 8, 8))
    torch.testing.assert_close(adab2n_loss(model), model[1].loss + model[3].loss)
    adab2n_loss(model).backward()
    copy.deepcopy(model)
    with pytest.raises(UserError, match="from 0 to 1"):
        set_tasks(model, torch.tensor([0, 2]))
    with pytest.raises(UserError, match="kappa"):
        adab2n(4, kappa=1.5)

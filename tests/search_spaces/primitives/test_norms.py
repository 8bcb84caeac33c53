"""Per-sample, batch and point-wise normalisations against torch, timm, scipy and formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch
from oracles import allow_timm_without_torchvision
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives import batch_norms, norms, pointwise_norms, transformer_norms
from search_spaces.primitives.registry import NORMS

torch.manual_seed(0)
IMAGES = torch.randn(4, 12, 5, 6) * 2 + 1
TOKENS = torch.randn(4, 9, 12) * 2 + 1


def random_parameters_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


def same_parameters(ours: nn.Module, oracle: nn.Module) -> nn.Module:
    random_parameters_(ours)
    oracle.load_state_dict(ours.state_dict())
    return oracle


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# -- names that were there before -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("batch-norm", nn.BatchNorm2d),
        ("layer-norm", lambda channels: nn.GroupNorm(1, channels)),
        ("group-norm", lambda channels: nn.GroupNorm({7: 7, 48: 24, 64: 32}[channels], channels)),
        ("instance-norm", lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    ],
)
@pytest.mark.parametrize("channels", [7, 48, 64])
def test_existing_names_keep_their_behaviour(name, make, channels):
    torchs, ours = make(channels), NORMS[name](channels)
    random_parameters_(torchs)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(3, channels, 4, 4)
    for training in (True, False):
        assert torch.equal(torchs.train(training)(x), ours.train(training)(x))


def test_groups_are_as_many_as_possible_up_to_32():
    assert [norms.group_norm(c).num_groups for c in (48, 20, 7, 64, 37)] == [24, 20, 7, 32, 1]


# -- against libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [norms.layer_norm, norms.group_norm, norms.instance_norm, batch_norms.batch_norm])
def test_token_layout(make):
    """The definition, statistic by statistic."""
    module = random_parameters_(make(12, layout="tokens")).train()
    x = TOKENS.double()
    view = {
        norms.layer_norm: x,
        norms.group_norm: x.view(4, 9, 12, 1),
        norms.instance_norm: x,
        batch_norms.batch_norm: x,
    }[make]
    dims = {norms.layer_norm: 2, norms.group_norm: (1, 3), norms.instance_norm: 1, batch_norms.batch_norm: (0, 1)}[make]
    variance, mean = torch.var_mean(view, dims, correction=0, keepdim=True)
    expected = ((view - mean) / (variance + 1e-5).sqrt()).reshape(x.shape) * module.weight + module.bias
    close(module(TOKENS), expected.float())


def test_batch_norm_of_tokens_is_that_of_images():
    tokens, images = batch_norms.batch_norm(12, layout="tokens"), nn.BatchNorm2d(12)
    for _ in range(3):
        x = torch.randn(4, 12, 5, 6)
        close(tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape), images(x))
    close(tokens.running_var, images.running_var)


def test_rms_norm_is_torchs():
    ours = norms.rms_norm(12, layout="tokens")
    oracle = same_parameters(ours, nn.RMSNorm(12, eps=1e-6))
    close(ours(TOKENS), oracle(TOKENS))
    first = norms.RMSNorm(12, channel_dim=1)
    first.load_state_dict(ours.state_dict())
    close(first(IMAGES), oracle(IMAGES.movedim(1, -1)).movedim(-1, 1))


def test_layer_norm_2d_is_torchs_layer_norm_at_each_position():
    ours = norms.layer_norm_2d(12)
    oracle = same_parameters(ours, nn.LayerNorm(12))
    close(ours(IMAGES), oracle(IMAGES.movedim(1, -1)).movedim(-1, 1))


def test_frn_tlu_is_timms(importable):
    allow_timm_without_torchvision()
    timm = importable("timm.layers.filter_response_norm")
    ours = norms.frn_tlu(12)
    assert ours.eps == 1e-6
    oracle = same_parameters(ours, timm.FilterResponseNormTlu2d(12, eps=1e-6))
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    close(ours(x), oracle(y))
    ours(x).square().sum().backward(), oracle(y).square().sum().backward()
    close(x.grad, y.grad, 1e-4)


def test_layer_norm_2d_is_timms(importable):
    allow_timm_without_torchvision()
    timm = importable("timm.layers.norm")
    ours = norms.LayerNorm2d(12, eps=1e-6)
    oracle = same_parameters(ours, timm.LayerNorm2d(12, eps=1e-6))
    close(ours(IMAGES), oracle(IMAGES))


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, math.sqrt(math.pi / 2)])
@pytest.mark.parametrize("layout", ["channels-first", "tokens"])
def test_l1_batch_norm_over_steps(factor, layout):
    module = batch_norms.l1_batch_norm(3, layout=layout, factor=factor)
    random_parameters_(module)
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    mean, deviation = np.zeros(3), np.ones(3)
    rng = np.random.default_rng(0)
    for _ in range(4):
        x = rng.normal(1, 2, (2, 5, 3))
        flat = x.reshape(-1, 3)
        m = flat.mean(0)
        d = np.abs(flat - m).mean(0)
        expected = (x - m) / (factor * d + 1e-5) * weight + bias
        mean, deviation = 0.9 * mean + 0.1 * m, 0.9 * deviation + 0.1 * d
        given = torch.tensor(x, dtype=torch.float32)
        y = module(given) if layout == "tokens" else module(given.transpose(1, 2)).transpose(1, 2)
        np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-5)
    given = given if layout == "tokens" else given.transpose(1, 2)
    y = module.eval()(given).detach()
    y = y if layout == "tokens" else y.transpose(1, 2)
    np.testing.assert_allclose(y.numpy(), (x - mean) / (factor * deviation + 1e-5) * weight + bias, atol=1e-5)


def test_scaled_l1_norms_match_the_l2_norms_on_gaussian_data():
    x = torch.randn(64, 4096)
    scaled, plain = (make(4096, layout="tokens") for make in (norms.l1_layer_norm_scaled, norms.l1_layer_norm))
    assert abs(scaled(x).std().item() - 1) < 0.01
    assert abs(plain(x).std().item() - math.sqrt(math.pi / 2)) < 0.01
    big = torch.randn(20_000, 3) * 5 + 2
    assert (batch_norms.L1BatchNorm(3, factor=math.sqrt(math.pi / 2))(big).std(0) - 1).abs().max() < 0.03


def test_l1_layer_norm_by_hand():
    y = norms.l1_layer_norm(4, layout="tokens")(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    close(y, torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / 1.5, 2e-5)
    image = norms.l1_layer_norm(4)(torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1, 1).expand(2, 4, 3, 3))
    close(image[1, :, 2, 0], y[0])


def test_ln_scaling_divides_by_the_root_of_the_layer():
    for layer in (1, 4, 9):
        module = transformer_norms.ln_scaling(12, layout="tokens", layer=layer)
        close(module(TOKENS), nn.functional.layer_norm(TOKENS, (12,)) / math.sqrt(layer))
    with pytest.raises(UserError, match="counted from 1"):
        transformer_norms.ln_scaling(12, layer=0)


def test_seednorm_begins_as_rms_norm_and_follows_its_formula():
    x = TOKENS.double()
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(transformer_norms.seednorm(12, layout="tokens").double()(x), rms)
    module = random_parameters_(transformer_norms.seednorm(12, layout="tokens", heads=3).double())
    for b, n in ((0, 0), (3, 8)):
        row, head = x[b, n], 2  # channels 8..11
        seed = math.tanh((row[8:12] @ module.beta[8:12]).item())
        for c in range(4 * head, 4 * head + 4):
            gain = seed * module.alpha[c].item() + module.gamma[c].item()
            assert module(x)[b, n, c].item() == pytest.approx(gain * rms[b, n, c].item(), abs=1e-9)
    with pytest.raises(UserError, match="divisor of 12"):
        transformer_norms.seednorm(12, heads=5)


def test_crms_norm_is_rms_norm_of_the_completed_vector():
    full = TOKENS.double() - TOKENS.double().mean(-1, keepdim=True)
    ours = transformer_norms.CRMSNorm(11).double()(full[..., :-1])
    assert (ours - norms.RMSNorm(12).double()(full)[..., :-1]).abs().max() < 1e-14


# -- batch statistics -------------------------------------------------------------------------------------------------


def test_ibn_a_norms_its_halves():
    module = random_parameters_(batch_norms.ibn_a(7))
    assert module.split == [3, 4]
    x = torch.randn(3, 7, 4, 5)
    v, m = torch.var_mean(x[:, :3], (2, 3), correction=0, keepdim=True)
    w = module.instance_norm.weight.view(1, 3, 1, 1)
    close(module(x)[:, :3], (x[:, :3] - m) / (v + 1e-5).sqrt() * w + module.instance_norm.bias.view(1, 3, 1, 1))
    v, m = torch.var_mean(x[:, 3:], (0, 2, 3), correction=0, keepdim=True)
    w = module.batch_norm.weight.view(1, 4, 1, 1)
    close(module(x)[:, 3:], (x[:, 3:] - m) / (v + 1e-5).sqrt() * w + module.batch_norm.bias.view(1, 4, 1, 1))
    with pytest.raises(UserError, match="two channels"):
        batch_norms.ibn_a(1)


def test_rep_bn_adds_its_input():
    module = batch_norms.rep_bn(12, layout="tokens")
    oracle = nn.BatchNorm1d(12)
    with torch.no_grad():
        module.alpha.fill_(0.7)
    for training in (True, True, False):
        expected = oracle.train(training)(TOKENS.transpose(1, 2)).transpose(1, 2) + 0.7 * TOKENS
        close(module.train(training)(TOKENS), expected)


@pytest.mark.parametrize("layout", ["tokens", "channels-first"])
def test_prep_bn_goes_from_layer_norm_to_rep_bn(layout):
    module = batch_norms.prep_bn(12, layout=layout, steps=4, warm=2)
    twin = batch_norms.rep_bn(12, layout=layout)
    for step in range(9):
        x = torch.randn(4, 9, 12)
        layer = nn.functional.layer_norm(x, (12,))
        if layout == "channels-first":
            x, layer = (t.transpose(1, 2).reshape(4, 12, 3, 3) for t in (x, layer))
        if step < 2:
            expected = layer
            assert torch.equal(module.rep_bn.bn.running_mean, torch.zeros(12))
        else:
            share = max(0.0, 1 - (step - 2) / 4)
            expected = share * layer + (1 - share) * twin(x)
        close(module(x), expected)
    close(module.eval()(x), twin.eval()(x))
    assert module.steps_left == 0
    with pytest.raises(UserError):
        batch_norms.prep_bn(12, steps=0)


# -- point-wise -------------------------------------------------------------------------------------------------------

REFERENCES = {
    "erf": scipy.special.erf,
    "tanh": np.tanh,
    "arctan": lambda u: 2 / np.pi * np.arctan(u),
    "satursin": lambda u: np.sin(np.clip(u, -np.pi / 2, np.pi / 2)),
    "isru": lambda u: u / np.sqrt(1 + u**2),
    "expsign": lambda u: np.sign(u) * (1 - np.exp(-np.abs(u))),
    "relsign": lambda u: u / (np.sqrt(1 + u**2) + 1),
    "smoothsign": lambda u: u / (1 + np.abs(u)),
    "cubsign": lambda u: u**3 / (1 + np.abs(u) ** 3),
    "exproot": lambda u: np.sign(u) * (1 - np.exp(-np.sqrt(np.abs(u)))),
    "saturlog": lambda u: np.sign(u) * np.log(1 + np.abs(u)) / (1 + np.log(1 + np.abs(u))),
    "linear-clip": lambda u: np.clip(u, -1, 1),
    "logquad-clip": lambda u: np.clip(np.sign(u) * np.log(1 + u**2), -1, 1),
    "logsign-clip": lambda u: np.clip(np.sign(u) * np.log(1 + np.abs(u)), -1, 1),
    "power23-clip": lambda u: np.clip(np.sign(u) * np.abs(u) ** (2 / 3), -1, 1),
}


def test_the_pointwise_family_is_complete():
    assert set(REFERENCES) == set(pointwise_norms.FORMULAS)
    assert len(pointwise_norms.PRIMITIVES) == 16  # and DyT


@pytest.mark.parametrize("name", REFERENCES)
def test_pointwise_functions(name):
    u = np.concatenate([np.linspace(-30, 30, 1201), [-1e6, 1e6, 0, 1e-5, -1e-9]])
    x = torch.tensor(u, requires_grad=True)
    y = pointwise_norms.pointwise(name, x)
    np.testing.assert_allclose(y.detach().numpy(), REFERENCES[name](u), atol=1e-11)
    assert y.abs().max() <= 1 + 1e-12
    y.sum().backward()
    inside = (np.abs(u) > 1e-3) & (np.abs(np.abs(REFERENCES[name](u)) - 1) > 1e-6)
    h = 1e-6
    slope = (REFERENCES[name](u + h) - REFERENCES[name](u - h)) / (2 * h)
    np.testing.assert_allclose(x.grad.numpy()[inside], slope[inside], atol=1e-5)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "slope"), [("expsign", 1), ("logsign-clip", 1), ("saturlog", 1), ("logquad-clip", 0)])
def test_slope_at_zero_is_that_of_the_function(name, slope):
    u = torch.zeros(2, requires_grad=True)
    pointwise_norms.pointwise(name, u).sum().backward()
    assert u.grad.tolist() == [slope, slope]


@pytest.mark.parametrize("name", REFERENCES)
def test_pointwise_functions_at_the_end_of_float32(name):
    u = torch.tensor([3e38, -3e38], requires_grad=True)
    y = pointwise_norms.pointwise(name, u)
    torch.testing.assert_close(y.abs(), torch.ones(2), atol=0.02, rtol=0)  # saturlog is slow: .989
    y.sum().backward()
    assert torch.isfinite(u.grad).all()


def test_derf_and_dyt_modules():
    derf, dyt = (p.make(12, layout="tokens") for p in pointwise_norms.PRIMITIVES if p.name in ("derf", "dyt"))
    derf, dyt = (dyt, derf) if derf.name == "tanh" else (derf, dyt)
    assert {n: tuple(p.shape) for n, p in dyt.named_parameters()} == {"alpha": (1,), "weight": (12,), "bias": (12,)}
    assert derf.alpha.item() == dyt.alpha.item() == 0.5
    assert derf.shift.item() == 0
    random_parameters_(derf), random_parameters_(dyt)
    close(dyt(TOKENS), dyt.weight * torch.tanh(dyt.alpha * TOKENS) + dyt.bias)
    close(derf(TOKENS), derf.weight * torch.erf(derf.alpha * TOKENS + derf.shift) + derf.bias)
    with pytest.raises(UserError, match="satursin"):
        pointwise_norms.pointwise_norm(3, function="satursine")

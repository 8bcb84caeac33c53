"""Placements, SkipInit, Fixup and depth scaling against their formulas, their variances and brute-force paths."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives import placements, residual_scaling
from search_spaces.primitives.placements import (
    NAMES,
    Residual,
    deepnorm_alpha,
    deepnorm_beta,
    deepnorm_init_,
    mix_ln_posts,
)
from search_spaces.primitives.residual_scaling import DepthScaled, Fixup, SkipInit, fixup_

PRIMITIVES = (*placements.PRIMITIVES, *residual_scaling.PRIMITIVES)
CASES = [pytest.param(p, layout, id=f"{p.name}-{layout}") for p in PRIMITIVES for layout in p.layouts]
SHAPES = {"channels-first": (3, 6, 4, 5), "tokens": (3, 5, 6)}


def normed(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Layer normalisation over one dimension, eps 1e-5, without parameters."""
    return (x - x.mean(dim, keepdim=True)) / torch.sqrt(x.var(dim, correction=0, keepdim=True) + 1e-5)


FORMULAS = {
    "pre": lambda x, f, n: x + f(n(x)),
    "post": lambda x, f, n: n(x + f(x)),
    "sandwich": lambda x, f, n: x + n(f(n(x))),
    "peri": lambda x, f, n: x + n(f(n(x))),
    "deepnorm": lambda x, f, n: n(24**0.25 * x + f(x)),
    "layer-norm-scaling": lambda x, f, n: x + f(n(x) / math.sqrt(4)),
}


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_each_placement_is_its_formula_in_layer_4_of_12(name, layout):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[layout]) * 2 + 1
    dim = 1 if layout == "channels-first" else -1
    branch = placements.PointwiseLinear(6, dim)
    block = Residual(branch, 6, name, layer=4, layers=12, layout=layout)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oi,...i->...o", branch.weight, z.movedim(dim, -1)).add(branch.bias).movedim(-1, dim)

    expected = FORMULAS[name](x, f, lambda z: normed(z, dim))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


def deep(name: str, layers: int, width: int = 256) -> list[float]:
    """Variance after each of `layers` blocks of random linear branches, inputs N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, width, generator=generator)
    variances = []
    for layer in range(1, layers + 1):
        branch = nn.Linear(width, width, bias=False)
        nn.init.normal_(branch.weight, std=width**-0.5, generator=generator)
        block = Residual(branch, width, name, layer=layer, layers=layers, layout="tokens")
        with torch.no_grad():
            x = block(x)
        variances.append(float(x.var()))
    return variances


def test_variance_grows_with_depth_as_each_placement_promises():
    layers = 32
    expected = {  # branches keep the variance: every normalised branch adds 1
        "pre": [1.0 + layer for layer in range(1, layers + 1)],
        "peri": [1.0 + layer for layer in range(1, layers + 1)],
        "sandwich": [1.0 + layer for layer in range(1, layers + 1)],
        "post": [1.0] * layers,
        "deepnorm": [1.0] * layers,
        "layer-norm-scaling": [1.0 + sum(1 / k for k in range(1, layer + 1)) for layer in range(1, layers + 1)],
        "mix-ln": [1.0] * 8 + [1.0 + layer for layer in range(1, 25)],
    }
    for name in NAMES:
        torch.testing.assert_close(
            torch.tensor(deep(name, layers)), torch.tensor(expected[name]), rtol=0.05, atol=0.0, msg=name
        )


def test_a_branch_that_magnifies_grows_pre_but_not_peri():
    def variance(name: str) -> float:
        branch = nn.Linear(64, 64, bias=False)
        torch.manual_seed(0)
        nn.init.normal_(branch.weight, std=10 * 64**-0.5)
        x = torch.randn(2048, 64)
        return Residual(branch, 64, name, layout="tokens")(x).var().item()

    assert variance("pre") > 80
    assert 1.8 < variance("peri") < 2.2


def test_deepnorm_constants():
    assert deepnorm_alpha(8) == 2.0  # 16^(1/4)
    assert deepnorm_beta(2) == 0.5  # 16^(-1/4)
    assert deepnorm_alpha(32) == pytest.approx(2.8284271247461903)  # the constant in Mix-LN's released code
    for layers in (1, 6, 100, 1000):  # alpha^4 = 2 L and (alpha beta)^4 = 1 / 4
        assert deepnorm_alpha(layers) ** 4 == pytest.approx(2 * layers)
        assert (deepnorm_alpha(layers) * deepnorm_beta(layers)) ** 4 == pytest.approx(0.25)


def test_deepnorm_init_has_xavier_variance_times_beta_squared():
    value, query = nn.Linear(400, 300), nn.Linear(400, 300)
    biases = value.bias.detach().clone()
    deepnorm_init_([value], [query], layers=2, generator=torch.Generator().manual_seed(0))
    assert value.weight.var().item() == pytest.approx(0.25 * 2 / 700, rel=0.03)
    assert query.weight.var().item() == pytest.approx(2 / 700, rel=0.03)
    assert torch.equal(value.bias, biases)


@pytest.mark.parametrize(("layers", "posts"), [(12, 3), (24, 6), (32, 8), (3, 0), (4, 1)])
def test_mix_ln_counts(layers, posts):
    blocks = [
        Residual(nn.Linear(4, 4), 4, "mix-ln", layer=k, layers=layers, layout="tokens") for k in range(1, layers + 1)
    ]
    assert [b.placement for b in blocks] == ["post"] * posts + ["pre"] * (layers - posts)
    assert mix_ln_posts(layers) == posts


def test_mix_ln_shares_are_not_lost_to_rounding():
    assert mix_ln_posts(10, 0.3) == 3
    assert mix_ln_posts(100, 0.29) == 29  # .29 * 100 is 28.999... in binary


def test_norm_factory_is_called_for_each_normalisation():
    made = []

    def norm(channels: int) -> nn.Module:
        made.append(channels)
        return nn.BatchNorm2d(channels)

    Residual(nn.Conv2d(6, 6, 3, padding=1), 6, "sandwich", norm=norm)
    assert made == [6, 6]


@pytest.mark.parametrize(
    "branch",
    [nn.Conv2d(6, 8, 1), nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 1, 1)],
    ids=["channels", "stride", "pool", "broadcast"],
)
@pytest.mark.parametrize("wrap", [Residual, SkipInit, lambda f, c: DepthScaled(f, c, 4), lambda f, c: Fixup([f], c)])
def test_a_branch_that_changes_the_shape_has_no_residual(branch, wrap):
    with pytest.raises(UserError, match="a placement on a block without residual"):
        wrap(branch, 6)


def test_bad_arguments_name_the_valid_ones():
    f = nn.Linear(4, 4)
    with pytest.raises(UserError, match="did you mean 'sandwich'"):
        Residual(f, 4, "sandwitch", layout="tokens")
    with pytest.raises(UserError, match="layer from 1 to 12"):
        Residual(f, 4, layer=13, layers=12, layout="tokens")
    with pytest.raises(UserError, match="a layer from 1"):
        Residual(f, 4, layer=0, layout="tokens")
    with pytest.raises(UserError, match="layout"):
        Residual(f, 4, layout="channels-last")
    with pytest.raises(UserError, match="5 channels"):
        Residual(f, 5, layout="tokens")
    with pytest.raises(UserError, match="positive number"):
        DepthScaled(f, 4, 0, layout="tokens")
    with pytest.raises(UserError, match="convolution or a linear layer"):
        Fixup([nn.ReLU()], 4)


def test_checking_leaves_the_branch_alone_and_takes_an_example():
    branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout()).train()
    before = copy.deepcopy(branch.state_dict())
    Residual(branch, 6)
    assert all(torch.equal(before[key], value) for key, value in branch.state_dict().items())
    assert branch.training
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(6 * 9, 6 * 9), nn.Unflatten(1, (6, 3, 3)))
    with pytest.raises(UserError, match="`example` shape"):
        Residual(fixed, 6)
    assert Residual(fixed, 6, example=(1, 6, 3, 3))(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)


def fixup_block(seed: int = 0) -> Fixup:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False)]
    return Fixup(layers, 6)


def test_skip_init_and_fixup_begin_as_the_identity_with_its_gradient():
    branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1))
    blocks = [fixup_block(seed) for seed in range(5)]
    fixup_(blocks)
    for block in (SkipInit(branch, 6), nn.Sequential(*blocks)):
        x = torch.randn(2, 6, 4, 4, requires_grad=True)
        weights = torch.randn(2, 6, 4, 4)
        y = block(x)
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        assert torch.equal(gradient, weights)


def test_skip_init_learns_first_its_scalar():
    branch = nn.Linear(6, 6)
    block, x = SkipInit(branch, 6, layout="tokens"), torch.randn(3, 5, 6)
    block(x).sum().backward()
    assert float(block.alpha.grad) == pytest.approx(branch(x).sum().item(), rel=1e-4)
    assert not branch.weight.grad.any()


@pytest.mark.parametrize(("middle", "power"), [(0, -1 / 2), (1, -1 / 4), (2, -1 / 6)])
def test_fixup_scales_by_depth_and_weight_layers(middle, power):
    def block() -> Fixup:
        parts = [part for _ in range(middle + 1) for part in (nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.ReLU())]
        return Fixup([*parts, nn.Conv2d(32, 32, 3, padding=1)], 32)

    blocks, classifier = [block() for _ in range(16)], nn.Linear(32, 10)
    fixup_(blocks, classifier, generator=torch.Generator().manual_seed(0))
    for one in blocks:
        *inner, last = [m for m in one.modules() if isinstance(m, nn.Conv2d)]
        for conv in inner:
            assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)) * 16**power, rel=0.05)
        assert not last.weight.any()
        assert not last.bias.any()
    assert not classifier.weight.any()
    assert not classifier.bias.any()


def test_fixup_scalars_stand_before_every_layer():
    block = fixup_block()
    kinds = [type(m).__name__ for m in block.branch]
    assert kinds == ["ScalarBias", "Conv2d", "ScalarBias", "ReLU", "ScalarBias", "Conv2d", "ScalarScale", "ScalarBias"]
    scalars = [p for m in block.branch for p in m.parameters() if p.dim() == 0]
    assert [p.item() for p in scalars] == [0, 0, 0, 1, 0]
    with torch.no_grad():
        for parameter, value in zip(scalars, (0.1, 0.2, 0.3, 2.0, 0.4)):
            parameter.fill_(value)
    x, (first, second) = torch.randn(2, 6, 4, 4), [m.weight for m in block.branch if isinstance(m, nn.Conv2d)]
    y = torch.relu(torch.conv2d(x + 0.1, first, padding=1) + 0.2)
    torch.testing.assert_close(block(x), x + 2.0 * torch.conv2d(y + 0.3, second, padding=1) + 0.4)


def test_depth_scaling_bounds_the_sum_over_paths():
    class Times(nn.Module):
        def forward(self, x):
            return 1.5 * x

    for layers, expected in ((10, (1 + 0.15) ** 10), (3000, math.exp(1.5))):
        block, x = DepthScaled(Times(), 1, layers), torch.ones(1, 1, dtype=torch.float64)
        for _ in range(layers):
            x = block(x)
        assert float(x) == pytest.approx(expected, rel=1e-3)
    plain, scaled = 2.5**300, (1 + 1.5 / 300) ** 300
    assert plain > 1e100
    assert scaled < math.exp(1.5)


def test_depth_scaling_is_the_sum_over_all_subsets_of_branches():
    torch.manual_seed(0)
    branches = [nn.Linear(3, 3, bias=False).double() for _ in range(5)]
    x = y = torch.randn(4, 3, dtype=torch.float64)
    for branch in branches:
        y = DepthScaled(branch, 3, 5, power=0.5, layout="tokens")(y)
    paths = torch.zeros_like(x)
    for used in itertools.product((False, True), repeat=5):
        z = x
        for branch, on in zip(branches, used):
            z = branch(z) / math.sqrt(5) if on else z
        paths = paths + z
    torch.testing.assert_close(y, paths)


@pytest.mark.parametrize(("primitive", "layout"), CASES)
def test_entries_build_copy_save_export_and_compile(primitive, layout):
    torch.manual_seed(0)
    block, x = primitive.make(6, layout=layout), torch.randn(SHAPES[layout])
    y = block(x)
    assert y.shape == x.shape
    assert primitive.kind == "placement"
    other = primitive.make(6, layout=layout)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(block)(x), y)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), y)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x).float(), y, rtol=0.1, atol=0.1)
    wide = copy.deepcopy(block).double()
    z = x.double().requires_grad_()
    assert torch.autograd.gradcheck(wide, (z,))


@pytest.mark.slow
@pytest.mark.parametrize(("primitive", "layout"), CASES)
def test_entries_compile_with_inductor(primitive, layout):
    torch.manual_seed(0)
    block, x = primitive.make(6, layout=layout), torch.randn(SHAPES[layout])
    torch.testing.assert_close(torch.compile(block)(x), block(x), rtol=1e-5, atol=1e-5)

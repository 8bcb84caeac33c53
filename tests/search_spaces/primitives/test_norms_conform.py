"""What every normalisation must do, whatever it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives import (
    adab2n,
    batch_norms,
    evaluation_norms,
    norms,
    pointwise_norms,
    power_norms,
    region_norm,
    transformer_norms,
    unified_norm,
)
from search_spaces.primitives.primitive import KINDS, LAYOUTS, NEEDS

FILES = (
    norms,
    batch_norms,
    pointwise_norms,
    power_norms,
    unified_norm,
    region_norm,
    transformer_norms,
    adab2n,
    evaluation_norms,
)
PRIMITIVES = [p for file in FILES for p in file.PRIMITIVES]
CASES = [(p, layout) for p in PRIMITIVES for layout in p.layouts]
IDS = [f"{p.name}-{layout}" for p, layout in CASES]
CHANNELS = 6


def inputs(primitive, layout: str, dtype=torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    shape = (3, CHANNELS, 4, 5) if layout == "channels-first" else (3, 8, CHANNELS)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.3
    x = (x * scale).to(dtype)
    if "mask" not in primitive.needs:
        return (x,)
    return x, (torch.rand(3, 1, 4, 5, generator=generator) < 0.5).to(dtype)


def made(primitive, layout: str) -> nn.Module:
    """With parameters away from their initial values, which hide mistakes."""
    torch.manual_seed(3)
    module = primitive.make(CHANNELS, layout=layout)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def trained(primitive, layout: str) -> nn.Module:
    module = made(primitive, layout)
    for scale in (1.0, 0.5, 2.0):
        x, *rest = inputs(primitive, layout, scale=scale)
        x.requires_grad_()
        module(x, *rest).square().mean().backward()
    module.zero_grad()
    return module


def test_names_and_words_of_entries():
    names = [p.name for p in PRIMITIVES]
    assert len(set(names)) == len(names)
    assert {"batch-norm", "layer-norm", "group-norm", "instance-norm", "rms-norm", "dyt", "derf"} <= set(names)
    for p in PRIMITIVES:
        assert p.kind in KINDS
        assert p.layouts
        assert set(p.layouts) <= set(LAYOUTS)
        assert set(p.needs) <= set(NEEDS)
        assert p.formula
        assert p.source


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_shape_type_and_gradients_in_both_modes(primitive, layout):
    module = made(primitive, layout)
    for training in (True, False):
        x, *rest = inputs(primitive, layout)
        x.requires_grad_()
        y = module.train(training)(x, *rest)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        module.zero_grad()
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        assert torch.isfinite(x.grad).all()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_state_dict_and_copies_give_the_same_function_and_the_same_further_training(primitive, layout):
    module = trained(primitive, layout)
    loaded = primitive.make(CHANNELS, layout=layout)
    loaded.load_state_dict(module.state_dict())
    x, *rest = inputs(primitive, layout)
    for other in (copy.deepcopy(module), loaded):
        original = copy.deepcopy(module)
        for training in (True, False):
            torch.testing.assert_close(other.train(training)(x, *rest), original.train(training)(x, *rest))
        for (name, a), b in zip(other.state_dict().items(), original.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_evaluation_changes_no_state(primitive, layout):
    module = trained(primitive, layout).eval()
    before = copy.deepcopy(module.state_dict())
    module(*inputs(primitive, layout))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_gradcheck_of_evaluation(primitive, layout):
    module = trained(primitive, layout).double().eval()
    x, *rest = inputs(primitive, layout, torch.float64)
    x = x[:2].clone().requires_grad_()
    rest = [r[:2] for r in rest]
    assert torch.autograd.gradcheck(lambda x: module(x, *rest), (x,), fast_mode=True)


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_half_precision_is_close_to_single(primitive, layout):
    module = trained(primitive, layout)
    exact = copy.deepcopy(module)
    x, *rest = inputs(primitive, layout, torch.bfloat16)
    for training in (True, False):
        expected = exact.train(training)(x.float(), *(r.float() for r in rest))
        with torch.autocast("cpu", torch.bfloat16):
            y = module.train(training)(x, *rest)
        scale = expected.abs().max().item()
        assert (y.float() - expected).abs().max() <= 0.02 * scale


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_extreme_inputs_stay_finite(primitive, layout, scale):
    module = made(primitive, layout)
    for training in (True, False):
        x, *rest = inputs(primitive, layout, scale=scale)
        x.requires_grad_()
        y = module.train(training)(x, *rest)
        y.mean().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_export_of_evaluation(primitive, layout):
    module = trained(primitive, layout).eval()
    arguments = inputs(primitive, layout)
    program = torch.export.export(module, arguments)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def compiles(primitive, layout: str, backend: str) -> None:
    torch._dynamo.reset()
    module = trained(primitive, layout)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend)
    for training in (True, True, False):
        module.train(training), twin.train(training)
        results = []
        for call in (compiled, twin):
            x, *rest = inputs(primitive, layout)
            x.requires_grad_()
            y = call(x, *rest)
            y.square().mean().backward()
            results.append((y.detach(), x.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


FEW = ("rms-norm", "l1-batch-norm", "prep-bn", "derf", "power-norm", "unified-norm", "adab2n", "region-norm-b")


@pytest.mark.parametrize("name", FEW)
def test_compile_eager(name):
    primitive = next(p for p in PRIMITIVES if p.name == name)
    compiles(primitive, primitive.layouts[-1], "eager")


@pytest.mark.slow
@pytest.mark.parametrize(("primitive", "layout"), CASES, ids=IDS)
def test_compile_inductor(primitive, layout):
    compiles(primitive, layout, "inductor")


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_wrong_channels_and_layouts(primitive):
    with pytest.raises(UserError, match="at least one channel"):
        primitive.make(0)
    with pytest.raises(UserError, match="layout"):
        primitive.make(CHANNELS, layout="channel-first")
    for layout in set(LAYOUTS) - set(primitive.layouts):
        with pytest.raises(UserError, match="layout"):
            primitive.make(CHANNELS, layout=layout)


ANY_SPACE = [(p, layout) for p, layout in CASES if "images" not in p.needs or layout == "tokens"]


@pytest.mark.parametrize(("primitive", "layout"), ANY_SPACE, ids=lambda value: getattr(value, "name", value))
def test_any_number_of_space_dimensions_unless_images(primitive, layout):
    module = primitive.make(CHANNELS, layout=layout)
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 2, 3, 4) if layout == "channels-first" else torch.randn(4, 5, CHANNELS)
    assert module(x).shape == x.shape


@pytest.mark.parametrize("primitive", [p for p in PRIMITIVES if p.function], ids=lambda p: p.name)
def test_function_is_the_module_at_its_initial_parameters(primitive):
    x = torch.linspace(-5, 5, 101)
    expected = primitive.make(1, layout="tokens")(x[:, None])[:, 0]
    torch.testing.assert_close(primitive.function(x), expected)

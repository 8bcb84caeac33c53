"""What every activation, gate and KAN layer promises, whatever its formula."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives import activation_families, activations, gates, hermite, kan, kan_single
from search_spaces.primitives.primitive import KINDS, LAYOUTS, NEEDS

FILES = (activations, activation_families, gates, hermite, kan, kan_single)
ALL = [primitive for file in FILES for primitive in file.PRIMITIVES]
POINTWISE = [p for p in ALL if p.function is not None]
CASES = [pytest.param(p, layout, id=f"{p.name}-{layout}") for p in ALL for layout in p.layouts]
TRAINED = [p for p in ALL if p.parameters != "none" and p.name != "s-kan"]  # of a Choice only the selected one trains
STRAIGHT_THROUGH = {"rerelu"}  # its derivative is not that of its value, on purpose
KINKS = torch.tensor([-3.0, -2.5, -2.0, -1.0, 0.0, 1.0, 2.5, 3.0, 6.0])  # where some formula has no derivative
TORCH_LIMITS = {"gelu-tanh"}  # torch's own gradient is NaN where its cube overflows


def inputs(primitive, layout: str, *, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Values away from all kinks, 6 channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((3, 6, 4, 5) if layout == "channels-first" else (3, 5, 6), generator=generator, dtype=torch.float64)
    for kink in KINKS.tolist():
        x = torch.where((x - kink).abs() < 0.02, x + 0.05, x)
    return x.to(dtype)


def build(primitive, layout: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return primitive.make(6, layout=layout)


def test_names_are_unique_and_entries_are_complete():
    names = [p.name for p in ALL]
    assert len(set(names)) == len(names)
    for p in ALL:
        assert p.kind in KINDS
        assert p.formula
        assert p.source
        assert set(p.layouts) <= set(LAYOUTS)
        assert set(p.needs) <= set(NEEDS)
        trained = any(True for _ in p.make(6, layout=p.layouts[0]).parameters())
        assert trained == (p.parameters != "none"), p.name


@pytest.mark.parametrize(("primitive", "layout"), CASES)
def test_shape_repr_state_and_copies(primitive, layout):
    module, x = build(primitive, layout), inputs(primitive, layout)
    y = module(x)
    dim = 1 if layout == "channels-first" else -1
    expected = list(x.shape)
    expected[dim] = 3 if primitive.kind == "gate" else 6
    assert list(y.shape) == expected
    assert torch.isfinite(y).all()
    assert type(module).__name__ in repr(module)
    other = build(primitive, layout, seed=1)
    other.load_state_dict(module.state_dict())
    twins = (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    assert all(torch.equal(twin(x), y) for twin in twins)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert torch.equal(module.eval()(x), y)  # nothing here depends on the mode
    factory = pickle.loads(pickle.dumps(primitive.make))  # factories travel to workers
    assert type(factory(6, layout=layout)) is type(module)


@pytest.mark.parametrize("primitive", POINTWISE, ids=lambda p: p.name)
def test_function_is_the_module_at_its_initial_parameters(primitive):
    x = inputs(primitive, "channels-first")
    torch.testing.assert_close(primitive.function(x), build(primitive, "channels-first")(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("primitive", [p for p in ALL if len(p.layouts) == 2], ids=lambda p: p.name)
def test_layouts_agree(primitive):
    first, tokens = build(primitive, "channels-first"), build(primitive, "tokens")
    with torch.no_grad():
        for a, b in zip(first.parameters(), tokens.parameters(), strict=True):
            a += torch.rand_like(a)  # different channels
            b.copy_(a)
    x = inputs(primitive, "tokens")
    torch.testing.assert_close(first(x.transpose(1, 2)).transpose(1, 2), tokens(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("primitive", "layout"), [c for c in CASES if c.values[0].name not in STRAIGHT_THROUGH])
def test_gradients_against_finite_differences(primitive, layout):
    module = build(primitive, layout).double()
    x = inputs(primitive, layout, dtype=torch.float64)[:1].clone()
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize(("primitive", "layout"), CASES)
def test_values_and_gradients_are_finite_at_zero_and_far_out(primitive, layout):
    module = build(primitive, layout)
    for value in (0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 1e4, -1e4):
        module.zero_grad()
        x = torch.full_like(inputs(primitive, layout), value).requires_grad_()
        y = module(x)
        y.mean().backward()
        assert torch.isfinite(y).all(), value
        assert torch.isfinite(x.grad).all(), value
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None), value


@pytest.mark.parametrize("primitive", [p for p in POINTWISE if p.name not in TORCH_LIMITS], ids=lambda p: p.name)
def test_gradients_are_finite_for_the_greatest_inputs_whose_value_is(primitive):
    module = build(primitive, "channels-first")
    for value in (1e10, 1e30, -1e10, -1e30):
        x = torch.full((1, 6), value).requires_grad_()
        y = module(x)
        if torch.isfinite(y).all():
            (y / abs(value)).mean().backward()
            assert torch.isfinite(x.grad).all(), value
            assert all(torch.isfinite(p.grad).all() for p in module.parameters()), value


@pytest.mark.parametrize(("primitive", "layout"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(primitive, layout, dtype):
    """The result has the input's type, also inside autocast, and what is computed in float32 is right to rounding."""
    module = build(primitive, layout)
    x = inputs(primitive, layout, dtype=dtype)
    exact = module(x.float())
    file = type(build(primitive, layout)).__module__
    if file.startswith("search_spaces") and primitive.kind != "gate":
        y = module(x)
        assert y.dtype == dtype
        if file == activations.__name__:  # computed in the type of the input
            torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=1e-2)
        else:  # computed in float32
            assert torch.equal(y, exact.to(dtype))
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            y = module(x)
        assert torch.isfinite(y).all()
        scale = exact.abs().max().clamp(min=1)
        assert (y.float() - exact).abs().max() <= 0.1 * scale


@pytest.mark.parametrize("primitive", TRAINED, ids=lambda p: p.name)
def test_training_lowers_a_loss_and_changes_every_parameter(primitive):
    layout = primitive.layouts[0]
    module, x = build(primitive, layout), inputs(primitive, layout)
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    torch.manual_seed(3)
    target = module(x).detach() * 0.5 + 0.1
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


OWN = [p for p in ALL if type(p.make(6, layout=p.layouts[0])).__module__.startswith("search_spaces")]
SOME = [
    p for p in OWN if p.name in {"swish", "poly-norm", "powlu-glu", "hermite-3", "kan-spline", "af-kan", "skan-elu"}
]


@pytest.mark.parametrize("primitive", SOME, ids=lambda p: p.name)
def test_compiles(primitive):
    layout = primitive.layouts[0]
    module, x = build(primitive, layout), inputs(primitive, layout)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("primitive", "layout"), CASES)
def test_compiles_with_inductor(primitive, layout):
    module, x = build(primitive, layout), inputs(primitive, layout).requires_grad_()
    torch._dynamo.reset()
    y, expected = torch.compile(module, fullgraph=True)(x), module(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("primitive", OWN, ids=lambda p: p.name)
def test_exports(primitive):
    layout = primitive.layouts[0]
    module, x = build(primitive, layout).eval(), inputs(primitive, layout)
    batch = torch.export.Dim("batch", min=1, max=64)
    shape = ({0: batch},) if primitive.name == "s-kan" else {0: batch}  # a Choice takes *inputs
    program = torch.export.export(module, (x,), dynamic_shapes=(shape,))
    more = torch.cat([x, x * 0.5])
    torch.testing.assert_close(program.module()(more), module(more), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("primitive", ALL, ids=lambda p: p.name)
def test_bad_channels_and_layouts_are_refused(primitive):
    for channels in (0, -2, 2.5):
        with pytest.raises(UserError):
            primitive.make(channels, layout=primitive.layouts[0])
    with pytest.raises(UserError) as error:
        primitive.make(6, layout="token")
    assert error.value.suggestion == "tokens"

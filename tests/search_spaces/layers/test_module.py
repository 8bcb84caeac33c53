"""GraphLayer against `evaluate`, against torch's and timm's layers, and in everything that wraps a module."""

from __future__ import annotations

import copy
import importlib
import pickle

import numpy as np
import pytest
import torch
from layer_processes import SIZES, data, network, process, train
from layer_reference import live_graphs
from oracles import allow_timm_without_torchvision
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.module import GraphLayer, buffer_names, parameter_groups

SHAPES = (
    ((3, 12, 4, 5), "channels-first"),
    ((3, 12, 7), "channels-first"),
    ((2, 12, 2, 3, 2), "channels-first"),
    ((4, 12), "channels-first"),
    ((3, 6, 12), "tokens"),
    ((1, 12, 1, 1), "channels-first"),
)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with parameters of both signs."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return module


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_equals_evaluate_in_training_and_evaluation(shape, layout, rng):
    channels = shape[-1] if layout == "tokens" else shape[1]
    for graph in live_graphs(rng, 60, groups=5):
        module = randomised(GraphLayer(graph, channels, layout=layout).double())
        params = dict(module.named_parameters())
        expected = {id: getattr(module, name).clone() for id, name in buffer_names(graph).items()}
        for _ in range(2):
            x = torch.from_numpy(rng.normal(0.3, 1.5, shape))
            collected: dict[int, torch.Tensor] = {}
            same(module(x), evaluate(graph, x, params, layout=layout, collect=collected))
            assert collected.keys() == expected.keys()
            expected = {id: 0.9 * expected[id] + 0.1 * moment.flatten() for id, moment in collected.items()}
        for id, name in buffer_names(graph).items():
            same(getattr(module, name), expected[id])
        module.eval()
        same(module(x), evaluate(graph, x, params, expected, layout=layout))


def test_gradients_equal_those_of_evaluate(rng):
    for graph in live_graphs(rng, 40, size=8):
        module = randomised(GraphLayer(graph, 6).double())
        x = torch.from_numpy(rng.normal(size=(3, 6, 4, 4))).requires_grad_()
        out, reference = module(x), evaluate(graph, x, dict(module.named_parameters()))
        if reference.isfinite().all():
            inputs = [x, *module.parameters()]
            weights = torch.from_numpy(rng.normal(size=x.shape))
            for a, b in zip(
                torch.autograd.grad(out, inputs, weights, allow_unused=True),
                torch.autograd.grad(reference, inputs, weights, allow_unused=True),
                strict=True,
            ):
                assert (a is None) == (b is None)
                if a is not None:
                    same(a, b)


def test_names_of_parameters_and_buffers():
    assert list(GraphLayer(layer("evonorm-b0"), 8).state_dict()) == ["weight", "bias", "v1", "running_var"]
    assert list(GraphLayer(layer("evonorm-s1"), 8).state_dict()) == ["weight", "bias"]
    assert list(GraphLayer(layer("frn-tlu"), 8).state_dict()) == ["weight", "bias", "v0"]
    assert list(GraphLayer(layer("batch-norm"), 8).state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert list(GraphLayer(layer("silu", affine=False), 8).state_dict()) == ["v1"]
    twice = parse_formula("std[batch](x) + rms[batch](x) * l1[batch](x) + x * std[batch](x * x)", momentum=None)
    names = list(GraphLayer(twice, 8, zero_init_gamma=True).state_dict())
    running = ["running_var", "running_square", "running_abs", "running_var_2"]
    assert sorted(names[2:-1]) == sorted(running)
    assert names[-1] == "num_batches_tracked"
    dead = LayerGraph((make_node("mul", (0, 2)), make_node("std-batch", (4,)), make_node("neg", (0,))), 6)
    assert list(GraphLayer(dead, 8).state_dict()) == ["weight", "bias"]
    assert not GraphLayer(layer("batch-norm"), 8, zero_init_gamma=True).weight.any()
    assert list(GraphLayer(layer("batch-norm"), 8, track_running_stats=False).state_dict()) == ["weight", "bias"]


# -- torch's layers ------------------------------------------------------------------------------------------------

TORCH = {
    "batch-norm": (lambda c: nn.BatchNorm2d(c), {}),
    "group-norm": (lambda c: nn.GroupNorm(4, c), {"groups": 4}),
    "layer-norm": (lambda c: nn.GroupNorm(1, c), {}),
    "instance-norm": (lambda c: nn.InstanceNorm2d(c), {}),
    "layer-norm-tokens": (lambda c: nn.LayerNorm(c), {}),
    "rms-norm-tokens": (lambda c: nn.RMSNorm(c), {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch_over_several_steps(name):
    make, settings = TORCH[name]
    tokens = name.endswith("tokens")
    graph = layer(name, "torch", **settings)
    ours, theirs = GraphLayer(graph, 12, layout="tokens" if tokens else "channels-first"), make(12)
    randomised(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=name != "rms-norm-tokens")  # RMSNorm has no bias
    random = torch.Generator().manual_seed(0)
    for step in range(5):
        if step == 4:
            ours.eval(), theirs.eval()
        value = torch.randn((4, 9, 12) if tokens else (4, 12, 5, 6), generator=random) * 2 + 0.5
        a, b = value.clone().requires_grad_(), value.clone().requires_grad_()
        out, expected = ours(a), theirs(b)
        same(out, expected, 2e-6)
        weights = torch.randn(value.shape, generator=random)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        same(a.grad, b.grad, 1e-5)
        for key, parameter in theirs.named_parameters():
            torch.testing.assert_close(getattr(ours, key).grad, parameter.grad, rtol=1e-5, atol=1e-4)
        for key, buffer in theirs.named_buffers():
            if key != "num_batches_tracked":
                same(getattr(ours, key), buffer, 1e-6)


def test_cumulative_average_equals_batch_norm():
    ours = GraphLayer(layer("batch-norm", momentum=None), 5)
    theirs = nn.BatchNorm2d(5, momentum=None)
    for step in range(4):
        x = torch.randn(3, 5, 4, 4) * (step + 1)
        same(ours(x), theirs(x), 1e-5)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == step + 1
        same(ours.running_var, theirs.running_var, 1e-5)
        same(ours.running_mean, theirs.running_mean, 1e-6)
    ours.reset_running_stats(), theirs.reset_running_stats()
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())


# -- timm's layers -------------------------------------------------------------------------------------------------

TIMM = {
    "evonorm-b0": "EvoNorm2dB0",
    "evonorm-b1": "EvoNorm2dB1",
    "evonorm-b2": "EvoNorm2dB2",
    "evonorm-s0": "EvoNorm2dS0",
    "evonorm-s0a": "EvoNorm2dS0a",
    "evonorm-s1": "EvoNorm2dS1",
    "evonorm-s1a": "EvoNorm2dS1a",
    "evonorm-s2": "EvoNorm2dS2",
    "evonorm-s2a": "EvoNorm2dS2a",
}


@pytest.fixture(scope="module")
def timm_layer():
    """A function: class name, C -> timm's layer with parameters of both signs; skips without timm."""
    allow_timm_without_torchvision()

    def make(name: str, *arguments, **options):
        module = pytest.importorskip("timm.layers." + ("evo_norm" if "Evo" in name else "filter_response_norm"))
        return randomised(getattr(module, name)(*arguments, **options))

    return make


def compare(ours: nn.Module, theirs: nn.Module, channels: int) -> None:
    """Four training steps and one of evaluation: outputs, gradients, the trajectory of running_var."""
    random = torch.Generator().manual_seed(3)
    for step in range(5):
        if step == 4:
            ours.eval(), theirs.eval()
        value = torch.randn(4, channels, 7, 5, generator=random) * 1.5 + 0.3
        weights = torch.randn(value.shape, generator=random)
        a, b = value.clone().requires_grad_(), value.clone().requires_grad_()
        out, expected = ours(a), theirs(b)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        if hasattr(theirs, "running_var") and hasattr(ours, "running_var"):
            same(ours.running_var, theirs.running_var, 1e-6)


@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name, timm_layer):
    theirs = timm_layer(TIMM[name], 64)
    ours = GraphLayer(layer(name, "timm"), 64)
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, 64)


@pytest.mark.parametrize("name", TIMM)
def test_equals_timm_without_activation(name, timm_layer):
    """timm's plain classes keep the affine only, its `a` classes the normalisation."""
    theirs = timm_layer(TIMM[name], 64, apply_act=False)
    formula = "x"
    if name.endswith("a"):
        formula = "x / rms[group, eps=1e-3](x)" if name[-3:] == "s2a" else "x / std[group, eps=1e-3](x)"
    ours = GraphLayer(parse_formula(formula), 64)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ("weight", "bias")})
    compare(ours, theirs, 64)


def test_equals_timm_filter_response_norm(timm_layer):
    theirs = timm_layer("FilterResponseNormTlu2d", 16)
    ours = GraphLayer(layer("frn-tlu", "timm"), 16)
    with torch.no_grad():  # weight, bias and tau under the names of the variant
        ours.v1.copy_(theirs.weight)
        ours.v0.copy_(theirs.bias - theirs.tau)
        ours.bias.copy_(theirs.tau)
    compare(ours, theirs, 16)


# -- hard inputs ---------------------------------------------------------------------------------------------------


def test_one_sample_of_one_pixel():
    """An unbiased variance of one number stays the biased one: zero."""
    ours = GraphLayer(layer("evonorm-b0", "timm"), 4)
    x = torch.randn(1, 4, 1, 1, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad.isfinite().all()
    same(ours.running_var, torch.full((4,), 0.9), 1e-6)


@pytest.mark.parametrize("name", ["evonorm-b0", "evonorm-s0", "gn-silu", "bn-relu", "frn-tlu"])
@pytest.mark.parametrize("shape", [(1, 7, 3, 3), (2, 48, 1, 1), (3, 20, 4, 4)])
def test_small_batches_and_channels_that_no_group_divides(name, shape):
    ours = GraphLayer(layer(name), shape[1])
    x = torch.randn(shape, requires_grad=True)
    for mode in (True, False):
        ours.train(mode)
        out = ours(x)
        assert out.shape == shape
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["evonorm-b0", "evonorm-s0", "bn-relu"])
def test_half_precision_takes_statistics_in_float32(name, dtype):
    """Values whose squares overflow float16: the deviation is right all the same."""
    ours = GraphLayer(layer(name), 8)
    x = (torch.randn(4, 8, 6, 6) * 300).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = ours(x)
        assert out.dtype == dtype
        assert ours(x.float()).dtype == torch.float32
    same(out.float(), evaluate(ours.graph, x.float()), 3e-2)
    assert all(buffer.dtype == torch.float32 and buffer.isfinite().all() for buffer in ours.buffers())
    whole = GraphLayer(layer(name), 8).to(dtype)
    assert whole(x).dtype == dtype
    assert whole.eval()(x).dtype == dtype


@pytest.mark.parametrize("name", ["evonorm-b0", "evonorm-s0", "gn-relu"])
def test_channels_last_stays(name):
    ours = randomised(GraphLayer(layer(name), 64))
    x = torch.randn(2, 64, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = ours(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    same(out, ours(x), 1e-5)


def test_bad_inputs_are_named():
    with pytest.raises(UserError, match="0: expected at least one channel"):
        GraphLayer(layer("relu"), 0)
    with pytest.raises(UserError, match="'nhwc': expected a layout"):
        GraphLayer(layer("relu"), 4, layout="nhwc")
    module = GraphLayer(layer("relu"), 4)
    with pytest.raises(UserError, match=r"\(2, 5, 3\).*expected an input of shape \[B, 4, ...\]"):
        module(torch.randn(2, 5, 3))
    with pytest.raises(UserError, match="floating-point"):
        module(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(UserError, match=r"tokens of shape \[B, N, 4\]"):
        GraphLayer(layer("relu"), 4, layout="tokens")(torch.randn(2, 4))


def test_parameter_groups_spare_vectors_the_decay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), GraphLayer(layer("evonorm-b0"), 8), nn.Flatten(), nn.Linear(8, 2))
    model[3].weight.requires_grad_(False)
    decayed, spared = parameter_groups(model, 0.05)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in model[1].parameters()} <= {id(p) for p in spared["params"]}
    assert len(spared["params"]) == 5
    before = model[1].v1.detach().clone()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model[1].v1, before)


# -- what wraps modules --------------------------------------------------------------------------------------------


def test_copies_pickles_and_state_dicts():
    ours = randomised(GraphLayer(layer("evonorm-b0"), 6))
    x = torch.randn(3, 6, 4, 4)
    ours(x)
    other = GraphLayer(layer("evonorm-b0"), 6)
    other.load_state_dict(ours.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), other):
        twin.eval()
        assert torch.equal(twin(x), ours.eval()(x))
        twin.train()(x)
        assert not torch.equal(twin.running_var, ours.running_var)


def test_functional_call():
    """Parameters given from outside, as meta-learning does."""
    ours = GraphLayer(layer("evonorm-s0"), 4)
    x = torch.randn(2, 4, 3, 3)
    given = {"weight": torch.full((4,), 2.0), "bias": torch.ones(4), "v1": torch.ones(4)}
    same(torch.func.functional_call(ours, given, x), 2 * ours(x) + 1, 1e-6)


@pytest.mark.parametrize("name", ["evonorm-b0", "evonorm-s0"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(name, backend):
    ours = randomised(GraphLayer(layer(name, "timm"), 8))
    eager = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = torch.randn(4, 8, 5, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(a), eager(b)
    same(out, expected, 1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for (_, p), (_, q) in zip(ours.named_buffers(), eager.named_buffers(), strict=True):
        same(p, q, 1e-5)
    same(compiled.eval()(x), eager.eval()(x), 1e-5)


@pytest.mark.parametrize("name", ["evonorm-b0", "gn-silu"])
def test_exports_with_free_sizes(name):
    ours = randomised(GraphLayer(layer(name), 8)).eval()
    free = {d: torch.export.Dim(f"size_{d}") for d in (0, 2, 3)}
    exported = torch.export.export(ours, (torch.randn(4, 8, 5, 5),), dynamic_shapes=(free,)).module()
    for shape in ((1, 8, 7, 6), (3, 8, 2, 9)):
        x = torch.randn(shape)
        same(exported(x), ours(x), 1e-6)


def test_onnx_equals_the_module(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    runtime = importlib.import_module("onnxruntime")
    ours = randomised(
        nn.Sequential(*(GraphLayer(layer(n), 8) for n in ("evonorm-b0", "gn-silu", "frn-tlu", "evonorm-s2")))
    ).eval()
    path = str(tmp_path / "layers.onnx")
    free = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(ours, (torch.randn(3, 8, 5, 5),), path, dynamic_shapes=free, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    for batch in (1, 4):
        x = torch.randn(batch, 8, 5, 5)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, ours(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Batch statistics, their gradients and running statistics, with shares of different sizes."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=len(SIZES))
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    x, weights = data()
    expected = train(network(), x, weights, 1.0)
    for key in ("out", "input gradient"):
        same(torch.cat([share.pop(key) for share in shares]), expected.pop(key), 1e-10)
    assert expected.keys() == shares[0].keys()
    for share in shares:
        for key, value in expected.items():
            same(share[key], value, 1e-10)

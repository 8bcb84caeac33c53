"""The operator of graphs and FusedLayer: what torch does to it, against GraphLayer, `evaluate` and float64 autograd."""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import expected, random_cases
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.layer import FusedLayer, make_source
from kernels.nodes import Unsupported
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.evaluate import channel_dim
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.ops import PARAMETERS

graph_forward = torch.ops.nasforge.graph_forward


def normal(*sizes: int, seed: int = 0, **kind) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), **kind)


def make(name: str, channels: int = 8, **settings) -> tuple[FusedLayer, GraphLayer]:
    """A layer by the operator and the same by its own code, each with tensors of its own."""
    plain = GraphLayer(catalog.layer(name, groups=4), channels, **settings)
    for seed, parameter in enumerate(plain.parameters()):
        nn.init.uniform_(parameter, 0.3, 1.2, generator=torch.Generator().manual_seed(seed))
    return FusedLayer.of(copy.deepcopy(plain), "reference"), plain


def arguments(graph: LayerGraph, x: torch.Tensor, layout: str = "channels-first", *, wrt: bool = True, **tensors):
    """The operator's arguments for a graph, in training."""
    source = make_source(graph, layout, True, True)
    channels = x.shape[channel_dim(x.ndim, layout)]
    given = [tensors[name] if name in tensors else torch.ones(channels, dtype=x.dtype) for name in source.tensors]
    settings = (layout, source.flat, graph.group_count(channels), True)
    return x, given, source.text, source.wrt if wrt else "", *settings


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).norm() <= tolerance * (wanted.norm() + 1e-3)


# -- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["evonorm24", "extended", "tokens"])
def test_random_graphs_against_evaluate_and_autograd(preset):
    for case in random_cases(preset, 12, 77):
        try:
            source = make_source(case.graph, case.layout, case.stats is None, True)
        except Unsupported:  # statistics at each position and over positions
            continue
        x = case.x.clone().requires_grad_()
        params = {name: value.clone().requires_grad_() for name, value in case.params.items()}
        stats = dict(zip(_buffers(case.graph), (case.stats or {}).values(), strict=False))
        given = [params[name] if name in params else stats[name] for name in source.tensors]
        groups = case.graph.group_count(x.shape[channel_dim(x.ndim, case.layout)])
        y = graph_forward(x, given, source.text, source.wrt, case.layout, source.flat, groups, False)[0]
        used = {name: params[name] for name in source.tensors if name in params}
        gradients = torch.autograd.grad(y, [x, *used.values()], case.dy)
        found = {"y": y.detach()} | {f"d{n}": g for n, g in zip(("x", *used), gradients, strict=True)}
        wanted = expected(case)
        largest = max(1.0, *(float(w[w.isfinite()].norm()) for w in wanted.values()))
        for name, got in found.items():
            finite = wanted[name].isfinite()
            assert torch.equal(got.isfinite(), finite)
            assert (got - wanted[name])[finite].norm() <= 1e-9 * wanted[name][finite].norm() + 1e-11 * largest


def _buffers(graph: LayerGraph) -> list[str]:
    from search_spaces.layers.plan import buffer_names

    return list(buffer_names(graph).values())


@pytest.mark.parametrize("name", catalog.names())
def test_catalogue_layers_like_graph_layers(name):
    fused, plain = make(name)
    x, dy = normal(3, 8, 5, 4, seed=1) + 0.4, normal(3, 8, 5, 4, seed=2)
    for training in (True, False):
        results = []
        for layer in (fused.train(training), plain.train(training)):
            given = x.clone().requires_grad_()
            y = layer(given)
            results.append([y, *torch.autograd.grad(y, [given, *layer.parameters()], dy), *layer.buffers()])
        for found, wanted in zip(*results, strict=True):
            assert_near(found, wanted)


def test_gradients_against_finite_differences():
    graph = parse_formula("max(x, v0) * sigmoid(v1 * x) / std[group](x) + mean[batch](x)", groups=2)
    v0, v1 = normal(4, seed=3, dtype=torch.float64), normal(4, seed=4, dtype=torch.float64)
    x = normal(2, 4, 3, dtype=torch.float64)
    source = make_source(graph, "channels-first", True, True)

    def run(x, *tensors):
        return graph_forward(x, list(tensors), source.text, source.wrt, "channels-first", False, 2, False)[0]

    weight = {"weight": normal(4, seed=5, dtype=torch.float64), "v0": v0, "v1": v1}
    given = [weight.get(name, torch.zeros(4, dtype=torch.float64)).requires_grad_() for name in source.tensors]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    fused, plain = make("evonorm-b0")
    x = (normal(4, 8, 6, 6) * 3 + 1).to(dtype)
    given = x.clone().requires_grad_()
    exact = x.double().requires_grad_()
    y, wanted = fused(given), plain.double()(exact)
    dy = normal(4, 8, 6, 6, seed=1).to(dtype)
    found = torch.autograd.grad(y, [given, *fused.parameters()], dy)
    gradients = torch.autograd.grad(wanted, [exact, *plain.parameters()], dy.double())
    assert y.dtype == found[0].dtype == dtype
    rounding = torch.finfo(dtype).eps
    for got, want in zip((y, *found), (wanted, *gradients), strict=True):
        limit = rounding if got.dtype == dtype else 1e-5  # parameters and their gradients are float32
        assert (got.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("name", ["evonorm-s0", "bn-relu", "layer-norm-tokens"])
@pytest.mark.parametrize("form", ["contiguous", "channels-last", "slice", "permuted", "expanded"])
def test_memory_layouts(name, form):
    fused, plain = make(name)
    x = normal(4, 8, 6, 5)
    x = {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "slice": normal(4, 10, 6, 7)[:, 1:9, :, 2:],
        "permuted": normal(4, 6, 8, 5).permute(0, 2, 1, 3),
        "expanded": normal(1, 8, 6, 5).expand(4, -1, -1, -1),
    }[form]
    given, other = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    if form in ("slice", "expanded"):
        given = x.detach().requires_grad_()
    y = fused(given)
    assert y.is_contiguous(memory_format=torch.channels_last if form == "channels-last" else torch.contiguous_format)
    assert_near(y, plain(other))
    for direction in (torch.ones(()).expand_as(y), normal(4, 6, 5, 8, seed=3).movedim(-1, 1)):
        (found,) = torch.autograd.grad(y, given, direction, retain_graph=True)
        assert_near(found, torch.autograd.grad(plain(other), other, direction)[0])


# -- what torch asks of operators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "shape", "differentiable"),
    [
        pytest.param("evonorm-b0", "channels-first", (2, 8, 3, 3), True, marks=pytest.mark.slow),
        ("layer-norm-tokens", "tokens", (2, 5, 8), True),
        ("gn-relu", "channels-first", (2, 8, 3, 3), False),
    ],
)
def test_opcheck(name, layout, shape, differentiable):
    graph = catalog.layer(name)
    given = {n: normal(8, seed=i).requires_grad_(differentiable) for i, n in enumerate(("weight", "bias", "v1"))}
    x = normal(*shape).requires_grad_(differentiable)
    found = opcheck(graph_forward.default, arguments(graph, x, layout, wrt=differentiable, **given))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("formula", ["x", "mean[batch](x)", "x - x", "x / mean[batch](x)", "v0"])
def test_outputs_alias_nothing(formula):
    graph = parse_formula(formula, affine=False)
    x = normal(1, 1, 1)  # one number: everything has the same shape
    found = graph_forward(*arguments(graph, x, v0=x.flatten()))
    places = [t.untyped_storage().data_ptr() for t in (x, *found)]
    assert len(set(places)) == len(places)


def test_only_what_is_needed_is_differentiated(monkeypatch):
    from kernels import operators

    asked = []

    def recorded(*arguments):
        asked.append(arguments[-1])
        return program(*arguments)

    program = operators.backward_program
    monkeypatch.setattr(operators, "backward_program", recorded)
    fused, plain = make("evonorm-s0")
    whole, _ = make("evonorm-s0")
    x = normal(2, 8, 4, 4)
    whole(x.clone().requires_grad_()).square().sum().backward()
    fused.weight.requires_grad_(False)
    fused(x).square().sum().backward()  # x has no gradient
    assert fused.weight.grad is None
    torch.testing.assert_close(fused.v1.grad, whole.v1.grad)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    given = x.clone().requires_grad_()
    fused(given).square().sum().backward()
    other = x.clone().requires_grad_()
    plain(other).square().sum().backward()
    assert_near(given.grad, other.grad)
    assert [set(names.split(",")) for names in asked] == [{"x", "weight", "bias", "v1"}, {"bias", "v1"}, {"x"}]
    with torch.no_grad():
        assert not fused(given).requires_grad


def test_differentiation_that_was_not_asked_for_and_twice():
    graph = catalog.layer("silu")
    x = normal(2, 3).requires_grad_()
    with pytest.raises(UserError, match="differentiated"):
        graph_forward(*arguments(graph, x, wrt=False))[0].sum().backward()
    y = graph_forward(*arguments(graph, x))[0]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["evonorm-b0", pytest.param("gn-relu", marks=pytest.mark.slow)])
def test_compiled_as_a_whole(name, dynamic):
    torch.compiler.reset()
    fused, _ = make(name)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), fused, nn.ReLU())
    other = copy.deepcopy(network)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 5) if dynamic else (2,):
        x = normal(batch, 3, 6, 7, seed=batch)
        y, wanted = compiled(x), network(x)
        torch.testing.assert_close(y, wanted)
        y.square().sum().backward()
        wanted.square().sum().backward()
    for found, want in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want.grad, rtol=1e-4, atol=1e-4)
    for found, want in zip(other.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bn-relu", "evonorm-b0"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_checkpoints_update_running_statistics_once(name, reentrant, backend):
    fused, plain = make(name)
    fused = FusedLayer.of(fused.unfused(), backend)
    x, other = (normal(4, 8, 3, 3).requires_grad_() for _ in range(2))
    checkpoint(fused, x, use_reentrant=reentrant).square().sum().backward()
    plain(other).square().sum().backward()
    assert_near(x.grad, other.grad)
    for found, want in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, want)


def test_cumulative_averages_and_untracked_statistics():
    graph = catalog.layer("bn-relu", momentum=None)
    fused, plain = FusedLayer(graph, 4, backend="reference"), GraphLayer(graph, 4)
    for seed in range(3):
        fused(normal(5, 4, 2, seed=seed))
        plain(normal(5, 4, 2, seed=seed))
    assert int(fused.num_batches_tracked) == 3
    for found, want in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, want)
    free = FusedLayer(graph, 4, backend="reference", track_running_stats=False).eval()
    assert not list(free.buffers())
    x = normal(5, 4, 2) + 9
    torch.testing.assert_close(free(x), GraphLayer(graph, 4, track_running_stats=False).eval()(x))


def test_autocast_leaves_the_type_alone():
    fused, _ = make("evonorm-s0")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), fused)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(normal(2, 3, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_only_the_input_and_small_statistics_are_kept():
    def kept(layer: nn.Module, x: torch.Tensor) -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not x:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        gc.collect()
        del y
        return sum(found.values())

    fused, plain = make("evonorm-s0")
    x = normal(4, 8, 16, 16).requires_grad_()
    assert kept(fused, x) < x.nbytes / 20
    assert kept(plain, x) > 2 * x.nbytes


# -- models travel -----------------------------------------------------------------------------------------------


def test_export_is_of_torch_functions_and_the_operator_survives_it():
    fused, plain = make("evonorm-b0")
    x = normal(3, 8, 4, 4)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes=({0: batch},))
    assert "nasforge" not in str(program.graph)
    other = normal(5, 8, 4, 4, seed=9)
    torch.testing.assert_close(program.module()(other), plain.eval()(other))

    class Opaque(nn.Module):
        def forward(self, x):
            return graph_forward(*arguments(catalog.layer("gn-relu", groups=4), x, wrt=False))[0]

    program = torch.export.export(Opaque(), (x,), dynamic_shapes=({0: batch},))
    assert "nasforge.graph_forward" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(other), Opaque()(other))


def test_onnx(importable):
    importable("onnxscript")
    runtime = importable("onnxruntime")
    fused, plain = make("evonorm-s0")
    x, file = normal(2, 8, 4, 4), io.BytesIO()
    torch.onnx.export(fused.eval(), (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_state_dicts():
    fused, plain = make("evonorm-b0")
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = normal(2, 8, 3, 3)
    copied, pickled = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    other = FusedLayer(catalog.layer("evonorm-b0", groups=4), 8, backend="reference")
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        fused.weight.add_(1)  # of no copy
    for layer in (copied, pickled, other):
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    file = io.BytesIO()
    torch.save(copied.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))


def test_unfused_has_the_present_state():
    plain = GraphLayer(catalog.layer("bn-relu"), 4)
    fused = FusedLayer.of(plain, "reference")
    assert fused.weight is plain.weight
    fused.double().eval()
    fused.weight = nn.Parameter(torch.full((4,), 2.0))
    back = fused.unfused()
    assert back is plain
    assert not plain.training
    assert plain.weight is fused.weight
    assert plain.running_mean.dtype == torch.float64
    made = FusedLayer(catalog.layer("bn-relu"), 4).unfused()
    assert type(made) is GraphLayer
    assert made(normal(3, 4)).shape == (3, 4)


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 8, 3, dtype=torch.int64),
        torch.ones(2, 8, 3, dtype=torch.complex64),
        torch.ones(2, 8, 3, dtype=torch.bool),
        torch.ones(2, 8, 3).to_sparse(),
        torch.ones(2, 7, 3),
        torch.ones(8),
        torch.ones(2, 8, 1, 1, 1, 1),
        [1.0, 2.0],
    ],
    ids=["int", "complex", "bool", "sparse", "channels", "rank 1", "rank 6", "list"],
)
def test_bad_input(x, backend):
    with pytest.raises(UserError, match="expected"):
        FusedLayer(catalog.layer("evonorm-s0"), 8, backend=backend)(x)


@pytest.mark.filterwarnings("ignore")
def test_quantised_input():
    x = torch.quantize_per_tensor(torch.ones(2, 8, 3), 0.1, 0, torch.quint8)
    with pytest.raises(UserError, match="dense tensor of floating-point"):
        FusedLayer(catalog.layer("evonorm-s0"), 8, backend="reference")(x)


def test_float64_falls_back():
    fused, plain = make("evonorm-s0")
    x = normal(2, 8, 3, dtype=torch.float64)
    assert torch.equal(fused.double()(x), plain.double()(x))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_an_empty_batch_changes_nothing(backend):
    layer = FusedLayer(catalog.layer("evonorm-b0"), 8, backend=backend)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_statistics_of_several_processes_are_left_to_the_graph_layer(monkeypatch):
    fused, plain = make("bn-relu")
    called = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: called.append(tensor.mul_(2)))
    x = normal(3, 8, 2)
    torch.testing.assert_close(fused(x), plain(x))
    assert len(called) == 6  # in both layers the mean, and mean and square of the deviation
    called.clear()
    fused.eval()(x)
    make("bn-relu", synchronize=False)[0](x)
    make("gn-relu")[0](x)
    assert not called


@pytest.mark.parametrize("name", PARAMETERS)
def test_channel_vectors_beside_v0_and_v1(name):
    """Nodes without inputs are parameters of the layer, with gradients."""
    nodes = (make_node(name, ()), make_node("mul", (0, 4)), make_node("sigmoid", (5,)), make_node("max", (4, 6)))
    plain = GraphLayer(LayerGraph(nodes, 7), 6)
    nn.init.uniform_(getattr(plain, name), 0.3, 1.2, generator=torch.Generator().manual_seed(1))
    fused = FusedLayer.of(copy.deepcopy(plain), "reference")
    for layer in (fused, plain):
        layer(normal(3, 6, 4)).square().sum().backward()
    assert set(dict(fused.named_parameters())) == {"weight", "bias", name}
    for found, wanted in zip(fused.parameters(), plain.parameters(), strict=True):
        assert wanted.grad.any()
        assert_near(found.grad, wanted.grad)


def test_graphs_that_kernels_cannot_express():
    graph = parse_formula("x / std[channel](x) + mean[instance](x)")
    with pytest.raises(Unsupported, match="over positions"):
        FusedLayer(graph, 8)


# -- kernels -----------------------------------------------------------------------------------------------------


def test_fused_models_in_the_interpreter(importable):
    """Generated and handwritten kernels below fused modules, against float64."""
    importable("triton")
    script = Path(__file__).parents[1] / "support" / "fused_models.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "10 layers agree" in done.stdout


def test_graphs_without_kernels_run_by_torch_and_say_so(monkeypatch, caplog):
    """Where the runtime refuses a program, the reference runs it."""
    from kernels import operators
    from kernels.nodes import Unsupported

    def refuse(*_, **__):
        raise Unsupported("this shape", "another")

    monkeypatch.setitem(sys.modules, "kernels.runtime", SimpleNamespace(run=refuse))
    monkeypatch.setattr(kernels, "runtime", SimpleNamespace(run=refuse), raising=False)
    monkeypatch.setattr(operators, "by_kernels", lambda x: True)
    operators._warn_once.cache_clear()
    fused, plain = make("evonorm-s0")
    fused.backend = "auto"
    monkeypatch.setattr("kernels.layer.by_operator", lambda x, backend: True)
    x = normal(2, 8, 3, 3)
    with caplog.at_level(logging.WARNING, "nasforge.kernels"):
        for _ in range(2):
            assert_near(fused(x), plain(x))
    assert len(caplog.records) == 1
    assert "this shape" in caplog.text

"""Written networks, run where the toolkit cannot be imported, against the networks they were written from."""

from __future__ import annotations

import builtins
import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nas.export.source import network_source
from search_spaces.common.errors import UserError
from search_spaces.layered import with_layers
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.space import LayerSpace
from search_spaces.primitives.registry import ACTIVATIONS, NORMS
from search_spaces.registry import load_space

identity = ACTIVATIONS["identity"]
TOOLKIT = {"nas", "search_spaces", "zero_cost", "benchmarks", "predictors", "kernels", "torch_geometric"}
SMALL = {
    "nas-bench-201": {"channels": 4, "cells_per_stage": 2},
    "nas-bench-101": {"channels": 10, "cells_per_stage": 1},
    "nats-size": {},
    "nas-bench-macro": {"channels": 4},
    "darts": {"channels": 4, "layers": 5},
    "nas-bench-graph": {"in_features": 6, "num_classes": 3, "hidden": 8, "dropout": 0.0},
    "nas-bench-graph-proteins": {"in_features": 6, "num_classes": 3, "hidden": 8, "dropout": 0.0},
}
MOST_LINES = {"nas-bench-201": 120, "darts": 210, "nas-bench-graph": 200, "nas-bench-graph-proteins": 200}
GRAPHS = [name for name in SMALL if "graph" in name]


def sampled(name: str, count: int, seed: int = 0) -> list:
    """`count` architectures of a space."""
    space, rng = load_space(name), np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(count)]


def run(source: str, class_name: str = "Network", **arguments: int) -> nn.Module:
    """The network of a written file, which may import torch and the standard library only."""

    def guarded(name: str, *rest):
        if name.split(".")[0] in TOOLKIT:
            raise ModuleNotFoundError(name)
        return __import__(name, *rest)

    space = {"__name__": "written", "__builtins__": {**vars(builtins), "__import__": guarded}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(source, "written.py", "exec"), space)
    return space[class_name](**arguments)


def inputs_for(model: nn.Module, random: torch.Generator, size: int = 16) -> tuple[torch.Tensor, ...]:
    """A batch of images; for graph networks features and edges, with loops, a double edge and a lone node."""
    if hasattr(model, "nodes"):
        x = torch.randn(9, 6, generator=random, dtype=torch.double)
        edges = torch.randint(0, 8, (2, 20), generator=random)
        return x, torch.cat([edges, edges[:, :1], torch.tensor([[3], [3]])], 1)
    return (torch.randn(4, 3, size, size, generator=random, dtype=torch.double),)


def randomise(model: nn.Module, random: torch.Generator) -> None:
    """Values that hide nothing: no norm is the identity, no statistic is at its start."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=random, dtype=torch.double)
            value.copy_(drawn + 0.5 if value.ndim == 1 and "bias" not in name else (drawn - 0.5))


def results(model: nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients in training and evaluation, and the state afterwards."""
    model = model.to(dtype)
    found: list[torch.Tensor] = []
    for training in (True, False):
        model.train(training)
        x = inputs[0].to(dtype).requires_grad_()
        out = model(x, *inputs[1:])
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), [x, *model.parameters()], allow_unused=True)
        pairs = zip([x, *model.parameters()], grads, strict=True)
        found += [out.detach(), *(torch.zeros_like(value) if grad is None else grad for value, grad in pairs)]
    return [*found, *(value.clone() for value in model.state_dict().values())]


def compare(model: nn.Module, source: str, *, size: int = 16, single: bool = True) -> nn.Module:
    """State, outputs, gradients and statistics are the model's; returns the written network."""
    random = torch.Generator().manual_seed(1)
    written = run(source)
    shapes = [(name, value.shape) for name, value in model.state_dict().items()]
    assert [(name, value.shape) for name, value in written.state_dict().items()] == shapes
    assert [name for name, _ in written.named_parameters()] == [name for name, _ in model.named_parameters()]
    model = model.double()
    randomise(model, random)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = inputs_for(model, random, size)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        if dtype == torch.float32 and not single:
            continue
        for network in (model, written):
            network.to(dtype).load_state_dict(state, strict=True)
        for wanted, found in zip(results(model, inputs, dtype), results(written, inputs, dtype), strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(found / scale, wanted / scale, rtol=tolerance, atol=tolerance)
    assert written.stages() == model.stages()
    assert [name for name in model.stages() if not hasattr(written.get_submodule(name), "forward")] == []
    features = written.forward_features(
        *(value.to(written.classifier.weight.dtype) for value in inputs[:1]), *inputs[1:]
    )
    assert features.shape[1] == written.classifier.in_features
    return written


def check_text(sources: list[str], folder) -> None:
    """Formatted and clean by the formatter and the linter of this project, with settings for anybody's code."""
    for index, source in enumerate(sources):
        assert "search_spaces" not in source
        assert "torch_geometric" not in source
        (folder / f"network_{index}.py").write_text(source)
    ruff = [sys.executable, "-m", "ruff"]
    common = ["--isolated", "--line-length", "120", "--no-cache", str(folder)]
    for command in (["format", "--diff"], ["check", "--select", "E,F,I,B,UP,SIM,D419"]):
        found = subprocess.run([*ruff, *command, *common], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SMALL)
def test_every_space(name, tmp_path):
    space, sources = load_space(name), []
    for arch in sampled(name, 3):
        model = space.build(arch, **SMALL[name])
        sources.append(network_source(model, title=f"{name}, {space.encode(arch)}"))
        compare(model, sources[-1], single=len(sources) == 1)
        assert len(sources[-1].splitlines()) < MOST_LINES.get(name, 120)
    check_text(sources, tmp_path)


@pytest.mark.parametrize("layers", ["batch norm", "group norm"])
def test_gradient_of_graph_networks(layers):
    """In training, against finite differences."""
    space, random = load_space("nas-bench-graph"), torch.Generator().manual_seed(2)
    arch = space.decode(space.encode(sampled("nas-bench-graph", 1)[0]))
    norm = {"norm": NORMS["group-norm"], "act": identity} if layers == "group norm" else {"act": ACTIVATIONS["gelu"]}
    written = run(network_source(space.build(arch, **SMALL["nas-bench-graph"], **norm))).double()
    randomise(written, random)
    x, edges = inputs_for(written, random)
    assert torch.autograd.gradcheck(lambda x: written(x, edges), x.requires_grad_(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_space_often(name, tmp_path):
    space, sources = load_space(name), []
    rng = np.random.default_rng(7)
    for index, arch in enumerate(sampled(name, 20, seed=1)):
        scale = {
            **SMALL[name],
            **({"auxiliary": True, "stem": ("cifar", "imagenet")[index % 2]} if name == "darts" else {}),
        }
        norm = [NORMS[each] for each in ("batch-norm", "group-norm", "layer-norm", "instance-norm", "identity")]
        act = [ACTIVATIONS[each] for each in ("relu", "silu", "gelu", "leaky-relu", "hardswish", "identity")]
        if name not in GRAPHS and index % 2:
            scale |= {"norm": norm[rng.integers(len(norm))], "act": act[rng.integers(len(act))]}
        model = space.build(arch, **scale)
        sources.append(network_source(model, title=space.encode(arch)))
        compare(model, sources[-1], size=64 if scale.get("stem") == "imagenet" else 16, single=False)
    check_text(sources, tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_full_size_text(name):
    """At the papers' scale the text is no longer: loops, not lines."""
    space, (arch,) = load_space(name), sampled(name, 1, seed=3)
    lines = {}
    for scale in ({}, SMALL[name]):
        with torch.device("meta"):
            model = space.build(arch, **scale)
        lines[len(scale)] = len(network_source(model).splitlines())
    assert max(lines.values()) - min(lines.values()) <= 12
    assert max(lines.values()) < MOST_LINES.get(name, 120)


@pytest.mark.parametrize(("stem", "layers"), [("cifar", 3), ("imagenet", 4), ("cifar", 1), ("cifar", 2)])
def test_darts_auxiliary_head(stem, layers, tmp_path):
    space, (arch,) = load_space("darts"), sampled("darts", 1)
    model = space.build(arch, channels=4, layers=layers, stem=stem, auxiliary=True)
    source = network_source(model, example=(3, 64, 64))
    assert "torch.randn(8, 3, 64, 64)" in source
    written = compare(model, source, size=64 if stem == "imagenet" else 16, single=False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    for found, wanted in zip(written.double().forward_with_auxiliary(x), model.forward_with_auxiliary(x), strict=True):
        torch.testing.assert_close(found, wanted)
    check_text([source], tmp_path)


def graph_layer(name: str, **settings):
    return lambda channels: GraphLayer(layer(name), channels, **settings)


def random_layer(channels: int) -> nn.Module:
    return GraphLayer(LayerSpace().sample(np.random.default_rng(11)), channels)


FACTORIES = {
    "evonorm-s0": (graph_layer("evonorm-s0"), identity),
    "evonorm-b0": (graph_layer("evonorm-b0"), identity),
    "untracked": (graph_layer("evonorm-b0", track_running_stats=False), identity),
    "two layers": (graph_layer("group-norm"), graph_layer("silu")),
    "random layer": (random_layer, identity),
    "group norm": (NORMS["group-norm"], ACTIVATIONS["silu"]),
    "parameters": (NORMS["instance-norm"], lambda channels: nn.PReLU(channels, init=0.1)),
    "settings": (lambda c: nn.BatchNorm2d(c, eps=1e-3, momentum=0.2), lambda c: nn.ELU(0.5)),
    "sequence": (lambda c: nn.Sequential(nn.BatchNorm2d(c, affine=False), nn.Tanh()), lambda c: nn.LeakyReLU(0.2)),
    "table": (lambda c: nn.GroupNorm(2 if c > 8 else 1, c), ACTIVATIONS["gelu"]),
    "by width": (lambda c: nn.BatchNorm2d(c) if c > 8 else nn.GroupNorm(1, c), ACTIVATIONS["relu"]),
}


IMAGE_CASES = [("nas-bench-201", layers) for layers in FACTORIES]
IMAGE_CASES += [(name, f) for name in ("darts", "nas-bench-101") for f in ("evonorm-b0", "group norm", "by width")]
GRAPH_CASES = [("nas-bench-graph", layers) for layers in FACTORIES if layers not in ("by width", "table")]  # one width


@pytest.mark.parametrize(("name", "layers"), IMAGE_CASES + GRAPH_CASES)
def test_every_normalisation_and_activation(name, layers):
    norm, act = FACTORIES[layers]
    scale = {**SMALL[name], "channels": 6} if name != "nas-bench-graph" else SMALL[name]
    model = load_space(name).build(sampled(name, 1, seed=5)[0], norm=norm, act=act, **scale)
    source = network_source(model)
    compare(model, source, single=False)


def test_text_with_every_normalisation_and_activation(tmp_path):
    sources = []
    for (name, arch), (norm, act) in zip(
        itertools.cycle((name, sampled(name, 1, seed=5)[0]) for name in ("darts", "nas-bench-101")), FACTORIES.values()
    ):
        sources.append(network_source(load_space(name).build(arch, norm=norm, act=act, **SMALL[name])))
    check_text(sources, tmp_path)


def test_with_layers():
    space = with_layers(load_space("nas-bench-macro"), norms=["layer-norm"], acts=["hardswish"])
    model = space.build(space.sample(np.random.default_rng(0)), channels=4)
    source = network_source(model)
    compare(model, source, single=False)
    assert "nn.GroupNorm(1, hidden)" in source


def test_it_reads_like_the_architecture():
    space = load_space("nas-bench-201")
    arch = space.decode("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|avg_pool_3x3~2|")
    source = network_source(space.build(arch))
    assert 'self.edges["0"](node_0)' in source
    assert "node_2 = node_1" in source
    assert 'return node_0 + self.edges["5"](node_2)' in source
    assert "self.cells.extend(Cell(channels) for _ in range(5))" in source
    genotype = load_space("darts").decode(
        "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ('sep_conv_3x3', 0), ('skip_connect', 1), "
        "('sep_conv_3x3', 0), ('skip_connect', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], "
        "normal_concat=range(2, 6), "
        "reduce=[('max_pool_3x3', 0), ('skip_connect', 1), ('max_pool_3x3', 0), ('skip_connect', 2), "
        "('max_pool_3x3', 0), ('skip_connect', 2), ('max_pool_3x3', 0), ('skip_connect', 2)], "
        "reduce_concat=range(2, 6))"
    )
    source = network_source(load_space("darts").build(genotype, channels=4))
    assert 'state_5 = self.edges["0_5"](state_0) + state_2' in source
    assert "dilation" not in source
    assert "Auxiliary" not in source
    assert len(source.splitlines()) < 170


@pytest.mark.parametrize(
    "text",
    [
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|",
        "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|none~2|",
        "|none~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|none~0|nor_conv_3x3~1|none~2|",
        "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|",
    ],
)
def test_edges_that_lead_nowhere(text, tmp_path):
    """Their weights stay in the state, and their statistics follow the batches as in the model."""
    space = load_space("nas-bench-201")
    model = space.build(space.decode(text), **SMALL["nas-bench-201"])
    source = network_source(model)
    compare(model, source, single=False)
    check_text([source], tmp_path)


def test_arguments_and_dropout():
    space, (arch,) = load_space("nas-bench-201"), sampled("nas-bench-201", 1)
    source = network_source(space.build(arch, channels=4, in_channels=1, num_classes=7), class_name="Mine")
    assert run(source, "Mine")(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert run(source, "Mine", num_classes=3, in_channels=5)(torch.randn(2, 5, 8, 8)).shape == (2, 3)
    graph, (arch,) = load_space("nas-bench-graph"), sampled("nas-bench-graph", 1)
    source = network_source(graph.build(arch, hidden=8, dropout=0.3, pre_layers=1, post_layers=0))
    assert source.count("nn.Dropout(0.3)") == 2
    edges = torch.tensor([[0, 1], [1, 2]])
    assert run(source, num_classes=4, in_features=5)(torch.randn(3, 5), edges).shape == (3, 4)


@pytest.mark.parametrize("class_name", ["class", "My Net", "2d", "variance", "torch", "Cell", "ActConvNorm", "F"])
def test_bad_class_names(class_name):
    model = load_space("nas-bench-201").build((3,) * 6, **SMALL["nas-bench-201"])
    with pytest.raises(UserError, match="class name|Python class"):
        network_source(model, class_name=class_name)


class Foreign(nn.Module):
    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_foreign_modules():
    space = load_space("nas-bench-201")
    for model in (
        space.build((3,) * 6, norm=Foreign, **SMALL["nas-bench-201"]),
        space.build((3,) * 6, act=Foreign, **SMALL["nas-bench-201"]),
        nn.Linear(3, 3),
        space.choices(**SMALL["nas-bench-201"]),
    ):
        with pytest.raises(UserError, match=r"--to model.pt2"):
            network_source(model)
    with pytest.raises(UserError, match="Foreign"):
        network_source(space.build((3,) * 6, norm=Foreign, **SMALL["nas-bench-201"]))


def test_changed_models():
    """What somebody changed after the network was built is not passed over in silence."""
    model = load_space("nas-bench-201").build((3,) * 6, **SMALL["nas-bench-201"])
    model.cells[0].edges[0].conv = nn.Conv2d(4, 4, 3, padding=1, bias=True)
    with pytest.raises(UserError, match="Conv2d|Network"):
        network_source(model)
    model = load_space("nas-bench-201").build((3,) * 6, **SMALL["nas-bench-201"])
    model.cells[0].edges[0].conv = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
    with pytest.raises(UserError, match="Conv2d"):
        network_source(model)


def test_leaves_the_model_alone():
    model = load_space("darts").build(sampled("darts", 1)[0], channels=4, layers=3).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    network_source(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

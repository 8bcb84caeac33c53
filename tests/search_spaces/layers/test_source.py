"""Exported source, run in a process that cannot import the toolkit, against GraphLayer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_reference import live_graphs

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer, names
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.source import to_source

CHANNELS = 12
SHAPES = {"channels-first": ((3, 12, 4, 5), (3, 12, 6), (2, 12, 2, 3, 2)), "tokens": ((3, 6, 12),)}

# Executes every file with its recorded inputs; the six packages cannot be imported there.
CHILD = """
import pathlib, sys, torch

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nas", "search_spaces", "zero_cost", "benchmarks", "predictors", "kernels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
try:
    import search_spaces
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the toolkit can be imported")

folder = pathlib.Path(sys.argv[1])
found = []
for index, case in enumerate(torch.load(folder / "cases.pt", weights_only=True)):
    space = {"__name__": "layer"}
    exec((folder / f"layer_{index}.py").read_text(), space)
    module = space["Exported"](12).double()
    module.load_state_dict(case["state"])
    results = []
    for step, (x, weights) in enumerate(case["steps"]):
        module.train(step < 2)
        x.requires_grad_()
        out = module(x)
        inputs = [x, *module.parameters()] if out.requires_grad else []  # none: constant in evaluation
        grads = torch.autograd.grad(out, inputs, weights, allow_unused=True) if inputs else []
        results.append([out.detach(), *(g if g is not None else torch.zeros(()) for g in grads)])
    found.append({"results": results, "state": dict(module.state_dict())})
torch.save(found, folder / "found.pt")
"""


def record(graph: LayerGraph, layout: str, shape: tuple[int, ...], random: torch.Generator) -> tuple[dict, dict]:
    """A case for the other process, and what GraphLayer makes of it: two training steps and one evaluation."""
    module = GraphLayer(graph, CHANNELS, layout=layout).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(CHANNELS, generator=random, dtype=torch.double)
    case = {"state": {k: v.clone() for k, v in module.state_dict().items()}, "steps": []}
    results = []
    for step in range(3):
        x = torch.randn(shape, generator=random, dtype=torch.double) * 1.5 + 0.3
        weights = torch.randn(shape, generator=random, dtype=torch.double)
        case["steps"].append((x.clone(), weights))
        module.train(step < 2)
        out = module(x.requires_grad_())
        inputs = [x, *module.parameters()] if out.requires_grad else []  # none: constant in evaluation
        grads = torch.autograd.grad(out, inputs, weights, allow_unused=True) if inputs else []
        results.append([out.detach(), *(g if g is not None else torch.zeros(()) for g in grads)])
    return case, {"results": results, "state": dict(module.state_dict())}


@pytest.fixture(scope="module")
def graphs(request) -> list[tuple[LayerGraph, str]]:
    """The named layers, and random graphs of every kind of primitive."""
    import numpy as np

    rng = np.random.default_rng(5)
    found = [(layer(name), "tokens" if name.endswith("tokens") else "channels-first") for name in names()]
    nested = (  # where brackets matter
        "sub(x, sub(v0, tanh(x))) / (v1 / exp(x))",
        "-(x + v0) * -(tanh(x) - v1) / (v0 * (x / sigmoid(x)))",
        "abs(-x) - (v0 - (-(x * v1))^2) + (sub(v1, x) + (-1) * x)",
        "rsqrt(-x) * (x / (x + 1)) - min(max(x - 1, -v0), 1 + 1)",
    )
    found += [(parse_formula(formula), "channels-first") for formula in nested]
    for layout, primitives in (("channels-first", "extended"), ("channels-first", "evonorm24"), ("tokens", "extended")):
        found += [(g, layout) for g in live_graphs(rng, 12, primitives, groups=5)]
        settings = {"momentum": None, "unbiased": True, "affine": False, "group_size": 4}
        found += [(g, layout) for g in live_graphs(rng, 12, primitives, size=16, **settings)]
    return found


def test_equals_graph_layer_without_the_toolkit(graphs, tmp_path):
    random = torch.Generator().manual_seed(0)
    cases, expected = [], []
    for index, (graph, layout) in enumerate(graphs):
        shape = SHAPES[layout][index % len(SHAPES[layout])]
        case, result = record(graph, layout, shape, random)
        cases.append(case)
        expected.append(result)
        (tmp_path / f"layer_{index}.py").write_text(to_source(graph, "Exported", layout=layout))
    torch.save(cases, tmp_path / "cases.pt")
    run = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for (graph, _), found, wanted in zip(graphs, torch.load(tmp_path / "found.pt"), expected, strict=True):
        assert list(found["state"]) == list(wanted["state"]), format_formula(graph)
        pairs = list(zip(found["state"].values(), wanted["state"].values(), strict=True))
        for a, b in zip(found["results"], wanted["results"], strict=True):
            if b[0].isfinite().all():  # gradients at infinite values depend on the order of operations
                pairs += zip(a, b, strict=True)
            else:
                pairs.append((a[0], b[0]))
        for a, b in pairs:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True), format_formula(graph)


def test_source_is_formatted_and_clean(graphs, tmp_path):
    """By the formatter and the linter that this project uses, with their settings for somebody else's code."""
    for index, (graph, layout) in enumerate(graphs):
        (tmp_path / f"layer_{index}.py").write_text(to_source(graph, "Exported", channels=12, layout=layout))
    ruff = [sys.executable, "-m", "ruff"]
    common = ["--isolated", "--line-length", "120", "--no-cache", str(tmp_path)]
    for command in (["format", "--check"], ["check", "--select", "E,F,I,B,UP,SIM,D419"]):
        run = subprocess.run([*ruff, *command, *common], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_source_holds_only_what_the_layer_needs():
    source = to_source(layer("evonorm-s0"), "EvoNormS0", channels=64)
    assert "x * sigmoid(v1 * x) / std[group](x)" in source
    assert "def __init__(self, channels: int = 64, groups: int = 32):" in source
    for absent in ("register_buffer", "track", "self.training", "mean_square", "v0", "search_spaces", "guarded"):
        assert absent not in source
    assert "return y * weight + bias" in source
    with_batch = to_source(layer("evonorm-b0", "timm"), "EvoNormB0", formula_text="B zero")
    assert '"""B zero' in with_batch
    assert 'self.register_buffer("running_var", torch.ones(channels))' in with_batch
    assert "groups" not in with_batch


def test_half_precision_as_graph_layer():
    source: dict = {}
    exec(to_source(layer("bn-silu"), "Exported"), source)
    exported, module = source["Exported"](8), GraphLayer(layer("bn-silu"), 8)
    x = (torch.randn(4, 8, 6, 6) * 300).half()
    for mode in (True, False):
        out, expected = exported.train(mode)(x), module.train(mode)(x)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(exported.running_var, module.running_var)
    exported.reset_running_stats()
    assert torch.equal(exported.running_var, torch.ones(8))


def test_exported_source_compiles_and_exports(tmp_path: Path):
    source: dict = {"__name__": "layer"}
    exec(to_source(layer("evonorm-b0"), "Exported"), source)
    module = source["Exported"](8).eval()
    free = {d: torch.export.Dim(f"size_{d}") for d in (0, 2, 3)}
    program = torch.export.export(module, (torch.randn(4, 8, 5, 5),), dynamic_shapes=(free,)).module()
    x = torch.randn(1, 8, 7, 3)
    torch.testing.assert_close(program(x), module(x))


def test_instance_statistics_need_space():
    source: dict = {}
    exec(to_source(layer("in-relu"), "Exported"), source)
    with pytest.raises(ValueError, match="with space"):
        source["Exported"](8)(torch.randn(2, 8))


@pytest.mark.parametrize("name", ["class", "My Norm", "2d", "variance", "torch"])
def test_bad_class_names(name):
    with pytest.raises(UserError, match="class"):
        to_source(layer("silu"), name)


def test_other_bad_arguments():
    with pytest.raises(UserError, match="a layout"):
        to_source(layer("silu"), "Silu", layout="nhwc")
    with pytest.raises(UserError, match="at least one channel"):
        to_source(layer("silu"), "Silu", channels=0)


def test_guards_and_constants_survive():
    """A division by something that may be zero, 1 = exp(0), the logarithm's eps, the clamp of exp."""
    nodes = (
        make_node("exp", (1,)),
        make_node("div", (4, 0), eps=0.25),
        make_node("log", (0,), eps=0.5),
        make_node("exp", (0,), clamp=1.0),
        make_node("add", (5, 6)),
        make_node("add", (8, 7)),
    )
    source: dict = {}
    exec(to_source(LayerGraph(nodes, 9, affine=False), "Exported"), source)
    found = source["Exported"](1).double()(torch.tensor([[0.0], [-1.0], [3.0]], dtype=torch.double))
    e = torch.tensor(1.0, dtype=torch.double).exp()
    wanted = [4 + 0 + 1, -1 / 1.25 - torch.tensor(1.5).double().log() + 1 / e, 1 / 3.25 + torch.tensor(3.5).log() + e]
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.double), rtol=1e-6, atol=1e-7)

"""`kernels.fuse` and `unfuse` on models of GraphLayers and of torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from small_trainings import network, patterns
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.layer import FusedLayer
from kernels.norm_act import FUSED, FusedNorm, activation_of
from nas.training.loop import start, train
from nas.training.recipe import KERNELS, Recipe
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.module import GraphLayer

ACTIVATIONS = (
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.ELU(0.7),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.Mish(),
    nn.Sigmoid(),
    nn.Tanh(),
)
NORMS = (
    (lambda: nn.BatchNorm1d(6), (4, 6)),
    (lambda: nn.BatchNorm1d(6, affine=False), (4, 6, 5)),
    (lambda: nn.BatchNorm2d(6, momentum=0.3), (4, 6, 5, 3)),
    (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 3)),
    (lambda: nn.BatchNorm3d(6), (2, 6, 2, 3, 2)),
    (lambda: nn.GroupNorm(3, 6), (4, 6, 5, 3)),
    (lambda: nn.GroupNorm(2, 6, affine=False), (4, 6, 5)),
    (lambda: nn.LayerNorm(6), (4, 5, 6)),
    (lambda: nn.LayerNorm(6, bias=False, eps=1e-3), (4, 6)),
    (lambda: nn.RMSNorm(6), (4, 5, 6)),
    (lambda: nn.RMSNorm(6, eps=1e-2), (4, 5, 6)),
)


class Block(nn.Module):
    """A residual block as torchvision writes it: one activation module for both places."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.1, generator=generator)
    return model


def check_same(model: nn.Module, other: nn.Module, x: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Outputs, gradients and buffers agree in training, then in evaluation; the state dicts have the same keys."""
    assert list(model.state_dict()) == list(other.state_dict())
    for training in (True, False):
        results = []
        for one in (model.train(training), other.train(training)):
            one.zero_grad()
            given = x.clone().requires_grad_()
            y = one(given)
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            (y * direction).sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()]
            results.append([y, given.grad, *gradients, *one.buffers()])
        largest = max(float(wanted.detach().float().norm()) for wanted in results[1])
        for found, wanted in zip(*results, strict=True):  # some gradients are zero but for rounding
            assert (found - wanted).float().norm() <= tolerance * wanted.float().norm() + 1e-6 * largest


# -- pairs of torch's modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(NORMS)))
def test_every_normalisation(index):
    make, shape = NORMS[index]
    model = randomised(nn.Sequential(make(), ACTIVATIONS[5 + index % 3]))
    fused = kernels.fuse(model, backend="reference")
    assert fused.count == 1
    assert isinstance(fused.model[0], FusedNorm)
    assert isinstance(fused.model[0], type(model[0]))
    check_same(fused.model, model, torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2 + 1)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_every_activation(act):
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6), act))
    fused = kernels.fuse(model, backend="reference")
    assert fused.count == 1
    check_same(fused.model, model, torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2)))


def test_the_two_paths_call_the_operator_and_not():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 4, 3, 3)

    def operators(backend: str) -> bool:
        fused = kernels.fuse(model, backend=backend).model
        with torch.profiler.profile() as profile:
            fused(x)
        return any(event.key.startswith("nasforge::") for event in profile.key_averages())

    assert operators("reference")
    assert not operators("eager")
    if kernels.obstacle():
        assert not operators("auto")


def test_checkpoints_update_running_statistics_once():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    fused = kernels.fuse(model, backend="reference").model
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    checkpoint(fused, x, use_reentrant=False).sum().backward()
    model(x)
    for found, wanted in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_float64_empty_batches_and_other_types_run_torch_code():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()).double()
    fused = kernels.fuse(model, backend="reference").model
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.equal(fused(x), model(x))
    assert fused.float()(torch.zeros(0, 4, 3)).shape == (0, 4, 3)
    with pytest.raises(UserError, match="floating-point"):
        fused(torch.ones(2, 4, 3, dtype=torch.int32))
    with pytest.raises(UserError, match="floating-point"):
        fused(torch.ones(2, 4, 3).to_sparse())
    with pytest.raises(UserError, match=r"\[4\]|one for each channel"):
        fused(torch.ones(2, 6, 3))
    rows = kernels.fuse(nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU()), backend="reference").model
    with pytest.raises(UserError, match="4"):
        rows(torch.ones(2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_and_exported(training):
    torch.compiler.reset()
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.GroupNorm(2, 6), nn.GELU()))
    fused = kernels.fuse(model, backend="reference").model.train(training)
    model.train(training)
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused[1].running_var, model[1].running_var)
    exported = torch.export.export(fused.eval(), (x,))
    assert "nasforge" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


# -- where nothing is done, and why ------------------------------------------------------------------------------


def reasons(model: nn.Module, **settings) -> dict[str, str]:
    return {p.names[0]: p.reason for p in kernels.fuse(model, **settings).report if not p.fused}


class Shown(nn.Module):
    """Its normalisation's output goes into the activation and elsewhere."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) + y


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.bn, self.function = nn.BatchNorm2d(3), function

    def forward(self, x):
        return self.function(self.bn(x))


class ByMode(nn.Module):
    """Activates in training only."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(x)) if self.training else self.bn(x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        return self.inner(self.act(self.bn(x)) if x.sum() > 0 else x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.act(self.bn(x))))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shown(), "its output is used in several places"),
        (Functional(F.softplus), "no activation follows"),
        (Functional(F.relu), "relu, which is no module; `rewrite=True`"),
        (ByMode(), "differs in training and evaluation"),
        (Twice(), "called 2 times"),
        (Block(3), "its activation relu is used 2 times; `rewrite=True`"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), "no activation follows"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.PReLU()), "no kernel for PReLU"),
        (nn.Sequential(nn.InstanceNorm2d(3), nn.ReLU()), "no kernel for InstanceNorm2d"),
        (nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU()), "no kernel for SyncBatchNorm"),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.ReLU()), "cumulative"),
        (nn.Sequential(nn.LayerNorm((3, 4)), nn.ReLU()), "2 dimensions"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_sure_is_left_and_says_so(model, reason):
    before = [type(m) for m in model.modules()]
    fused = kernels.fuse(model, backend="reference")
    assert fused.count == 0
    assert reason in fused.report[0].reason
    assert [type(m) for m in fused.model.modules()] == before


def test_the_report_is_true_and_says_what_else_could_be_done():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block())
    head, *lines = str(kernels.fuse(model, backend="reference")).splitlines()
    assert head == "1 of 3 places fused"
    assert lines == [
        "1 + 2: fused, BatchNorm2d with ReLU",
        "3.bn1 + 3.relu: left, its activation 3.relu is used 2 times; `rewrite=True` can fuse it",
        "3.bn2: left, a residual is added before ReLU; `rewrite=True` can fuse both",
    ]
    assert kernels.fuse(model, backend="reference", rewrite=True).count == 3  # it can
    nothing = kernels.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert nothing.count == 0
    assert str(nothing).startswith("nothing to fuse")
    notes = [
        str(kernels.fuse(model, backend=backend)).count("by torch") for backend in ("auto", "reference", "compile")
    ]
    assert notes == [int(bool(kernels.obstacle())), 0, 1]  # the last is "compiled by torch.compile"


def test_hooks_are_left():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    assert "hooks" in reasons(model)["0"]


def test_models_that_cannot_be_traced_are_fused_where_the_order_is_sure():
    fused = kernels.fuse(Untraceable(), backend="reference")
    assert [(p.names[0], p.fused) for p in fused.report] == [("bn", False), ("inner.0", True)]
    assert "cannot be traced" in fused.report[0].reason
    check_same(fused.model, kernels.unfuse(copy.deepcopy(fused.model)), torch.rand(2, 3, 4, 4))


# -- rewriting ---------------------------------------------------------------------------------------------------


def test_rewriting_fuses_shared_activations_and_residuals():
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block()))
    assert kernels.fuse(model).count == 0
    fused = kernels.fuse(model, rewrite=True, backend="reference")
    assert fused.count == 4
    assert "residual" in {p.names[0]: p.reason for p in fused.report}["1.bn2"]
    targets = [n.target for n in fused.model.graph.nodes if n.op.startswith("call")]
    assert len(targets) == 1 + 2 * 4  # convolutions and fused normalisations, nothing else
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    check_same(fused.model, model, x, 1e-4)
    check_same(copy.deepcopy(fused.model), copy.deepcopy(model), x, 1e-4)
    eager = kernels.fuse(model, rewrite=True, backend="auto").model
    check_same(eager, copy.deepcopy(model), x)


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.leaky_relu(x, 0.3),
        lambda x: F.leaky_relu(x, negative_slope=0.3),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.silu(input=x),
        lambda x: x.sigmoid(),
        torch.tanh,
        lambda x: F.hardswish(x),
    ],
)
def test_rewriting_fuses_functions(function):
    model = randomised(Functional(function))
    fused = kernels.fuse(model, rewrite=True, backend="reference")
    assert fused.count == 1
    check_same(fused.model, model, torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))[..., None])


class Sums(nn.Module):
    """Sums that may be fused and sums that may not."""

    def __init__(self, form: str):
        super().__init__()
        self.bn, self.ln, self.form = nn.BatchNorm2d(4), nn.LayerNorm(4), form

    def forward(self, x):
        if self.form == "right":
            return F.relu(x + self.bn(x))
        if self.form == "scaled":
            return F.relu(torch.add(self.bn(x), x, alpha=2))
        if self.form == "into":  # changes its left side, which is used again
            y = x * 1.0
            return F.relu(y.add_(self.bn(x))) + y
        if self.form == "narrow":
            return F.relu(self.bn(x) + x[:, :1])
        return F.relu(self.ln(x) + x)


@pytest.mark.parametrize(
    ("form", "count"), [("right", 1), ("scaled", 0), ("into", 0), ("narrow", 1), ("layer norm", 0)]
)
def test_sums_that_are_residuals_and_others(form, count):
    model = randomised(Sums(form))
    fused = kernels.fuse(model, rewrite=True, backend="reference")
    assert fused.count == count
    check_same(fused.model, model, torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5)))


def test_rewriting_refuses_what_it_would_change():
    for model in (ByMode(), Untraceable()):
        with pytest.raises(UserError, match=r"same in training and evaluation|can trace"):
            kernels.fuse(model, rewrite=True)
    with pytest.raises(UserError, match="copy"):
        kernels.fuse(Block(), rewrite=True, inplace=True)
    fused = kernels.fuse(Block(), rewrite=True).model
    with pytest.raises(UserError, match="copy of a rewritten model"):
        kernels.unfuse(copy.deepcopy(fused))
    back = kernels.unfuse(fused.eval())
    assert isinstance(back, Block)
    assert not back.bn1.training
    assert back.bn1.weight is fused.bn1.weight


# -- graph layers, and the whole ---------------------------------------------------------------------------------


def mixed() -> nn.Sequential:
    shared = GraphLayer(catalog.layer("evonorm-s0"), 8)
    refused = GraphLayer(parse_formula("x / std[channel](x) + mean[instance](x)"), 8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        shared,
        nn.BatchNorm2d(8),
        nn.ReLU(),
        shared,
        refused,
        nn.Conv2d(8, 4, 1),
        nn.GroupNorm(2, 4),
    )


def test_fuse_and_unfuse_a_mixed_model():
    model = mixed()
    types = [type(m) for m in model.modules()]
    fused = kernels.fuse(model, backend="reference")
    assert fused.model is not model
    assert [type(m) for m in model.modules()] == types
    assert fused.count == 2
    assert fused.model[1] is fused.model[4]
    assert isinstance(fused.model[1], FusedLayer)
    assert kernels.is_fused(fused.model)
    assert not kernels.is_fused(model)
    text = str(fused)
    assert "2 of 4 places fused" in text
    assert "5: left, kernels cannot express it" in text
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    check_same(fused.model, model, x, 1e-4)
    again = kernels.fuse(fused.model, backend="reference")
    assert again.count == 0
    optimizer = torch.optim.SGD(fused.model.parameters(), 0.1)
    fused.model.train()(x).square().mean().backward()
    optimizer.step()
    state = {k: v.clone() for k, v in fused.model.state_dict().items()}
    back = kernels.unfuse(fused.model.eval())
    assert back is fused.model
    assert [type(m) for m in back.modules()] == types
    assert not any(m.training for m in back.modules())
    for name, value in back.state_dict().items():
        assert torch.equal(value, state[name])
    assert [id(p) for p in back.parameters()] == [id(p) for g in optimizer.param_groups for p in g["params"]]


def test_in_place_gives_the_same_modules_back():
    model = mixed()
    modules = list(model.modules())
    assert kernels.fuse(model, inplace=True).model is model
    assert list(model.modules()) != modules
    kernels.unfuse(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_model_that_is_one_layer():
    layer = GraphLayer(catalog.layer("bn-relu"), 4)
    fused = kernels.fuse(layer, inplace=True)
    assert isinstance(fused.model, FusedLayer)
    assert fused.model.weight is layer.weight
    assert kernels.unfuse(fused.model) is layer


def test_backends():
    model = mixed()
    assert kernels.fuse(model, backend="eager").count == 0
    with pytest.raises(UserError, match="tritn.*triton"):
        kernels.fuse(model, backend="tritn")
    if kernels.obstacle():
        with pytest.raises(UserError, match="auto"):
            kernels.fuse(model, backend="triton")
    compiled = kernels.fuse(model, backend="compile").model
    assert compiled._compiled_call_impl is not None
    assert kernels.unfuse(compiled)._compiled_call_impl is None


def test_every_kernel_is_of_a_normalisation_and_has_its_constructor():
    for kind, fused in FUSED.items():
        assert issubclass(fused, kind)
    assert activation_of(nn.Softmax()) is None


# -- training ----------------------------------------------------------------------------------------------------


def test_training_fuses_as_the_recipe_says(monkeypatch):
    monkeypatch.setattr("kernels.backend.obstacle", lambda: "")  # without a GPU fused modules run torch's code
    assert set(KERNELS) == {"auto", "triton", "eager", "compile"}
    data, losses = patterns(), {}
    for setting in ("eager", "auto", "triton"):
        recipe = Recipe(steps=3, batch_size=8, padding=0, flip=False, kernels=setting)
        state = start(network(), data, recipe, seed=0)
        assert kernels.is_fused(state.model) == (setting == "triton")
        model = network()
        losses[setting] = train(model, data, recipe, seed=0).losses
        assert not kernels.is_fused(model)
    assert losses["triton"] == losses["eager"] == losses["auto"]
    own = kernels.fuse(network()).model
    train(own, data, recipe, seed=0)
    assert kernels.is_fused(own)  # its owner fused it


def test_training_by_the_operators_follows_torch(monkeypatch):
    data, losses = patterns(), {}
    for backend in ("eager", "reference"):
        model = kernels.fuse(network(), backend=backend).model
        losses[backend] = train(model, data, Recipe(steps=12, batch_size=16, padding=0, flip=False), seed=0).losses
    assert losses["reference"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["reference"] != losses["eager"]
    assert losses["eager"][-1] < losses["eager"][0]


def test_kernels_that_cannot_run_are_refused_before_training():
    if not kernels.obstacle():
        pytest.skip("kernels can run here")
    with pytest.raises(UserError, match="auto"):
        start(network(), patterns(), Recipe(kernels="triton"), seed=0)

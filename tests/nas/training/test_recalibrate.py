"""Recalibration: running statistics equal averages computed by hand, for BatchNorm and for GraphLayer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.training.recalibrate import evaluating, recalibrate, statistics_layers
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer
from search_spaces.primitives.registry import NORMS, norm_factory, primitive


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 5, 5, generator=generator) * scale + scale for scale in (0.5, 1.0, 3.0)]


def test_batch_norm_gets_plain_averages(batches):
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean.fill_(7.0)
    model = nn.Sequential(norm, nn.Dropout(0.9)).eval()
    assert recalibrate(model, [(b, torch.zeros(8)) for b in batches]) == 3
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.var((0, 2, 3), unbiased=True) for b in batches]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, atol=1e-5)
    assert norm.momentum == 0.3
    assert not norm.training


def test_torch_agrees(batches):
    """torch.optim.swa_utils.update_bn does the same for BatchNorm in a network."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    theirs = nn.Sequential(*[nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
    theirs.load_state_dict(ours.state_dict())
    recalibrate(ours, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), value.float(), atol=1e-5), name


@pytest.mark.parametrize(("momentum", "unbiased"), [(0.1, False), (None, False), (0.1, True)])
def test_graph_layer(batches, momentum, unbiased):
    norm = GraphLayer(layer("bn-relu", momentum=momentum, unbiased=unbiased), 3)
    norm.train()
    norm(batches[0] * 100)
    recalibrate(norm, batches)
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.var((0, 2, 3), unbiased=unbiased) for b in batches]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, atol=1e-5)
    assert norm.graph.momentum == momentum
    assert norm.training
    x = batches[1]
    expected = (x - means.view(3, 1, 1)) / (variances + 1e-5).sqrt().view(3, 1, 1)
    assert torch.allclose(norm.eval()(x), expected.relu(), atol=1e-5)


def test_a_layer_used_twice_averages_over_its_uses(batches):
    norm = nn.BatchNorm2d(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + self.norm(2 * x)

    recalibrate(Twice(), batches)
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(norm.running_mean, 1.5 * means, atol=1e-5)


def test_zero_batches_and_layers_without_statistics():
    with pytest.raises(UserError, match="at least one batch"):
        recalibrate(nn.BatchNorm2d(3), [])
    assert statistics_layers(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))) == []


def test_statistics_and_modes_are_restored_after_an_error(batches):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail():
        with evaluating(model, batch_statistics=True):
            assert model[0].training
            assert not model.training
            model(batches[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# What the running values average, of a batch [B, C, H, W]; by hand.
def _moment(x):
    return x.square().mean((0, 2, 3))


def _scaled_moment(x):
    return _moment(x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt())


STATISTICS = {
    "l1-batch-norm": {
        "running_mean": lambda x: x.mean((0, 2, 3)),
        "running_deviation": lambda x: (x - x.mean((0, 2, 3), keepdim=True)).abs().mean((0, 2, 3)),
    },
    "power-norm": {"running_moment": _scaled_moment},
    "power-norm-v": {"running_moment": _scaled_moment},
    "unified-norm": {"running_moment": _moment},
    "adab2n": {
        "running_mean": lambda x: x.mean((0, 2, 3)),
        "running_var": lambda x: x.var((0, 2, 3), correction=0),
    },
    "alpha-bn": {
        "source.running_mean": lambda x: x.mean((0, 2, 3)),
        "source.running_var": lambda x: x.var((0, 2, 3)),
    },
    "rep-bn": {"bn.running_mean": lambda x: x.mean((0, 2, 3)), "bn.running_var": lambda x: x.var((0, 2, 3))},
    "ibn-a": {"batch_norm.running_mean": lambda x: x[:, 1:].mean((0, 2, 3))},
}


def trained(name, batches, **settings):
    """A normalisation after a few steps, so that every average is away from its start."""
    norm = primitive(name).make(3, **settings).train()
    for batch in batches:
        norm(batch.clone().requires_grad_()).square().sum().backward()
    return norm


@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics_of_primitives_are_averages_over_batches(name, batches):
    settings = {"power-norm": {"warmup": 2}, "unified-norm": {"warmup": 2, "window": 2}}.get(name, {})
    norm = trained(name, batches, **settings)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    attributes = {key: value for key, value in vars(norm).items() if isinstance(value, int | float)}
    recalibrate(norm, batches)
    for key, statistic in STATISTICS[name].items():
        expected = torch.stack([statistic(b) for b in batches]).mean(0)
        torch.testing.assert_close(norm.state_dict()[key], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before[key], expected, atol=1e-3)
    for key, value in norm.state_dict().items():
        if "running_" not in key and not key.endswith("num_batches_tracked"):
            assert torch.equal(value, before[key]), key
    assert {key: vars(norm)[key] for key in attributes} == attributes
    assert norm.training


def test_every_normalisation_with_statistics_is_known():
    for name in NORMS:
        norm = norm_factory(name)(4)
        keeps = [key for key, _ in norm.named_buffers() if "running_" in key]
        assert bool(statistics_layers(norm)) == bool(keeps), name
        found = [b for part in statistics_layers(norm) for b in part.buffers(recurse=False)]
        assert len(keeps) <= len(found)
        assert ("running-statistics" in primitive(name).needs) == bool(keeps), name


@pytest.mark.parametrize("name", ["l1-batch-norm", "power-norm", "unified-norm", "adab2n", "alpha-bn"])
def test_batch_statistics_of_primitives(name, batches):
    """Past its warm-up a layer normalises by the batch while asked to, and nothing of it is changed."""
    settings = {"power-norm": {"warmup": 1}, "unified-norm": {"warmup": 1, "window": 2}}.get(name, {})
    norm = trained(name, batches, **settings)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    with evaluating(norm, batch_statistics=True), torch.no_grad():
        out = norm(7 * batches[0])
    spread = (out.abs() if name == "l1-batch-norm" else out.square()).mean((0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(3), atol=1e-3, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_layers_that_no_batch_reached_keep_their_statistics(batches):
    from search_spaces.choice import Choice

    choice = Choice([nn.BatchNorm2d(3), nn.BatchNorm2d(3)], "norm")
    choice.candidates[1].running_mean.fill_(5.0)
    recalibrate(choice, batches)
    assert (choice.candidates[1].running_mean == 5).all()
    assert choice.candidates[0].running_mean.abs().max() < 5
    with pytest.raises(UserError):
        recalibrate(choice, [])
    assert (choice.candidates[1].running_mean == 5).all()
    norm = choice.candidates[0]
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError):
        recalibrate(choice, [batches[0], torch.zeros(2, 4, 3, 3)])
    assert torch.equal(norm.running_mean, before)

"""Recalibration: running statistics equal averages computed by hand, for BatchNorm and for GraphLayer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.training.recalibrate import evaluating, recalibrate, statistics_layers
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer


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
